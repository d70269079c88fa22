//! Throughput: requests per second under fio, and copies of a whole disk.
//!
//! Every cell starts a server of its own with a fresh overlay, so "fresh blocks"
//! are fresh in every cell. Where there is writing, "no filter" writes to a fresh
//! sparse file on the file system of the overlays: the same first write to a
//! block, without the filter. (In the mix its reads are of that file too, so they
//! find holes where the others find the disk's data.)

use std::time::Duration;

use super::command::{self, command};
use super::fio::Job;
use super::lab::{DISK, Lab, MEMORY, load};
use super::nbd::Request;
use super::runner::{self, Cell, Effort, Kind, Row};
use super::systems::{Setup, System};

impl Lab {
    /// Reads of what the same client has written before.
    fn read_again(&self) -> Cell<'_> {
        let size = self.size / 4;
        let job = Job {
            size,
            ..self.timed("reread-16", self.job("randread", 4096, 16))
        };
        let setup = Setup::disk(&self.disk).written();
        let data = vec![0x5a; 1 << 20];
        let title = "4K random read of what was written, 16 in flight";
        self.cell_with("reread-16", title, Kind::Rate, move |system| {
            let mut server = setup.start(system, self.place())?;
            let mut client = server.client()?;
            let writes = (0..size >> 20).map(|index| Request::Write {
                offset: index << 20,
                data: &data,
            });
            let written = client.all(writes, 4);
            written.map_err(|error| server.explain(error.to_string()))?;
            load(&job, &mut server)
        })
    }

    /// nbdcopy of the whole disk, seconds.
    fn copy(&self, inwards: bool) -> Cell<'_> {
        let (id, title) = if inwards {
            ("copy-in", "nbdcopy of the whole disk in")
        } else {
            ("copy-out", "nbdcopy of the whole disk out")
        };
        let setup = Setup::disk(&self.disk);
        let setup = if inwards { setup.written() } else { setup };
        self.cell_with(id, title, Kind::Time, move |system| {
            let mut server = setup.start(system, self.place())?;
            let mut nbdcopy = command("nbdcopy");
            if inwards {
                nbdcopy.arg(&self.disk).arg(server.uri());
            } else {
                nbdcopy.args([&server.uri(), "null:"]);
            }
            match command::run(&mut nbdcopy, Duration::from_secs(30)) {
                Ok((_, took)) => Ok(took.as_secs_f64()),
                Err(error) => Err(server.explain(error).into()),
            }
        })
    }
}

/// (id, title, fio's pattern, bytes, in flight)
type Shape = (&'static str, &'static str, &'static str, u64, u32);

const DEEP: [Shape; 7] = [
    ("read-4k", "4K random read", "randread", 4096, 16),
    (
        "write-4k",
        "4K random write, fresh blocks",
        "randwrite",
        4096,
        16,
    ),
    ("mix-4k", "4K random, 70 % reads", "randrw", 4096, 16),
    ("write-64k", "64K random write", "randwrite", 64 << 10, 16),
    ("read-1m", "1M sequential read", "read", 1 << 20, 4),
    ("write-1m", "1M sequential write", "write", 1 << 20, 4),
    ("write-512", "512-byte random write", "randwrite", 512, 16),
];

fn shapes<'a>(lab: &'a Lab, depth: Option<u32>, ids: &[&str]) -> Vec<Cell<'a>> {
    let wanted = DEEP
        .iter()
        .filter(|(id, ..)| ids.is_empty() || ids.contains(id));
    wanted
        .map(|&(id, title, pattern, block, deep)| {
            let depth = depth.unwrap_or(deep);
            let title = format!("{title}, {depth} in flight");
            lab.cell(
                &format!("{id}-{depth}"),
                &title,
                lab.job(pattern, block, depth),
            )
        })
        .collect()
}

/// As much in flight as over one connection, in all.
fn four_connections(lab: &Lab) -> Vec<Cell<'_>> {
    let cell = |&(id, title, pattern, block, deep): &Shape| {
        let depth = deep / 4;
        let title = format!("{title}, 4 connections with {depth} in flight each");
        let job = Job {
            connections: 4,
            ..lab.job(pattern, block, depth)
        };
        lab.cell(&format!("{id}-4x{depth}"), &title, job)
    };
    DEEP.iter().map(cell).collect()
}

/// Client and server on one core: where the scheduler puts its threads is not in
/// these, so they vary least, and are what a request costs the processor.
fn on_one_core(lab: &Lab) -> Vec<Cell<'_>> {
    let mut cells = Vec::new();
    let ids = ["read-4k", "write-4k", "read-1m"];
    for &(id, title, pattern, block, depth) in DEEP.iter().filter(|shape| ids.contains(&shape.0)) {
        let job = Job {
            one_core: true,
            ..lab.job(pattern, block, depth)
        };
        let title = format!("{title}, {depth} in flight, all on one core");
        let mut cell = lab.cell(&format!("{id}-one-core"), &title, job);
        // How far behind the others are, the rows on two cores say.
        cell.systems = vec![System::Ours, System::NoFilter, System::C4K];
        cells.push(cell);
    }
    cells
}

fn over_a_slow_base(lab: &Lab) -> Vec<Cell<'_>> {
    vec![
        lab.slow(
            "slow-read-4k",
            "4K random read over a 5 ms base, 16 in flight",
            lab.job("randread", 4096, 16),
        ),
        lab.slow(
            "slow-write-512",
            "512-byte random write over a 5 ms base, 16 in flight",
            lab.job("randwrite", 512, 16),
        ),
    ]
}

/// A whole-block write reads nothing of the base, so there is no limit to
/// compare with: the ratio to "no filter", whose reads take 5 ms as well, shows
/// who reads more than the client does.
fn whole_blocks_over_a_slow_base(lab: &Lab) -> Vec<Cell<'_>> {
    let rows = [
        ("slow-write-4k", "4K random write", "randwrite"),
        ("slow-mix-4k", "4K random, 70 % reads", "randrw"),
    ];
    rows.map(|(id, what, pattern)| {
        let job = lab.job(pattern, 4096, 16);
        let setup = lab.setup(&job).slow();
        let title = format!("{what} over a 5 ms base, 16 in flight");
        lab.load(id, &title, Kind::Rate, setup, job)
    })
    .into()
}

/// All the throughput rows with their files on tmpfs.
pub fn on_memory(effort: &Effort) -> Result<Vec<Row>, String> {
    let lab = Lab::new(MEMORY, effort)?;
    let mut cells;
    if effort.quick {
        let ids = ["read-4k", "write-4k", "read-1m", "write-1m", "write-512"];
        cells = shapes(&lab, None, &ids);
    } else {
        cells = shapes(&lab, None, &[]);
        let mut one_in_flight = shapes(&lab, Some(1), &[]);
        for cell in &mut one_in_flight {
            // How far behind it is, the rows with more in flight say; the whole has to
            // end in ten minutes.
            cell.systems.retain(|system| *system != System::Qemu);
        }
        cells.extend(one_in_flight);
        cells.extend(four_connections(&lab));
        cells.extend(whole_blocks_over_a_slow_base(&lab));
        cells.push(lab.read_again());
    }
    cells.extend(on_one_core(&lab));
    cells.extend(over_a_slow_base(&lab));
    cells.push(lab.copy(false));
    cells.push(lab.copy(true));
    Ok(runner::run(cells))
}

/// The few that say most, with their files on the disk's file system.
pub fn on_disk(effort: &Effort) -> Result<Vec<Row>, String> {
    let lab = Lab::new(DISK, effort)?;
    let ids: &[&str] = if effort.quick {
        &["write-4k"]
    } else {
        &["read-4k", "write-4k", "write-1m"]
    };
    Ok(runner::run(shapes(&lab, None, ids)))
}
