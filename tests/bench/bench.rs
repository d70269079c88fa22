//! `make bench`: how far the filter is from having no filter, and from the others.
//!
//! A figure on its own says as much about the machine and its neighbours as about
//! the filter. So nothing is measured alone: within a round every system does the
//! same work one after the other, each round in another order, and what is
//! reported is the median of the rounds' *ratios*, with the smallest and the
//! largest beside it. Nothing here asserts a time; a target that is missed is a
//! word in the table.
//!
//! Dependencies point one way, down this list:
//!
//! - [`report`], [`plot`]: what the rows look like
//! - [`workloads`], [`kept`], [`opening`], [`disks`], [`reclaim`], [`maps`], [`hosts`], [`instructions`]: the rows, each a
//!   function to measure with
//! - [`processor`]: what the requests of a load cost
//! - [`lab`]: directories, disks, and cells of a load
//! - [`targets`]: what the rows should be
//! - [`runner`]: rounds, and the statistics over them
//! - [`fio`], [`nbd`]: load generators
//! - [`systems`]: what is compared, and how it is started
//! - [`server`]: one that runs
//! - [`filters`]: the files of the filters
//! - [`command`]: children with a time limit
//! - [`machine`]: what it ran on
//!
//! `QUICK=1` takes few and short rounds, to see that it works, and `ONLY=maps` measures
//! one of the [`PARTS`]. Both write to `target/bench` instead of `docs/performance`. So
//! does a run in which this filter failed anywhere, and that ends with an error. The
//! others may fail: a note says so.

mod command;
mod disks;
mod driver;
mod filters;
mod fio;
mod hosts;
mod instructions;
mod kept;
mod lab;
mod machine;
mod maps;
// The tests use the rest of it.
#[allow(dead_code)]
#[path = "../nbdkit/harness/nbd.rs"]
mod nbd;
mod opening;
mod plot;
mod processor;
mod reclaim;
mod report;
mod runner;
mod server;
mod systems;
mod targets;
mod workloads;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use runner::{Effort, Row};
use systems::System;

/// How a row of this filter's could not be measured.
type Failed = (String, System, String);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|word| word == "driver") {
        return driver::main(&arguments[1..]);
    }
    let quick = std::env::var_os("QUICK").is_some_and(|value| !value.is_empty() && value != "0");
    let effort = if quick { Effort::QUICK } else { Effort::FULL };
    let only = std::env::var("ONLY").unwrap_or_default();
    match bench(&effort, &only) {
        Ok(failed) if failed.is_empty() => ExitCode::SUCCESS,
        Ok(failed) => {
            eprintln!("bench: this filter failed:");
            for (title, system, reason) in failed {
                eprintln!("  {title}: {}: {reason}", system.name());
            }
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(effort: &Effort, only: &str) -> Result<Vec<Failed>, Box<dyn std::error::Error>> {
    let start = Instant::now();
    lab::need_room(effort)?;
    let rows = measure(effort, only)?;
    let took = start.elapsed();
    let failed = failures(&rows);

    let directory = output(!effort.quick && only.is_empty() && failed.is_empty());
    std::fs::create_dir_all(&directory)?;
    plot::draw(&rows, &directory.join("performance.svg"))?;
    let page = report::page(&rows, effort, took);
    std::fs::write(directory.join("README.md"), page)?;
    println!("{}", report::summary(&rows));
    println!(
        "Written to {} in {} s.",
        directory.display(),
        took.as_secs()
    );
    if !effort.quick && !failed.is_empty() {
        println!("Not to docs/performance, because this filter failed: see below.");
    }
    Ok(failed)
}

/// One part of the rows.
type Part = fn(&Effort) -> Result<Vec<Row>, String>;

/// One after the other: each gives back its files before the next makes its own.
const PARTS: [(&str, Part); 9] = [
    ("tmpfs", workloads::on_memory),
    ("disk", workloads::on_disk),
    ("kept", kept::all),
    ("opening", opening::all),
    ("whole", disks::all),
    ("reclaim", reclaim::all),
    ("maps", maps::all),
    ("hosts", hosts::all),
    ("instructions", instructions::all),
];

/// All the rows, or those of one part.
fn measure(effort: &Effort, only: &str) -> Result<Vec<Row>, String> {
    if !only.is_empty() && PARTS.iter().all(|(name, _)| *name != only) {
        let names = PARTS.map(|(name, _)| name).join(", ");
        return Err(format!("ONLY={only} is none of {names}"));
    }
    let mut rows = Vec::new();
    for (name, part) in PARTS {
        if !only.is_empty() && name != only {
            continue;
        }
        let start = Instant::now();
        rows.extend(part(effort)?);
        eprintln!("--- {name}: {:.1} s", start.elapsed().as_secs_f64());
    }
    Ok(rows)
}

/// Where this filter has no figure, or not one in each round.
fn failures(rows: &[Row]) -> Vec<Failed> {
    let mut failed = Vec::new();
    for row in rows.iter().filter(|row| !beyond_the_machine(row)) {
        let before = failed.len();
        for system in [System::Ours, System::Kept] {
            let reasons = row.failures.get(&system).into_iter().flatten();
            failed.extend(reasons.map(|reason| (row.title.clone(), system, reason.clone())));
        }
        if failed.len() == before && row.shown(row.subject).is_none() {
            let reason = "nothing to compare with".into();
            failed.push((row.title.clone(), row.subject, reason));
        }
    }
    failed
}

/// Many machines don't let perf count, and then it does so for nobody.
fn beyond_the_machine(row: &Row) -> bool {
    row.id.starts_with("system-") && row.figures.is_empty()
}

/// Where the results go: those of a quick run, or of one that failed, must not
/// replace the real ones.
fn output(to_keep: bool) -> PathBuf {
    if to_keep {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/performance")
    } else {
        // The executable is in target/release/deps.
        let executable = std::env::current_exe().expect("the path of this executable");
        let target = executable.ancestors().nth(3).expect("a target directory");
        target.join("bench")
    }
}
