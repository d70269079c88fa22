//! Instructions per request, as callgrind counts them, and the memory of the
//! block map: figures without noise, which need no rounds.
//!
//! Four views. The core alone ([`super::driver`]) is what the filter decides and
//! notes down for a request. The filter's library, loaded by nbdkit over the null
//! plugin, has the boundary and the store too: all of the filter's own code. The whole
//! process, minus the same without a filter, has what the filter makes nbdkit and the C
//! library do besides. What the kernel does in a system call is in the fourth only,
//! which is counted by the processor (`perf stat`), where there is one that the system
//! lets count.

use std::collections::BTreeSet;
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
                format!("--callgrind-out-file={log}.out"),
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
const CORE: [(&str, &str, &str); 7] = [
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
    (
        "write-far",
        "call-store-write",
        "4K write, the first to 8M of the disk",
    ),
    (
        "kept-fresh",
        "call-store-write",
        "4K write to a fresh block, overlay kept",
    ),
    (
        "kept-again",
        "call-store-write",
        "4K write to a written block, overlay kept",
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
            rows.extend(process(Counter::Callgrind, write, scratch.path()));
            rows.extend(process(Counter::Perf, write, scratch.path()));
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

/// What nbdkit executes for a request, with and without a filter.
#[derive(Clone, Copy)]
struct Executed {
    whole: f64,
    /// In the library of the filter.
    library: f64,
}

/// The rows of nbdkit as a whole, and of the filter's library, where the counter tells
/// one from the other.
fn process(counter: Counter, write: bool, place: &Path) -> Vec<Row> {
    let (kind, request) = if write {
        ("write", "4K write to a fresh block")
    } else {
        ("read", "4K read of the base")
    };
    let row = |id: &str, title: String| Row::single(id, &title, "instructions", &[]);
    let mut library = row(
        &format!("library-{kind}"),
        format!("filter's library, {request}, beyond system calls"),
    );
    let (id, what) = match counter {
        Counter::Callgrind => ("process", "nbdkit as a whole"),
        Counter::Perf => ("system", "nbdkit as a whole and the kernel"),
    };
    let mut whole = row(
        &format!("{id}-{kind}"),
        format!("{what}, {request}, beyond no filter"),
    );
    let without = process_each(counter, System::NoFilter, write, place);
    for system in [System::Ours, System::CDefault, System::C4K] {
        let executed = without.clone().and_then(|without| {
            let with = process_each(counter, system, write, place)?;
            Ok(Executed {
                whole: with.whole - without.whole,
                ..with
            })
        });
        match executed {
            Ok(Executed {
                whole: beyond,
                library: own,
            }) => {
                whole.figures.insert(system, vec![Some(beyond)]);
                library.figures.insert(system, vec![Some(own)]);
            }
            Err(reason) => drop(whole.failures.insert(system, [reason].into())),
        }
    }
    match counter {
        Counter::Callgrind => vec![library, whole],
        Counter::Perf => vec![whole],
    }
}

fn process_each(
    counter: Counter,
    system: System,
    write: bool,
    place: &Path,
) -> Result<Executed, String> {
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
        counts.push(Executed {
            whole: counter.count(&log)?,
            library: match counter {
                Counter::Callgrind => in_library(&log.with_extension("log.out"))?,
                Counter::Perf => 0.0,
            },
        });
    }
    let each =
        |count: fn(&Executed) -> f64| (count(&counts[1]) - count(&counts[0])) / (MANY - FEW) as f64;
    Ok(Executed {
        whole: each(|counts| counts.whole),
        library: each(|counts| counts.library),
    })
}

/// The sum of what callgrind's output file says of functions of a cow filter's library.
/// The format is described in Valgrind's manual: an `ob=` line names the object file of
/// the costs that follow, with a number that stands for its name later; a line after
/// `calls=` is the cost of a call, which is not the caller's own.
fn in_library(output: &Path) -> Result<f64, String> {
    let text = std::fs::read_to_string(output).map_err(|error| format!("a profile: {error}"))?;
    let (mut ours, mut is_ours, mut is_call) = (BTreeSet::new(), false, false);
    let mut sum = 0.0;
    for line in text.lines() {
        if std::mem::take(&mut is_call) {
            continue;
        }
        if let Some((key, value)) = line.split_once('=') {
            is_call = key == "calls";
            if key == "ob" || key == "cob" {
                let (number, name) = value.split_once(' ').unwrap_or((value, ""));
                if name.contains("cow_filter") || name.contains("cow-filter") {
                    ours.insert(number);
                }
                if key == "ob" {
                    is_ours = ours.contains(number);
                }
            }
        } else if is_ours && line.starts_with(|first: char| "0123456789+-*".contains(first)) {
            let cost = line.split(' ').nth(1).and_then(|cost| cost.parse().ok());
            sum += cost.unwrap_or(0.0);
        }
    }
    if ours.is_empty() {
        // Without a filter there is none.
        return Ok(0.0);
    }
    Ok(sum)
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
