//! Instructions per request, as callgrind counts them, and the memory of the
//! block map: figures without noise, which need no rounds.
//!
//! Two views. The core alone ([`super::driver`]) is what the filter decides and
//! notes down for a request. The whole process, serving the null plugin, minus
//! the same without a filter, has all that the filter adds in user space: the
//! boundary and nbdkit's own calls between layers too. What the kernel does in a
//! system call is in neither.

use std::path::Path;
use std::time::Duration;

use super::command::{self, command};
use super::lab::scratch_in_memory;
use super::nbd::Request;
use super::runner::{Effort, Row};
use super::systems::{Setup, System};

const VALGRIND: [&str; 4] = [
    "valgrind",
    "--tool=callgrind",
    "--callgrind-out-file=/dev/null",
    "--log-file=",
];

/// What is counted; the call alone that is subtracted; title.
const CORE: [(&str, &str, &str); 4] = [
    ("read-base", "call-base", "4K read of the base"),
    ("read-data", "call-store-read", "4K read of written data"),
    (
        "write-fresh",
        "call-store-write",
        "4K write to a fresh block",
    ),
    (
        "write-again",
        "call-store-write",
        "4K write to a written block",
    ),
];

pub fn all(effort: &Effort) -> Result<Vec<Row>, String> {
    let scratch = scratch_in_memory()?;
    let mut rows = Vec::new();
    for (what, call, title) in CORE {
        rows.extend(core(what, call, title, scratch.path())?);
    }
    if !effort.quick {
        rows.push(process(false, scratch.path())?);
        rows.push(process(true, scratch.path())?);
    }
    rows.push(map_memory("memory-trim", "trimmed", effort)?);
    rows.push(map_memory("memory-write", "written", effort)?);
    Ok(rows)
}

fn core(what: &str, call: &str, title: &str, place: &Path) -> Result<Vec<Row>, String> {
    let (instructions, allocations) = each(what, place)?;
    let (of_call, _) = each(call, place)?;
    Ok(vec![
        Row::single(
            &format!("instructions-{what}"),
            &format!("core, {title}, beyond the call to the next layer"),
            "instructions",
            &[(System::Ours, instructions - of_call)],
        ),
        Row::single(
            &format!("allocations-{what}"),
            &format!("core, {title}: allocations"),
            "a request",
            &[(System::Ours, allocations)],
        ),
    ])
}

/// (instructions, allocations) of one request.
fn each(what: &str, place: &Path) -> Result<(f64, f64), String> {
    const FEW: u64 = 10_000;
    const MANY: u64 = 110_000;
    let log = place.join("callgrind.log");
    let mut counts = Vec::new();
    for count in [FEW, MANY] {
        let mut command = command(VALGRIND[0]);
        command
            .args(&VALGRIND[1..3])
            .arg(format!("{}{}", VALGRIND[3], log.display()))
            .arg(this_executable())
            .args(["driver", what, &count.to_string()]);
        let (output, _) = command::run(&mut command, command::LIMIT)?;
        counts.push((collected(&log)?, number(&output)?));
    }
    let requests = (MANY - FEW) as f64;
    Ok((
        (counts[1].0 - counts[0].0) / requests,
        (counts[1].1 - counts[0].1) / requests,
    ))
}

fn this_executable() -> std::path::PathBuf {
    std::env::current_exe().expect("the path of this executable")
}

fn number(output: &str) -> Result<f64, String> {
    let number = output.trim().parse();
    number.map_err(|_| format!("the driver said {output:?}"))
}

/// The line `Collected : 123` of callgrind.
fn collected(log: &Path) -> Result<f64, String> {
    let text = std::fs::read_to_string(log).map_err(|error| format!("callgrind: {error}"))?;
    let line = text.lines().find_map(|line| line.split_once("Collected :"));
    line.and_then(|(_, count)| count.trim().parse().ok())
        .ok_or_else(|| "callgrind counted nothing".into())
}

/// The whole nbdkit with a filter, beyond nbdkit without one.
fn process(write: bool, place: &Path) -> Result<Row, String> {
    let systems = [System::Ours, System::CDefault, System::C4K];
    let without = process_each(System::NoFilter, write, place)?;
    let mut figures = Vec::new();
    for system in systems {
        figures.push((system, process_each(system, write, place)? - without));
    }
    let (id, title) = if write {
        (
            "process-write",
            "nbdkit as a whole, 4K write to a fresh block",
        )
    } else {
        ("process-read", "nbdkit as a whole, 4K read of the base")
    };
    let title = format!("{title}, beyond no filter");
    Ok(Row::single(id, &title, "instructions", &figures))
}

fn process_each(system: System, write: bool, place: &Path) -> Result<f64, String> {
    const FEW: u64 = 200;
    const MANY: u64 = 2200;
    let log = place.join("callgrind.log");
    let mut setup = Setup::plugin(&["null", "size=1G"]);
    setup.under = VALGRIND.map(String::from).to_vec();
    setup.under[3].push_str(&log.display().to_string());
    let data = [1; 4096];
    let mut counts = Vec::new();
    for count in [FEW, MANY] {
        let server = setup.start(system, place)?;
        let mut client = server.client()?;
        client.limit(Duration::from_secs(30));
        // Each in a 64K block of its own, so that a block is fresh at any size.
        let requests = (0..count).map(|index| match (write, index << 16) {
            (true, offset) => Request::Write {
                offset,
                data: &data,
            },
            (false, offset) => Request::Read {
                offset,
                length: 4096,
            },
        });
        let done = client.all(requests, 1);
        done.map_err(|error| format!("under callgrind: {error}"))?;
        drop(client);
        server.stop();
        counts.push(collected(&log)?);
    }
    Ok((counts[1] - counts[0]) / (MANY - FEW) as f64)
}

/// The memory that it takes to know that every second 4K block of 1 TiB is
/// changed. The time of 2^27 requests through nbdkit would be a quarter of an
/// hour; to the map in this process they are the same.
fn map_memory(what: &str, verb: &str, effort: &Effort) -> Result<Row, String> {
    const TEBIBYTE: u64 = (1 << 40) / 4096;
    let scale = if effort.quick { 16 } else { 1 };
    let mut command = command(&this_executable().display().to_string());
    command.args(["driver", what, &(TEBIBYTE / scale).to_string()]);
    let (output, _) = command::run(&mut command, Duration::from_secs(100))?;
    let bytes = number(&output)? * scale as f64;
    let title = format!("core, memory when every second 4K block of 1 TiB was {verb}");
    let figure = bytes / (1 << 20) as f64;
    Ok(Row::single(what, &title, "MiB", &[(System::Ours, figure)]))
}
