//! What it costs the other clients when one of them discards.
//!
//! One client trims or zeroes a large part of the disk, while another overwrites 4K
//! blocks elsewhere, one after the other. A server may do the work before it answers,
//! and let the other client wait, or afterwards. So the writes are watched until both
//! the answer and the space are there, and beside them are those to the same server
//! before, when nothing else went on.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::syncfs;

use super::disks::{NOT_OFFERED, is_too_slow};
use super::lab::{DISK, MEMORY, scratch};
use super::nbd::{Client, Request};
use super::processor::scattered;
use super::runner::{self, Cell, Effort, Failure, Kind, Measured, ONCE, Row};
use super::server::Server;
use super::systems::{Setup, System, sparse};

const BLOCK: u64 = 4096;
const MIB: u64 = 1 << 20;

/// What is discarded lies below this, what the other client writes to above.
const HALF: u64 = 2 << 30;
/// The other client's part of the disk: written before, so that its writes take no
/// space, and in several of the filter's areas.
const ELSEWHERE: u64 = 16 * MIB;

/// For an answer, and again for the space.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the quiet disk is watched, and at least the busy one.
const WATCHED: Duration = Duration::from_millis(500);

/// Without the C filter at 64K, which stores 16 times as much, and with 4K
/// does the same.
const SYSTEMS: [System; 5] = [
    System::Ours,
    System::NoFilter,
    System::Kept,
    System::C4K,
    System::Qemu,
];

pub fn all(effort: &Effort) -> Result<Vec<Row>, String> {
    let shrink = if effort.quick { 16 } else { 1 };
    let pieces = 2048 / shrink;
    let mut rows = rows(
        "reclaim-trim",
        &format!("trim of {pieces} stored blocks of 4K, on disk"),
        Discard::Pieces(pieces),
        DISK,
        effort,
    )?;
    let length = HALF / shrink;
    rows.extend(self::rows(
        "reclaim-zero",
        &format!("zero of {}M that is to take space", length / MIB),
        Discard::Untouched(length),
        MEMORY,
        effort,
    )?);
    Ok(rows)
}

#[derive(Clone, Copy)]
enum Discard {
    /// A trim of so many blocks that are stored, in one request.
    Pieces(u64),
    /// A zero of so many bytes that were not written to, which may not make a hole.
    Untouched(u64),
}

/// What is found in one go, in seconds.
struct Found {
    answer: f64,
    longest: f64,
    longest_before: f64,
    space: Option<f64>,
}

/// The first of the cells does it all; the others show what was found besides.
type Shared = Rc<RefCell<BTreeMap<(&'static str, System), Measured>>>;

fn rows(
    id: &str,
    title: &str,
    discard: Discard,
    place: &str,
    effort: &Effort,
) -> Result<Vec<Row>, String> {
    let scratch = scratch(place)?;
    let disk = scratch.path().join("disk.img");
    sparse(&disk, 2 * HALF)?;
    let setup = Setup::disk(&disk).written();
    let found = Shared::default();
    let keep = Rc::clone(&found);
    let first = move |system| -> Measured {
        let now = discard.once(&setup, system, scratch.path());
        let mut found = keep.borrow_mut();
        let mut keep = |part, figure: fn(&Found) -> Measured| {
            let figure = now.as_ref().map_err(Failure::clone).and_then(figure);
            found.insert((part, system), figure);
        };
        keep("longest", |now| Ok(now.longest * 1e3));
        keep("before", |now| Ok(now.longest_before * 1e3));
        keep("space", |now| {
            now.space.ok_or(Failure::NotAsked(KEEPS.into()))
        });
        Ok(now?.answer * 1e3)
    };
    let cell = |id: String, title, unit, measure| Cell {
        id,
        title,
        kind: Kind::Amount(unit),
        rounds: effort.rounds,
        systems: SYSTEMS.to_vec(),
        measure,
    };
    let mut cells = vec![cell(id.into(), title.into(), "ms", Box::new(first) as _)];
    let mut others = vec![
        (
            "longest",
            "the longest write of another client meanwhile",
            "ms",
        ),
        ("before", "the longest before", "ms"),
    ];
    if let Discard::Pieces(_) = discard {
        others.push(("space", "until the space is back", "s"));
    }
    for (part, title, unit) in others {
        let found = Rc::clone(&found);
        let measure = move |system| {
            let figure = found.borrow_mut().remove(&(part, system));
            figure.unwrap_or(Err(Failure::NotAsked(ONCE.into())))
        };
        let id = format!("{id}-{part}");
        cells.push(cell(id, title.into(), unit, Box::new(measure)));
    }
    Ok(runner::run(cells))
}

/// Why there is no time until the space is back.
const KEEPS: &str = "does not give the space back";

impl Discard {
    fn once(self, setup: &Setup, system: System, place: &Path) -> Result<Found, Failure> {
        let mut server = setup.start(system, place)?;
        let mut client = server.client()?;
        let offered = match self {
            Discard::Pieces(_) => client.can_trim(),
            Discard::Untouched(_) => client.can_zero(),
        };
        if !offered {
            return Err(Failure::Always(NOT_OFFERED.into()));
        }
        let found = self.watched(&mut client, &server, system, place);
        found.map_err(|error| {
            if is_too_slow(&error) {
                let reason = format!("not done after {} s", PATIENCE.as_secs());
                Failure::Always(reason)
            } else {
                server.explain(error.to_string()).into()
            }
        })
    }

    fn watched(
        self,
        client: &mut Client,
        server: &Server,
        system: System,
        place: &Path,
    ) -> io::Result<Found> {
        self.store(client, place)?;
        let mut other = server.client().map_err(io::Error::other)?;
        let enough = Instant::now() + WATCHED;
        let longest_before = longest_write(&mut other, || Instant::now() < enough)?;
        let stored = server.overlay_bytes().map_err(io::Error::other)?;

        let done = AtomicBool::new(false);
        let start = Instant::now();
        thread::scope(|scope| {
            let writes = scope.spawn(|| {
                let on = || !done.load(Ordering::Relaxed) || start.elapsed() < WATCHED;
                longest_write(&mut other, on)
            });
            let discarded = self.discard(client, server, system, stored);
            // However that went: or the other thread would never end.
            done.store(true, Ordering::Relaxed);
            let longest = writes.join().expect("a client does not panic");
            let (answer, space) = discarded?;
            Ok(Found {
                answer,
                longest: longest?,
                longest_before,
                space,
            })
        })
    }

    /// What has to be in the overlay before, on the disk if it is one.
    fn store(self, client: &mut Client, place: &Path) -> io::Result<()> {
        let data = vec![0x5a; MIB as usize];
        let writes = (0..ELSEWHERE / MIB).map(|index| Request::Write {
            offset: HALF + index * MIB,
            data: &data,
        });
        client.all(writes, 4)?;
        if let Discard::Pieces(pieces) = self {
            let writes = (0..pieces).map(|index| Request::Write {
                offset: scattered(index, pieces) * (HALF / pieces),
                data: &data[..BLOCK as usize],
            });
            client.all(writes, 16)?;
        }
        client.all([Request::Flush], 1)?;
        // A temporary overlay does nothing in a flush, and what was never on the disk
        // is given back at once.
        Ok(syncfs(File::open(place)?)?)
    }

    /// The seconds until the answer, and until the overlay, which has taken `stored`
    /// bytes, takes less by what was discarded.
    fn discard(
        self,
        client: &mut Client,
        server: &Server,
        system: System,
        stored: u64,
    ) -> io::Result<(f64, Option<f64>)> {
        client.limit(PATIENCE);
        let start = Instant::now();
        let (request, back) = match self {
            Discard::Pieces(pieces) => {
                let (offset, length) = (0, HALF as u32);
                (Request::Trim { offset, length }, pieces * BLOCK)
            }
            Discard::Untouched(length) => {
                let (offset, length) = (0, length as u32);
                (Request::ZeroNoHole { offset, length }, 0)
            }
        };
        client.all([request], 1)?;
        let answer = start.elapsed();
        // This filter may be about it still; from the others nothing is to come.
        let afterwards = matches!(system, System::Ours | System::Kept);
        while server.overlay_bytes().map_err(io::Error::other)? + back > stored {
            if back == 0 || !afterwards {
                return Ok((answer.as_secs_f64(), None));
            }
            if start.elapsed() > answer + PATIENCE {
                return Err(io::ErrorKind::TimedOut.into());
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok((answer.as_secs_f64(), Some(start.elapsed().as_secs_f64())))
    }
}

/// Overwrites blocks elsewhere, one after the other, and gives the seconds that the
/// longest took.
fn longest_write(client: &mut Client, on: impl Fn() -> bool) -> io::Result<f64> {
    client.limit(2 * PATIENCE);
    let data = [0xa5; BLOCK as usize];
    let blocks = ELSEWHERE / BLOCK;
    let mut longest = Duration::ZERO;
    for index in 0.. {
        if !on() {
            break;
        }
        let offset = HALF + scattered(index, blocks) * BLOCK;
        let start = Instant::now();
        client.all(
            [Request::Write {
                offset,
                data: &data,
            }],
            1,
        )?;
        longest = longest.max(start.elapsed());
    }
    Ok(longest.as_secs_f64())
}
