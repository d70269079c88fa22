//! Maps: block status over the whole disk.
//!
//! A fragmented map has nothing to be compared with: the file below is not
//! fragmented, and a file that is would measure the file system. The reference is
//! what nbdkit itself takes to send as many extents: a plugin of a few lines (for
//! nbdkit's `cc`) whose every second block is a hole, and which computes them in
//! the time that the calls to `nbdkit_add_extent` take.

use std::path::Path;
use std::time::{Duration, Instant};

use super::lab::{MEMORY, room, scratch_in_memory};
use super::nbd::Request;
use super::runner::{self, Cell, Effort, Failure, Kind, Measured, Row, Spread};
use super::server::Server;
use super::systems::{Setup, System, sparse};

/// Longer than any map should take; the C filter at 4K blocks takes seconds.
const PATIENCE: Duration = Duration::from_secs(15);
/// A map that takes less is made several times.
const SHORT: Duration = Duration::from_millis(200);
const BLOCK: u64 = 4096;

const ALTERNATING: &str = r#"
#include <string.h>
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>
#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
static void *alternating_open (int readonly) { return NBDKIT_HANDLE_NOT_NEEDED; }
static int64_t alternating_get_size (void *handle) { return SIZE; }
static int alternating_can_extents (void *handle) { return 1; }
static int
alternating_pread (void *handle, void *buf, uint32_t count, uint64_t offset,
                   uint32_t flags)
{
  memset (buf, 0, count);
  return 0;
}
static int
alternating_extents (void *handle, uint32_t count, uint64_t offset,
                     uint32_t flags, struct nbdkit_extents *extents)
{
  uint64_t block = offset / 4096, end = (offset + count + 4095) / 4096;
  for (; block < end; block++) {
    uint32_t type = block % 2 ? NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO : 0;
    if (nbdkit_add_extent (extents, block * 4096, 4096, type) == -1)
      return -1;
  }
  return 0;
}
static struct nbdkit_plugin plugin = {
  .name = "alternating",
  .open = alternating_open,
  .get_size = alternating_get_size,
  .can_extents = alternating_can_extents,
  .pread = alternating_pread,
  .extents = alternating_extents,
};
NBDKIT_REGISTER_PLUGIN (plugin)
"#;

pub fn all(effort: &Effort) -> Result<Vec<Row>, String> {
    let mut rows = vec![sparse_disk(effort)?];
    rows.push(fragmented(effort)?);
    Ok(rows)
}

/// The median time of a whole map in seconds, and how many extents it has.
fn map(server: &mut Server) -> Result<(f64, u64), Failure> {
    let (mut times, mut extents) = (Vec::new(), 0);
    for _ in 0..5 {
        let mut client = server.client()?;
        client.limit(PATIENCE);
        let start = Instant::now();
        extents = match client.map() {
            Ok(extents) => extents,
            Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {
                let reason = format!("not done after {} s", PATIENCE.as_secs());
                return Err(Failure::Always(reason));
            }
            Err(error) => return Err(server.explain(error.to_string()).into()),
        };
        let took = start.elapsed();
        times.push(took.as_secs_f64());
        if took > SHORT {
            break;
        }
    }
    let median = Spread::of(times).expect("a time").median;
    Ok((median, extents))
}

fn sparse_disk(effort: &Effort) -> Result<Row, String> {
    let scratch = scratch_in_memory()?;
    let disk = scratch.path().join("disk.img");
    sparse(&disk, 1 << 40)?;
    let setup = Setup::disk(&disk);
    let cell = Cell {
        id: "map-1T".into(),
        title: "map of a sparse 1T disk".into(),
        kind: Kind::Time,
        rounds: effort.rounds,
        systems: System::ALL.to_vec(),
        measure: Box::new(|system| {
            let mut server = setup.start(system, scratch.path())?;
            Ok(map(&mut server)?.0)
        }),
    };
    Ok(runner::run_one(cell))
}

/// Half of the disk has to fit into memory, once; on a small machine the
/// disk is smaller.
fn fragmented_size(effort: &Effort) -> Result<u64, String> {
    Ok(match room(MEMORY)? >> 30 {
        _ if effort.quick => 1 << 30,
        12.. => 16 << 30,
        _ => 2 << 30,
    })
}

/// Only systems with blocks of 4K: larger blocks are all written, and the
/// map is one extent.
fn fragmented(effort: &Effort) -> Result<Row, String> {
    let scratch = scratch_in_memory()?;
    let place = scratch.path();
    let size = fragmented_size(effort)?;
    let mut row = fragmented_beside(System::Ours, size, effort, place)?;
    // On a disk of its own, which is small: two large ones may not fit into
    // memory, and a ratio is the same per extent.
    let theirs = fragmented_beside(System::C4K, 1 << 30, effort, place)?;
    let scaled = scaled(&theirs, &row);
    row.figures.insert(System::C4K, scaled);
    row.failures.extend(theirs.failures);
    row.note(System::C4K, "measured in the same way on a 1G disk");
    for system in [System::CDefault, System::Qemu] {
        row.note(
            system,
            "not comparable: its blocks are larger, so all of the disk is written",
        );
    }
    Ok(row)
}

/// The C filter's figures as they would be on the disk of `row`, by what "no filter"
/// took for both in the same round.
fn scaled(theirs: &Row, row: &Row) -> Vec<Option<f64>> {
    let filter = theirs.figures[&System::C4K].iter();
    let beside = theirs.figures[&System::NoFilter].iter();
    let rounds = filter.zip(beside).zip(&row.figures[&System::NoFilter]);
    rounds
        .map(|((filter, beside), here)| Some((*filter)? / (*beside)? * (*here)?))
        .collect()
}

fn fragmented_beside(
    system: System,
    size: u64,
    effort: &Effort,
    place: &Path,
) -> Result<Row, String> {
    let disk = place.join("disk.img");
    sparse(&disk, size)?;
    let mut server = Setup::disk(&disk).start(system, place)?;
    write_every_second_block(&mut server, size)?;
    let mut beside = reference(place, size)?.start(System::NoFilter, place)?;
    let expected = size / BLOCK;
    let cell = Cell {
        id: "map-fragmented".into(),
        title: format!("map of {}G with every second 4K block written", size >> 30),
        kind: Kind::Time,
        rounds: effort.rounds,
        systems: vec![system, System::NoFilter],
        measure: Box::new(|asked| {
            let from = if asked == system {
                &mut server
            } else {
                &mut beside
            };
            let (time, extents) = map(from)?;
            if extents == expected {
                Ok(time) as Measured
            } else {
                Err(format!("{extents} extents instead of {expected}").into())
            }
        }),
    };
    Ok(runner::run_one(cell))
}

fn reference(place: &Path, size: u64) -> Result<Setup, String> {
    let source = place.join("alternating.c");
    std::fs::write(&source, ALTERNATING).map_err(|error| format!("a plugin: {error}"))?;
    let flags = format!("EXTRA_CFLAGS=-O2 -DSIZE={size}");
    Ok(Setup::plugin(&[
        "cc",
        &source.display().to_string(),
        &flags,
    ]))
}

fn write_every_second_block(server: &mut Server, size: u64) -> Result<(), String> {
    let data = [0x5a; BLOCK as usize];
    let writes = (0..size / BLOCK).step_by(2).map(|block| Request::Write {
        offset: block * BLOCK,
        data: &data,
    });
    let mut client = server.client()?;
    client
        .all(writes, 16)
        .map_err(|error| server.explain(error.to_string()))
}
