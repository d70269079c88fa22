//! Where the rates are measured: a directory with a disk in it, and what makes a
//! cell of a load on that disk.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use tempfile::TempDir;

use super::fio::Job;
use super::machine;
use super::nbd::Request;
use super::runner::{Cell, Effort, Kind, Measured};
use super::server::Server;
use super::systems::{Setup, System};
use super::targets::goals;

/// Two directories: on tmpfs only the processor counts; on the disk's file
/// system the first write of a block costs what it costs in use.
pub const MEMORY: &str = "/dev/shm";
pub const DISK: &str = "/var/tmp";

const GIB: f64 = (1u64 << 30) as f64;

/// How long a read of the slow base takes.
const DELAY: Duration = Duration::from_millis(5);

/// A directory of our own in `place`, removed with all that is in it. `make bench`
/// says how its name starts, to be able to remove it too.
pub fn scratch(place: &str) -> Result<TempDir, String> {
    let prefix = std::env::var("BENCH_SCRATCH").unwrap_or_else(|_| "cow-bench.".into());
    tempfile::Builder::new()
        .prefix(&prefix)
        .tempdir_in(place)
        .map_err(|error| format!("no directory in {place}: {error}"))
}

pub fn scratch_in_memory() -> Result<TempDir, String> {
    scratch(MEMORY)
}

/// How much can be written to `place`, in bytes. tmpfs promises what it is allowed,
/// whether the machine has so much memory left or not.
pub fn room(place: &str) -> Result<u64, String> {
    let about = statvfs(place).map_err(|error| format!("{place}: {error}"))?;
    let free = about.blocks_available() * about.fragment_size();
    Ok(match place {
        MEMORY => free.min(machine::available_memory().unwrap_or(free)),
        _ => free,
    })
}

/// Complains before anything is measured, and not in the middle of it.
pub fn need_room(effort: &Effort) -> Result<(), String> {
    for place in [MEMORY, DISK] {
        // The disk, and one overlay that has all of it with qemu-nbd's way to count, or
        // one of each system with a part of it.
        let needed = (effort.disk * 5 / 2) as f64 / GIB;
        let free = room(place)? as f64 / GIB;
        if free < needed {
            return Err(format!(
                "{needed:.1} GiB are needed in {place}, and there are {free:.1} GiB"
            ));
        }
    }
    Ok(())
}

/// A directory with a disk full of random bytes in it.
pub struct Lab {
    on_disk: bool,
    scratch: TempDir,
    pub disk: PathBuf,
    /// In bytes.
    pub size: u64,
    time: Duration,
    pub rounds: usize,
    /// Of the processor time.
    pub turns: usize,
    more_time: Duration,
    more_rounds: usize,
}

impl Lab {
    pub fn new(place: &str, effort: &Effort) -> Result<Lab, String> {
        let scratch = scratch(place)?;
        let disk = scratch.path().join("disk.img");
        random_file(&disk, effort.disk)
            .and_then(|()| File::open(&disk)?.sync_all())
            .map_err(|error| format!("the disk in {place}: {error}"))?;
        Ok(Lab {
            on_disk: place == DISK,
            scratch,
            disk,
            size: effort.disk,
            time: effort.time,
            rounds: effort.rounds,
            turns: effort.turns,
            more_time: effort.more_time,
            more_rounds: effort.more_rounds,
        })
    }

    pub fn place(&self) -> &Path {
        self.scratch.path()
    }

    pub fn job(&self, pattern: &'static str, block: u64, depth: u32) -> Job {
        Job {
            pattern,
            block,
            depth,
            connections: 1,
            size: self.size,
            time: self.time,
            flush_every: 0,
        }
    }

    /// A load on this disk.
    pub fn load(&self, id: &str, title: &str, job: Job) -> Load {
        Load {
            id: id.into(),
            title: title.into(),
            job,
            kind: Kind::Rate,
            systems: System::ALL.to_vec(),
            slow: false,
            again: false,
        }
    }

    /// Writes as much as the disk has, and removes it: what is written next gets the same
    /// memory.
    pub fn use_memory(&self) -> Result<(), String> {
        let path = self.place().join("used");
        random_file(&path, self.size)
            .and_then(|()| std::fs::remove_file(&path))
            .map_err(|error| format!("a file that uses memory: {error}"))
    }

    pub fn setup(&self, load: &Load) -> Setup {
        let mut setup = Setup::disk(&self.disk);
        if load.slow {
            setup = setup.slow();
        }
        if load.again || !load.job.reads_only() {
            setup = setup.written();
        }
        setup
    }

    /// Does what has to be done before the load begins.
    pub fn prepare(&self, load: &Load, server: &mut Server) -> Result<(), String> {
        if !load.again {
            return Ok(());
        }
        let data = vec![0x5a; 1 << 20];
        let writes = (0..load.job.size >> 20).map(|index| Request::Write {
            offset: index << 20,
            data: &data,
        });
        let written = server.client()?.all(writes, 4);
        written.map_err(|error| server.explain(error.to_string()))
    }

    /// What a row is called, by the place of its files.
    pub fn named(&self, id: &str, title: &str) -> (String, String) {
        if self.on_disk {
            (format!("disk-{id}"), format!("{title}, on disk"))
        } else {
            (id.into(), title.into())
        }
    }

    /// The rate of a load.
    pub fn rate<'a>(&'a self, load: &'a Load) -> Cell<'a> {
        let job = Job {
            time: if self.has_goals(&load.id) {
                self.more_time
            } else {
                self.time
            },
            ..load.job
        };
        let setup = self.setup(load);
        let mut cell = self.cell(&load.id, &load.title, load.kind, move |system| {
            let mut server = setup.start(system, self.place())?;
            self.prepare(load, &mut server)?;
            job.run(&server.uri())
                .map_err(|error| server.explain(error).into())
        });
        cell.systems.clone_from(&load.systems);
        cell
    }

    fn has_goals(&self, id: &str) -> bool {
        !goals(&self.named(id, "").0).is_empty()
    }

    pub fn cell<'a>(
        &'a self,
        id: &str,
        title: &str,
        kind: Kind,
        measure: impl FnMut(System) -> Measured + 'a,
    ) -> Cell<'a> {
        let rounds = if self.has_goals(id) {
            self.more_rounds
        } else {
            self.rounds
        };
        let (id, title) = self.named(id, title);
        Cell {
            id,
            title,
            kind,
            rounds,
            systems: System::ALL.to_vec(),
            measure: Box::new(measure),
        }
    }
}

/// What is done in a row: its rate and its processor time are measured.
#[derive(Clone)]
pub struct Load {
    pub id: String,
    pub title: String,
    pub job: Job,
    /// Of the rate.
    pub kind: Kind,
    /// Whose rate is measured.
    pub systems: Vec<System>,
    /// Each read of the disk takes 5 ms.
    pub slow: bool,
    /// All that is read was written before.
    pub again: bool,
}

impl Load {
    /// Over a base in which each read takes 5 ms.
    pub fn slow(self) -> Load {
        Load { slow: true, ..self }
    }

    /// The rate can't be more than the requests in flight by the time that a read of the
    /// base takes.
    pub fn of_limit(mut self) -> Load {
        self.kind = Kind::OfLimit(f64::from(self.job.depth) / DELAY.as_secs_f64());
        if !self.job.reads_only() {
            // Without a filter a write reads nothing, so the delay is not in it.
            self.systems.retain(|system| *system != System::NoFilter);
        }
        self
    }

    /// Whose processor time is measured.
    pub fn charged(&self) -> Vec<System> {
        if self.systems.contains(&System::Kept) {
            self.systems.clone()
        } else {
            System::CHARGED.to_vec()
        }
    }
}

/// Bytes that are neither zero nor alike from block to block; good enough not
/// to be compressed or merged by anything below.
pub fn random_file(path: &Path, size: u64) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut chunk = Vec::with_capacity(1 << 20);
    for _ in 0..size >> 20 {
        chunk.clear();
        while chunk.len() < 1 << 20 {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            chunk.extend(state.to_ne_bytes());
        }
        file.write_all(&chunk)?;
    }
    Ok(())
}
