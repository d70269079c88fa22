//! Instructions per request, as callgrind counts them, and the memory of the
//! block map: figures without noise, which need no rounds.
//!
//! Three views. The core alone ([`super::driver`]) is what the filter decides and
//! notes down for a request. The whole process, serving the null plugin, minus
//! the same without a filter, has all that the filter adds in user space: the
//! boundary and nbdkit's own calls between layers too. What the kernel does in a
//! system call is in the third only, which is counted by the processor (`perf
//! stat`), where there is one that the system lets count.

use std::path::Path;
use std::time::Duration;

use super::command::{self, command};
use super::lab::scratch_in_memory;
use super::nbd::Request;
use super::runner::{Effort, Row};
use super::systems::{Setup, System};

/// What counts the instructions of a process.
#[derive(Clone, Copy)]
enum Counter {
    /// Those outside the kernel.
    Callgrind,
    /// All.
    Perf,
}

impl Counter {
    /// The command to run the process under, which writes to `log` at its end.
    fn command(self, log: &Path) -> Vec<String> {
        let log = log.display();
        match self {
            Counter::Callgrind => vec![
                "valgrind".into(),
                "--tool=callgrind".into(),
                "--callgrind-out-file=/dev/null".into(),
                format!("--log-file={log}"),
            ],
            Counter::Perf => ["perf", "stat", "-x,", "-e", "instructions", "-o"]
                .map(String::from)
                .into_iter()
                .chain([log.to_string()])
                .collect(),
        }
    }

    /// What it counted.
    fn count(self, log: &Path) -> Result<f64, String> {
        let text = std::fs::read_to_string(log).map_err(|error| format!("a count: {error}"))?;
        let count = match self {
            // "==PID== Collected : 123"
            Counter::Callgrind => text
                .lines()
                .find_map(|line| line.split_once("Collected :"))
                .map(|(_, count)| count),
            // "123,,instructions,..."
            Counter::Perf => text
                .lines()
                .find(|line| line.contains(",instructions"))
                .and_then(|line| line.split(',').next()),
        };
        count
            .and_then(|count| count.trim().parse().ok())
            .ok_or_else(|| match self {
                Counter::Callgrind => "callgrind counted nothing".into(),
                Counter::Perf => "perf can't count instructions on this machine".into(),
            })
    }
}

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
        for write in [false, true] {
            rows.push(process(Counter::Callgrind, write, scratch.path()));
            rows.push(process(Counter::Perf, write, scratch.path()));
        }
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
        let words = Counter::Callgrind.command(&log);
        let mut command = command(&words[0]);
        command
            .args(&words[1..])
            .arg(this_executable())
            .args(["driver", what, &count.to_string()]);
        let (output, _) = command::run(&mut command, command::LIMIT)?;
        counts.push((Counter::Callgrind.count(&log)?, number(&output)?));
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

/// The whole nbdkit with a filter, beyond nbdkit without one.
fn process(counter: Counter, write: bool, place: &Path) -> Row {
    let (kind, request) = if write {
        ("write", "4K write to a fresh block")
    } else {
        ("read", "4K read of the base")
    };
    let (id, what) = match counter {
        Counter::Callgrind => ("process", "nbdkit as a whole"),
        Counter::Perf => ("system", "nbdkit as a whole and the kernel"),
    };
    let title = format!("{what}, {request}, beyond no filter");
    let mut row = Row::single(&format!("{id}-{kind}"), &title, "instructions", &[]);
    let without = process_each(counter, System::NoFilter, write, place);
    for system in [System::Ours, System::CDefault, System::C4K] {
        let figure = without.clone().and_then(|without| {
            let with = process_each(counter, system, write, place)?;
            Ok(with - without)
        });
        match figure {
            Ok(figure) => drop(row.figures.insert(system, vec![Some(figure)])),
            Err(reason) => drop(row.failures.insert(system, [reason].into())),
        }
    }
    row
}

fn process_each(
    counter: Counter,
    system: System,
    write: bool,
    place: &Path,
) -> Result<f64, String> {
    const FEW: u64 = 200;
    const MANY: u64 = 2200;
    let log = place.join("count.log");
    let mut setup = Setup::plugin(&["null", "size=1G"]);
    setup.under = counter.command(&log);
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
        done.map_err(|error| format!("while they were counted: {error}"))?;
        drop(client);
        server.stop();
        counts.push(counter.count(&log)?);
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
