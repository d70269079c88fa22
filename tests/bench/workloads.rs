//! Throughput: requests per second under fio, what each of them costs the processor,
//! and copies of a whole disk.
//!
//! Every rate starts a server of its own with a fresh overlay, so "fresh blocks"
//! are fresh in every one. Where there is writing, "no filter" writes to a fresh
//! sparse file on the file system of the overlays: the same first write to a
//! block, without the filter. (In the mix its reads are of that file too, so they
//! find holes where the others find the disk's data.)

use std::time::Duration;

use super::command::{self, command};
use super::fio::Job;
use super::lab::{DISK, Lab, Load, MEMORY};
use super::processor;
use super::runner::{self, Cell, Effort, Kind, Row};
use super::systems::{Setup, System};

/// (id, title, fio's pattern, bytes, in flight)
type Shape = (&'static str, &'static str, &'static str, u64, u32);

const SHAPES: [Shape; 10] = [
    ("read-4k", "4K random read", "randread", 4096, 16),
    (
        "write-4k",
        "4K random write, fresh blocks",
        "randwrite",
        4096,
        16,
    ),
    ("mix-4k", "4K random, 70 % reads", "randrw", 4096, 16),
    ("read-64k", "64K random read", "randread", 64 << 10, 16),
    ("write-64k", "64K random write", "randwrite", 64 << 10, 16),
    ("read-256k", "256K random read", "randread", 256 << 10, 8),
    ("write-256k", "256K random write", "randwrite", 256 << 10, 8),
    ("read-1m", "1M sequential read", "read", 1 << 20, 4),
    ("write-1m", "1M sequential write", "write", 1 << 20, 4),
    ("write-512", "512-byte random write", "randwrite", 512, 16),
];

/// What is loaded in a run that shows that it works.
const QUICK: [&str; 5] = ["read-4k", "write-4k", "read-1m", "write-1m", "write-512"];

/// Where one is in flight, and over four connections, a few say it all.
const ONE_IN_FLIGHT: [&str; 3] = ["read-4k", "write-4k", "write-512"];
const FOUR_CONNECTIONS: [&str; 3] = ["read-4k", "write-4k", "write-1m"];

/// Whose rate is measured too. Those left out lie between two others.
fn has_rate(on_disk: bool, load: &Load) -> bool {
    let id = load.id.as_str();
    if on_disk {
        ["read-4k-16", "write-4k-16", "write-1m-4"].contains(&id)
    } else {
        !["read-64k-16", "read-256k-8", "write-256k-8"].contains(&id)
    }
}

fn shapes(wanted: impl Fn(&str) -> bool) -> impl Iterator<Item = Shape> {
    SHAPES.into_iter().filter(move |(id, ..)| wanted(id))
}

fn loads(lab: &Lab, depth: Option<u32>, wanted: impl Fn(&str) -> bool) -> Vec<Load> {
    shapes(wanted)
        .map(|(id, title, pattern, block, deep)| {
            let depth = depth.unwrap_or(deep);
            let title = format!("{title}, {depth} in flight");
            let job = lab.job(pattern, block, depth);
            lab.load(&format!("{id}-{depth}"), &title, job)
        })
        .collect()
}

fn one_in_flight(lab: &Lab) -> Vec<Load> {
    let mut loads = loads(lab, Some(1), |id| ONE_IN_FLIGHT.contains(&id));
    for load in &mut loads {
        // How far behind it is, the rows with more in flight say; the whole has to
        // end in ten minutes.
        load.systems.retain(|system| *system != System::Qemu);
    }
    loads
}

/// As much in flight as over one connection, in all.
fn four_connections(lab: &Lab) -> Vec<Load> {
    shapes(|id| FOUR_CONNECTIONS.contains(&id))
        .map(|(id, title, pattern, block, deep)| {
            let depth = deep / 4;
            let title = format!("{title}, 4 connections with {depth} in flight each");
            let job = Job {
                connections: 4,
                ..lab.job(pattern, block, depth)
            };
            lab.load(&format!("{id}-4x{depth}"), &title, job)
        })
        .collect()
}

fn over_a_slow_base(lab: &Lab) -> Vec<Load> {
    let read = lab.load(
        "slow-read-4k",
        "4K random read over a 5 ms base, 16 in flight",
        lab.job("randread", 4096, 16),
    );
    let write = lab.load(
        "slow-write-512",
        "512-byte random write over a 5 ms base, 16 in flight",
        lab.job("randwrite", 512, 16),
    );
    vec![read.slow().of_limit(), write.slow().of_limit()]
}

/// A whole-block write reads nothing of the base, so there is no limit to
/// compare with: the ratio to "no filter", whose reads take 5 ms as well, shows
/// who reads more than the client does.
fn whole_blocks_over_a_slow_base(lab: &Lab) -> Vec<Load> {
    let rows = [
        ("slow-write-4k", "4K random write", "randwrite"),
        ("slow-mix-4k", "4K random, 70 % reads", "randrw"),
    ];
    rows.map(|(id, what, pattern)| {
        let title = format!("{what} over a 5 ms base, 16 in flight");
        lab.load(id, &title, lab.job(pattern, 4096, 16)).slow()
    })
    .into()
}

/// Reads of what the same client has written before.
fn reads_again(lab: &Lab) -> Load {
    let job = Job {
        size: lab.size / 4,
        ..lab.job("randread", 4096, 16)
    };
    let title = "4K random read of what was written, 16 in flight";
    Load {
        again: true,
        ..lab.load("reread-16", title, job)
    }
}

/// nbdcopy of the whole disk, seconds.
fn copy(lab: &Lab, inwards: bool) -> Cell<'_> {
    let (id, title) = if inwards {
        ("copy-in", "nbdcopy of the whole disk in")
    } else {
        ("copy-out", "nbdcopy of the whole disk out")
    };
    let setup = Setup::disk(&lab.disk);
    let setup = if inwards { setup.written() } else { setup };
    lab.cell(id, title, Kind::Time, move |system| {
        let mut server = setup.start(system, lab.place())?;
        let mut nbdcopy = command("nbdcopy");
        if inwards {
            nbdcopy.arg(&lab.disk).arg(server.uri());
        } else {
            nbdcopy.args([&server.uri(), "null:"]);
        }
        match command::run(&mut nbdcopy, Duration::from_secs(30)) {
            Ok((_, took)) => Ok(took.as_secs_f64()),
            Err(error) => Err(server.explain(error).into()),
        }
    })
}

/// All the throughput rows with their files on tmpfs.
pub fn on_memory(effort: &Effort) -> Result<Vec<Row>, String> {
    let lab = Lab::new(MEMORY, effort)?;
    let mut all;
    if effort.quick {
        all = loads(&lab, None, |id| QUICK.contains(&id));
    } else {
        all = loads(&lab, None, |_| true);
        all.extend(one_in_flight(&lab));
        all.extend(four_connections(&lab));
        all.extend(whole_blocks_over_a_slow_base(&lab));
        all.push(reads_again(&lab));
    }
    all.extend(over_a_slow_base(&lab));
    let mut rows = rows(&lab, &all, false)?;
    rows.extend(runner::run(vec![copy(&lab, false), copy(&lab, true)]));
    Ok(rows)
}

/// The whole blocks, with their files on the disk's file system.
pub fn on_disk(effort: &Effort) -> Result<Vec<Row>, String> {
    let lab = Lab::new(DISK, effort)?;
    let wanted = |id: &str| match effort.quick {
        true => id == "write-4k",
        false => !["mix-4k", "write-512"].contains(&id),
    };
    rows(&lab, &loads(&lab, None, wanted), true)
}

fn rows(lab: &Lab, loads: &[Load], on_disk: bool) -> Result<Vec<Row>, String> {
    let rated = loads.iter().filter(|load| has_rate(on_disk, load));
    let mut rows = runner::run(rated.map(|load| lab.rate(load)).collect());
    rows.extend(processor::rows(lab, loads)?);
    Ok(rows)
}
