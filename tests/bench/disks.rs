//! What depends on the size of the disk: start-up, memory, and zeroing or
//! trimming all of it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::lab::scratch_in_memory;
use super::nbd::Request;
use super::runner::{self, Cell, Effort, Failure, Kind, Measured, ONCE, Row, Spread};
use super::server::Server;
use super::systems::{Setup, System, sparse};

const MIB: f64 = (1 << 20) as f64;
const SIZES: [(&str, u64); 4] = [
    ("1G", 1 << 30),
    ("1T", 1 << 40),
    ("1P", 1 << 50),
    ("7E", 7 << 60),
];
const WHOLE: u64 = 16 << 40;
/// One request of a client that discards a whole disk.
const STEP: u64 = 2 << 30;

/// A start-up that takes less is measured three times.
const LONG: Duration = Duration::from_millis(100);

/// Why there is no figure of a request that a server does not take.
pub const NOT_OFFERED: &str = "does not offer such requests to its clients";

#[derive(Clone, Copy, PartialEq)]
enum Discard {
    Zero,
    Trim,
}

pub fn all(effort: &Effort) -> Result<Vec<Row>, String> {
    let scratch = scratch_in_memory()?;
    let place = scratch.path();
    let mut cells = Vec::new();
    for (name, size) in SIZES {
        let disk = place.join(name);
        sparse(&disk, size)?;
        cells.extend(start_up_and_memory(name, &disk, place));
    }
    let whole = place.join("16T");
    sparse(&whole, WHOLE)?;
    let patience = Duration::from_secs(if effort.quick { 1 } else { 2 });
    cells.push(discard(Discard::Zero, &whole, place, patience));
    cells.push(discard(Discard::Trim, &whole, place, patience));
    for cell in &mut cells {
        cell.rounds = effort.rounds;
    }
    let mut rows = runner::run(cells);
    rows.extend(left_behind(&whole, place));
    Ok(rows)
}

fn amount<'a>(
    id: String,
    title: String,
    unit: &'static str,
    measure: impl FnMut(System) -> Measured + 'a,
) -> Cell<'a> {
    Cell {
        id,
        title,
        kind: Kind::Amount(unit),
        rounds: 1,
        systems: System::ALL.to_vec(),
        measure: Box::new(measure),
    }
}

/// Two cells, which share a server: where a start takes seconds, one a round will do.
fn start_up_and_memory<'a>(name: &str, disk: &Path, place: &'a Path) -> [Cell<'a>; 2] {
    let setup = Setup::disk(disk);
    let started: Rc<RefCell<BTreeMap<System, Result<Server, String>>>> = Rc::default();
    let keep = Rc::clone(&started);
    let title = format!("start-up, {name} disk");
    let start = amount(format!("start-{name}"), title, "ms", move |system| {
        let mut times = Vec::new();
        for _ in 0..3 {
            let server = setup.start(system, place);
            let took = server.as_ref().map(|server| server.start_up);
            let took = took.map_err(|reason| Failure::Always(reason.clone()));
            keep.borrow_mut().insert(system, server);
            let took = took?;
            times.push(took.as_secs_f64() * 1e3);
            if took > LONG {
                break;
            }
        }
        Ok(Spread::of(times).expect("a time").median)
    });
    let title = format!("memory with one client, untouched {name} disk");
    let memory = amount(format!("memory-{name}"), title, "MiB", move |system| {
        let server = started.borrow_mut().remove(&system);
        let once = || Failure::NotAsked(ONCE.into());
        let server = server.ok_or_else(once)?.map_err(Failure::Always)?;
        let mut client = server.client()?;
        // A request, so that the connection is as far as it goes.
        let request = Request::Read {
            offset: 0,
            length: 4096,
        };
        client
            .all([request], 1)
            .map_err(|error| error.to_string())?;
        Ok(server.memory()? as f64 / MIB)
    });
    [start, memory]
}

fn discard<'a>(kind: Discard, disk: &Path, place: &'a Path, patience: Duration) -> Cell<'a> {
    let disk: PathBuf = disk.into();
    let (id, title) = match kind {
        Discard::Zero => ("zero-16T", "zero of a whole 16T disk"),
        Discard::Trim => ("trim-16T", "trim of a whole 16T disk"),
    };
    amount(id.into(), title.into(), "s", move |system| {
        // "No filter" is given a file of its own: it takes the space out of it.
        let mut server = Setup::disk(&disk).written().start(system, place)?;
        let time = discard_all(&mut server, kind, patience)?;
        Ok(time.as_secs_f64())
    })
}

fn discard_all(
    server: &mut Server,
    kind: Discard,
    patience: Duration,
) -> Result<Duration, Failure> {
    let mut client = server.client()?;
    let offered = match kind {
        Discard::Zero => client.can_zero(),
        Discard::Trim => client.can_trim(),
    };
    if !offered {
        return Err(Failure::Always(NOT_OFFERED.into()));
    }
    client.limit(patience);
    let requests = (0..WHOLE / STEP).map(|index| {
        let (offset, length) = (index * STEP, STEP as u32);
        match kind {
            Discard::Zero => Request::Zero { offset, length },
            Discard::Trim => Request::Trim { offset, length },
        }
    });
    let start = Instant::now();
    match client.all(requests, 16) {
        Ok(()) => Ok(start.elapsed()),
        Err(error) if is_too_slow(&error) => Err(Failure::Always(format!(
            "not done after {} s",
            patience.as_secs()
        ))),
        Err(error) => Err(server.explain(error.to_string()).into()),
    }
}

/// Also where no reply at all came for as long as the socket waits.
pub fn is_too_slow(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{TimedOut, WouldBlock};
    matches!(error.kind(), TimedOut | WouldBlock)
}

/// What a disk that was wholly zeroed or trimmed takes.
fn left_behind(disk: &Path, place: &Path) -> [Row; 2] {
    let mut rows = [
        Row::single(
            "memory-whole",
            "memory for a disk wholly zeroed or trimmed in 2G requests, per TiB",
            "MiB",
            &[],
        ),
        Row::single(
            "space-whole",
            "space that the overlay takes after zero or trim of 16T",
            "MiB",
            &[],
        ),
    ];
    let mut taken = [0.0f64; 2];
    for kind in [Discard::Zero, Discard::Trim] {
        match takes_after(kind, disk, place) {
            Ok(now) => taken = [0, 1].map(|index| taken[index].max(now[index])),
            Err(Failure::ThisTime(why) | Failure::Always(why) | Failure::NotAsked(why)) => {
                for row in &mut rows {
                    row.failed(System::Ours, why.clone());
                }
            }
        }
    }
    for (row, taken) in rows.iter_mut().zip(taken) {
        if row.failures.is_empty() {
            row.figures.insert(System::Ours, vec![Some(taken)]);
        }
    }
    rows
}

/// (memory per TiB, space), in MiB.
fn takes_after(kind: Discard, disk: &Path, place: &Path) -> Result<[f64; 2], Failure> {
    let mut server = Setup::disk(disk).start(System::Ours, place)?;
    let before = server.memory()?;
    // So that there is something to give back, and to see that it would be seen.
    let data = [0x5a; 64 << 10];
    let write = Request::Write {
        offset: 0,
        data: &data,
    };
    let written = server.client()?.all([write], 1);
    written.map_err(|error| server.explain(error.to_string()))?;
    if server.overlay_bytes()? < data.len() as u64 {
        return Err("what was written to the overlay is not seen in it".into());
    }
    discard_all(&mut server, kind, Duration::from_secs(20))?;
    let memory = server.memory()?.saturating_sub(before);
    let space = server.overlay_bytes()?;
    Ok([memory as f64 / MIB / 16.0, space as f64 / MIB])
}
