//! The start with an image, by the size of the disk and by what was written to it.

use std::path::Path;

use super::kept::{BLOCK, make_image};
use super::lab::{DISK, MEMORY, scratch};
use super::nbd::Request;
use super::runner::{self, Cell, Effort, Kind, Measured, Row, Spread};
use super::systems::{Setup, System, sparse};

const TIB: u64 = 1 << 40;

/// Where the image lies, the size of the disk in TiB, and what that is called. (ext4 has
/// files of up to 16 TiB.)
const DISKS: [(&str, u64, &str); 5] = [
    (MEMORY, 1, "1T"),
    (MEMORY, 64, "64T"),
    (MEMORY, 1024, "1P"),
    (DISK, 1, "1T"),
    (DISK, 15, "15T"),
];

pub fn all(effort: &Effort) -> Result<Vec<Row>, String> {
    let mut rows = Vec::new();
    for (place, tebibytes, name) in DISKS {
        if effort.quick && place == DISK {
            continue;
        }
        rows.extend(of_size(place, tebibytes * TIB, name, effort)?);
    }
    rows.push(one_percent(effort)?);
    Ok(rows)
}

/// The median time of some starts, in milliseconds, until a client has connected.
fn start_up(setup: &Setup, system: System, place: &Path) -> Measured {
    let mut times = Vec::new();
    for _ in 0..3 {
        let server = setup.start(system, place)?;
        times.push(server.start_up.as_secs_f64() * 1e3);
    }
    Ok(Spread::of(times).expect("a time").median)
}

fn of_size(place: &str, size: u64, name: &str, effort: &Effort) -> Result<[Row; 2], String> {
    let (prefix, suffix) = match place {
        DISK => ("disk-", ", on disk"),
        _ => ("", ""),
    };
    let scratch = scratch(place)?;
    let place = scratch.path();
    let disk = place.join("disk.img");
    sparse(&disk, size)?;
    let (new, written) = (place.join("new.qcow2"), place.join("written.qcow2"));
    let with = |image| Setup::disk(&disk).resuming(image);
    with(&new).start(System::Kept, place)?.stop();
    let server = with(&written).start(System::Kept, place)?;
    let write = Request::Write {
        offset: size / 3 / BLOCK * BLOCK,
        data: &[0x5a; BLOCK as usize],
    };
    let sent = server.client()?.all([write], 1);
    sent.map_err(|error| format!("a write to the image: {error}"))?;
    server.stop();

    let opening = Cell {
        id: format!("{prefix}open-{name}"),
        title: format!(
            "start-up with an image of a {name} disk, one block written (no filter: \
             with one in which nothing was written){suffix}"
        ),
        kind: Kind::Amount("ms"),
        rounds: effort.rounds,
        systems: vec![System::Kept, System::NoFilter, System::QemuKept],
        measure: Box::new(|system| match system {
            System::NoFilter => start_up(&with(&new), System::Kept, place),
            _ => start_up(&with(&written), system, place),
        }),
    };
    let opening = runner::run_one(opening);
    let making = Cell {
        id: format!("{prefix}make-{name}"),
        title: format!("start-up that makes the image of a {name} disk{suffix}"),
        kind: Kind::Amount("ms"),
        rounds: effort.rounds,
        systems: vec![System::Kept, System::NoFilter],
        measure: Box::new(|system| start_up(&Setup::disk(&disk), system, place)),
    };
    Ok([opening, runner::run_one(making)])
}

fn one_percent(effort: &Effort) -> Result<Row, String> {
    let scratch = scratch(MEMORY)?;
    let place = scratch.path();
    let disk = place.join("disk.img");
    sparse(&disk, TIB)?;
    let image = place.join("diff.qcow2");
    let made = make_image(&image, TIB);
    made.map_err(|error| format!("an image: {error}"))?;
    let setup = Setup::disk(&disk).resuming(&image);
    let cell = Cell {
        id: "kept-resume".into(),
        title: "start-up with an image of a 1T disk, 1 % of it written".into(),
        kind: Kind::Amount("ms"),
        rounds: effort.rounds,
        systems: vec![System::Kept, System::QemuKept],
        measure: Box::new(|system| start_up(&setup, system, place)),
    };
    Ok(runner::run_one(cell))
}
