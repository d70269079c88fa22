//! What a round is made of: all of it follows from the seed and the round's number. A
//! parameter of the filter that is to be soaked too is added here, and nowhere else.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use super::bytes::mix;

/// Numbers that follow from a seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0, 0x736f_616b)
    }

    /// Less than `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// True once in so many times.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// What a round is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One temporary overlay.
    Shared,
    /// A kept overlay, and kills.
    Kept,
    /// A temporary overlay on a file system that is too small.
    Full,
    /// Each connection has an overlay of its own.
    PerConnection,
    /// A disk of a TiB, of which gigabytes are trimmed at once.
    Huge,
    /// A kept overlay on a file system that is too small, and kills.
    KeptFull,
}

const KINDS: [Kind; 6] = [
    Kind::Kept,
    Kind::Shared,
    Kind::Full,
    Kind::Huge,
    Kind::KeptFull,
    Kind::PerConnection,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnRead {
    No,
    Yes,
    /// By its path, which comes and goes.
    Switched,
}

#[derive(Debug)]
pub struct Mix {
    pub kind: Kind,
    pub duration: Duration,
    pub seed: u64,
    /// Of the disk, in bytes.
    pub size: u64,
    pub block: u64,
    /// Each has a client of its own.
    pub regions: usize,
    pub connections_each: usize,
    /// How many requests of a client are in flight, over all its connections.
    pub depth: usize,
    /// Of nbdkit, for each connection.
    pub threads: u64,
    /// The longest read or write, in bytes.
    pub longest: u64,
    /// How long the base takes for a read.
    pub base_takes: Option<Duration>,
    pub on_read: OnRead,
    pub on_cache: bool,
    pub serialize: bool,
    /// The size of the file system that the overlay is on, where it is a small one.
    pub room: Option<u64>,
    /// `cow-limit`, in bytes.
    pub limit: Option<u64>,
    /// How often a connection is torn: once in so many requests.
    pub tears: u64,
}

const MIB: u64 = 1 << 20;

impl Mix {
    /// The kinds take turns, so that a short run has seen each.
    pub fn new(seed: u64, round: u64) -> Mix {
        let mut random = Random::new(mix(seed, round));
        let r = &mut random;
        let kind = KINDS[(seed.wrapping_add(round) % KINDS.len() as u64) as usize];
        let is_kept = matches!(kind, Kind::Kept | Kind::KeptFull);
        let block = match is_kept {
            true => r.of(&[512, 4096, 4096, 65536]),
            false => r.of(&[512, 4096, 4096, 65536, MIB]),
        };
        let size = match kind {
            Kind::Huge => (1 << 40) - r.below(2) * r.below(1 << 20),
            _ => r.of(&[6, 24, 64]) * MIB + r.below(2) * r.below(100_000),
        };
        let is_full = matches!(kind, Kind::Full | Kind::KeptFull);
        Mix {
            kind,
            duration: Duration::from_secs(20 + r.below(21)),
            seed: r.next(),
            size,
            block,
            regions: r.of(&[3, 5, 8]),
            connections_each: match kind {
                // Another one would not see what this one writes.
                Kind::PerConnection => 1,
                _ => r.of(&[1, 2, 3]),
            },
            depth: r.of(&[2, 8, 24]),
            threads: r.of(&[1, 2, 4, 16]),
            longest: r.of(&[32 << 10, 256 << 10, MIB]),
            base_takes: match r.below(3) {
                0 => Some(Duration::from_millis(r.of(&[1, 2, 5]))),
                _ => None,
            },
            on_read: r.of(&[OnRead::No, OnRead::Yes, OnRead::Switched, OnRead::Switched]),
            on_cache: r.once_in(2),
            serialize: r.once_in(10),
            room: is_full.then(|| (size / r.of(&[2, 3, 4])).max(5 * MIB)),
            limit: (!is_full && r.once_in(3))
                .then(|| (size / r.of(&[2, 3, 4])).clamp(5 * MIB, 32 * MIB)),
            tears: r.of(&[100, 1000]),
        }
    }

    pub fn is_kept(&self) -> bool {
        matches!(self.kind, Kind::Kept | Kind::KeptFull)
    }

    pub fn may_be_full(&self) -> bool {
        self.room.is_some() || self.limit.is_some()
    }

    /// Of how many bytes, from a multiple of it on, a change that may have failed has left
    /// all or none.
    ///
    /// A block that has data is written in place, and has its space. Not so after a kill: a
    /// discard that was not flushed may have punched it out, and the image says that it has
    /// data. Where there is no space for it then, bytes of it are old and others new.
    pub fn old_or_new(&self) -> u64 {
        match self.kind {
            Kind::KeptFull => 1,
            _ => self.block,
        }
    }

    /// The parameters of nbdkit that do not depend on where things lie.
    pub fn parameters(&self) -> Vec<String> {
        let mut words = vec![
            format!("cow-block-size={}", self.block),
            format!("cow-on-cache={}", self.on_cache),
            format!("cow-serialize={}", self.serialize),
        ];
        if let Some(time) = self.base_takes {
            words.push(format!("rdelay={}ms", time.as_millis()));
        }
        if let Some(bytes) = self.limit {
            words.push(format!("cow-limit={bytes}"));
        }
        if self.kind == Kind::PerConnection {
            words.push("cow-scope=connection".into());
        }
        words
    }

    /// `switch` is the file that turns cow-on-read on, `image` that of a kept overlay,
    /// `stats` the one that is written every second.
    pub fn parameters_of_places(&self, switch: &Path, image: &Path, stats: &Path) -> Vec<String> {
        let mut words = match self.on_read {
            OnRead::No => Vec::new(),
            OnRead::Yes => vec!["cow-on-read=true".into()],
            OnRead::Switched => vec![format!("cow-on-read={}", switch.display())],
        };
        if self.is_kept() {
            words.push(format!("cow-overlay={}", image.display()));
        }
        words.push(format!("cow-stats={}", stats.display()));
        words
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?}: {} bytes, blocks of {}, {} clients x {} connections x {} threads, {} requests \
             in flight of up to {}, cow-on-read {:?}, cow-on-cache {}",
            self.kind,
            self.size,
            self.block,
            self.regions,
            self.connections_each,
            self.threads,
            self.depth,
            self.longest,
            self.on_read,
            self.on_cache
        )?;
        if let Some(bytes) = self.limit {
            write!(f, ", cow-limit {bytes}")?;
        }
        if let Some(time) = self.base_takes {
            write!(f, ", slow base ({time:?})")?;
        }
        if let Some(room) = self.room {
            write!(f, ", room for {room}")?;
        }
        if self.serialize {
            write!(f, ", cow-serialize")?;
        }
        write!(f, ", for {:?}", self.duration)
    }
}
