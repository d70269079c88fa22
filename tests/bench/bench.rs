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
//! - [`workloads`], [`kept`], [`disks`], [`maps`], [`instructions`]: the rows, each a function to measure with
//! - [`lab`]: directories, disks, and cells of a load
//! - [`targets`]: what the rows should be
//! - [`runner`]: rounds, and the statistics over them
//! - [`fio`], [`nbd`]: load generators
//! - [`systems`]: what is compared, as running servers
//! - [`filters`]: the files of the filters
//! - [`command`]: children with a time limit
//! - [`machine`]: what it ran on
//!
//! `QUICK=1` takes few and short rounds, to see that it works, and writes to
//! `target/bench` instead of `docs/performance`.

mod command;
mod disks;
mod driver;
mod filters;
mod fio;
mod instructions;
mod kept;
mod lab;
mod machine;
mod maps;
mod nbd;
mod plot;
mod report;
mod runner;
mod systems;
mod targets;
mod workloads;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use runner::{Effort, Row};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|word| word == "driver") {
        return driver::main(&arguments[1..]);
    }
    let quick = std::env::var_os("QUICK").is_some_and(|value| !value.is_empty() && value != "0");
    let effort = if quick { Effort::QUICK } else { Effort::FULL };
    match measure(&effort) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(effort: &Effort) -> Result<(), Box<dyn std::error::Error>> {
    let start = Instant::now();
    let mut rows: Vec<Row> = Vec::new();
    // One after the other: each gives back its files before the next makes its own.
    rows.extend(workloads::on_memory(effort)?);
    rows.extend(workloads::on_disk(effort)?);
    rows.extend(kept::all(effort)?);
    rows.extend(disks::all(effort)?);
    rows.extend(maps::all(effort)?);
    rows.extend(instructions::all(effort)?);
    let took = start.elapsed();

    let directory = output(effort);
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
    Ok(())
}

/// Where the results go: those of a quick run must not replace the real ones.
fn output(effort: &Effort) -> PathBuf {
    if effort.quick {
        // The executable is in target/release/deps.
        let executable = std::env::current_exe().expect("the path of this executable");
        let target = executable.ancestors().nth(3).expect("a target directory");
        target.join("bench")
    } else {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/performance")
    }
}
