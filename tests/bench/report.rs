//! The page: `docs/performance/README.md`.

use std::fmt::Write as _;
use std::time::Duration;

use super::machine;
use super::runner::{Effort, Kind, Row, Spread, short};
use super::systems::System;
use super::targets::{goals, verdict};

/// Rows of the summary, and what they are called there: as in the other tables, where
/// nothing is given.
type Titles = [(&'static str, &'static str)];

/// What a request costs.
const SUMMARY_PROCESSOR: [(&str, &str); 13] = [
    ("cpu-read-4k-16", "4K random read"),
    ("cpu-write-4k-16", "4K random write, fresh blocks"),
    ("cpu-read-64k-16", "64K random read"),
    ("cpu-write-64k-16", "64K random write"),
    ("cpu-read-256k-8", "256K random read"),
    ("cpu-write-256k-8", "256K random write"),
    ("cpu-read-1m-4", "1M sequential read"),
    ("cpu-write-1m-4", "1M sequential write"),
    ("disk-cpu-write-4k-16", "4K random write, on disk"),
    ("disk-cpu-write-64k-16", "64K random write, on disk"),
    ("disk-cpu-write-256k-8", "256K random write, on disk"),
    ("disk-cpu-write-1m-4", "1M sequential write, on disk"),
    ("cpu-write-512-16", "512-byte random write"),
];

/// How fast it is, and the rest.
const SUMMARY: [(&str, &str); 18] = [
    ("read-4k-16", "4K random read"),
    ("write-4k-16", "4K random write, fresh blocks"),
    ("mix-4k-16", "4K random, 70 % reads"),
    ("write-64k-16", "64K random write"),
    ("read-1m-4", "1M sequential read"),
    ("write-1m-4", "1M sequential write"),
    ("disk-write-1m-4", "1M sequential write, on disk"),
    ("write-512-16", "512-byte random write"),
    (
        "slow-write-512",
        "512-byte random write, 5 ms base (part of the limit)",
    ),
    ("map-1T", "map of a sparse 1T disk (times as long)"),
    ("map-fragmented", "map of a fragmented disk (times as long)"),
    ("zero-16T", "zero of 16T (seconds)"),
    ("reclaim-trim", ""),
    ("reclaim-trim-longest", ""),
    ("hosts-copied", ""),
    ("hosts-plain", ""),
    (
        "start-1T",
        "start-up, 1T disk (ms; for no filter see the full table)",
    ),
    (
        "memory-7E",
        "memory, untouched 7E disk (MiB; for no filter see the full table)",
    ),
];

/// The same as [`SUMMARY`], of the overlay that is kept.
const SUMMARY_KEPT: [(&str, &str); 10] = [
    ("kept-never", "4K random write, no flush"),
    ("kept-32", "with a flush after every 32"),
    ("kept-1", "with a flush after every one"),
    ("disk-kept-never", "4K random write on disk, no flush"),
    ("disk-kept-32", "with a flush after every 32"),
    ("disk-kept-1", "with a flush after every one"),
    ("kept-save", ""),
    (
        "kept-resume",
        "start-up with an image of a 1T disk, 1 % written (ms)",
    ),
    ("kept-move", ""),
    ("disk-kept-move", ""),
];

const COLUMNS: &str = "\
Every system did the same work right after the others, in each of the rounds. Each round starts with another one,
and every second round takes them the other way round.

- *no filter*: nbdkit with its file plugin alone, the measure of the others. It reads the same disk; where there is
  writing it writes to a fresh sparse file on the same file system. In the rows with 70 % reads it reads from that
  file too, so it finds holes where the others find the disk's data; over the 5 ms base those reads take 5 ms as well.
  A median in its own unit.
- *this filter*, *C filter* (the one that nbdkit ships, at its default of 64K blocks), *C filter, 4K blocks*
  (`cow-block-size=4096`), *qemu-nbd --snapshot* (`-f raw --persistent -e 8`): the median over the rounds
  of the ratio to no filter in the same round, and in brackets the smallest and the largest. In a table of rates more
  is better, 1 is as fast as no filter; in a table of times less is better.
- *Processor time of a request* is what the kernel charges the server's process for, user and system, all threads,
  between the first request of a round and the last reply to it, divided by the requests. Work that the kernel does
  later on its own (to write files to the disk) is not in it, and below qemu-nbd over the 5 ms base neither is the
  nbdkit that delays. Rates depend on how well the scheduler has client and server run side by side, so their
  spread is wider.
- Memory is used and given back before each row of processor time: a virtual machine has to get it from its host first,
  which costs many times what a write does.
- Where a row says so it is a part of the limit instead: requests in flight by the 5 ms that a read of the disk takes.
- qemu-nbd asks the file system for holes before it reads the disk. To find that a large file has none takes tmpfs
  long, which is in the figures of its reads here. Over the 5 ms base it is spared that (nbdkit's
  `noextents` filter is below it), because it would hide the delay.
- *cow-overlay*: this filter with its overlay kept in a qcow2 image; *qemu-nbd, qcow2*: qemu-nbd on a qcow2 image with
  the same disk as its backing file, made with `extended_l2=on` and 128K clusters. No filter flushes as often, to its
  fresh sparse file.
- *to reach*: what the project has set itself for this filter, and whether this run had it.
- \"-\": no figure; the notes say why, where the row is about that system at all. (With one in flight
  qemu-nbd is not measured.)

The load of the rates is fio with its NBD engine over a Unix socket, one process; its own cost is in every figure
alike. Copies are nbdcopy; processor time, maps, zeroing, trimming and memory are a small client of the benchmark's own.
For each rate, copy, zeroing, trimming and start-up a server is started, with a fresh overlay, in which no block is
written twice. For processor time the servers of all systems run side by side, and are asked in turn: a round is 16 MiB
or 1024 requests, whichever is less, and no block is written twice there either. Memory is that of a server whose
start-up was measured, and the fragmented disk is written once and mapped in each round.
";

const PLACES: &str = "Data on tmpfs unless it says \"on disk\".\n\n";

const RECLAIM: &str = "\
One client discards, in one request, and another overwrites 4K blocks elsewhere, with one in flight. Its longest write is
looked for until the answer and the space are there, and before for half a second. The stored blocks are spread over 2 GiB,
and were synced to the disk; the space is back when what the overlay takes, by `st_blocks`, is less by theirs.
";

const HOSTS: &str = "\
Each host is an nbdkit with the curl plugin and an overlay of its own, all on this machine, over one nginx on a Unix socket.
All read at once, in order, in requests of 256K with four in flight. What was sent is the sum in nginx's log. One round.
";

fn ranged(spread: Spread) -> String {
    if spread.least == spread.most {
        return short(spread.median);
    }
    let Spread {
        least,
        median,
        most,
    } = spread;
    format!("{} ({}..{})", short(median), short(least), short(most))
}

/// Tables small enough for the README at the top. What a request costs comes first: it
/// is what varies least.
pub fn summary(rows: &[Row]) -> String {
    let processor = small_table(
        rows,
        "processor time of a request, as a ratio to no filter",
        &SUMMARY_PROCESSOR,
        &System::COMPARED_AND_KEPT,
    );
    let what = "ratio to no filter, or as said";
    let others = small_table(rows, what, &SUMMARY, &System::COMPARED);
    let kept = small_table(rows, what, &SUMMARY_KEPT, &System::KEPT);
    [processor, others, kept].join("\n")
}

fn small_table(rows: &[Row], what: &str, titles: &Titles, systems: &[System]) -> String {
    let mut table = format!("| {what} |");
    for system in systems {
        let _ = write!(table, " {} |", system.name());
    }
    let _ = write!(table, "\n{}|\n", "|---".repeat(systems.len() + 1));
    let measured = |id: &str| rows.iter().find(|row| row.id == id);
    if !titles.iter().any(|(id, _)| measured(id).is_some()) {
        return String::new();
    }
    for (id, title) in titles {
        let Some(row) = measured(id) else {
            continue;
        };
        let title = Some(title.to_string()).filter(|given| !given.is_empty());
        let title = title.unwrap_or_else(|| full_title(row));
        let _ = write!(table, "| {title} |");
        for &system in systems {
            let figure = row.shown(system).map_or("-".into(), |f| short(f.median));
            let _ = write!(table, " {figure} |");
        }
        table.push('\n');
    }
    table
}

pub fn page(rows: &[Row], effort: &Effort, took: Duration) -> String {
    let mut page = String::from("# Performance\n\nWritten by `make bench`.\n\n");
    page.push_str(&summary(rows));
    page.push_str("\n![Ratios to no filter](performance.svg)\n\n");
    for (what, value) in machine::about() {
        let _ = writeln!(page, "- {what}: {value}");
    }
    let _ = writeln!(
        page,
        "- rounds: {} ({} for the rates that have something to reach, {} for the processor time), in {} s",
        effort.rounds,
        effort.more_rounds,
        effort.turns,
        took.as_secs()
    );
    if effort.quick {
        page.push_str("- a quick run: it shows that the benchmark works, and no more\n");
    }
    let _ = write!(page, "\n## What the columns are\n\n{COLUMNS}");
    let mut notes = Notes::default();
    let plain = || rows.iter().filter(|row| !row.is_kept());
    let kept = || rows.iter().filter(|row| row.is_kept());
    let compared = System::COMPARED.as_slice();
    let processor = |row: &&Row| row.kind == Kind::Processor;
    let rates = |row: &&Row| matches!(row.kind, Kind::Rate | Kind::OfLimit(_));
    let reclaim = |row: &&Row| row.id.starts_with("reclaim-");
    let hosts = |row: &&Row| row.id.starts_with("hosts-");
    let amounts = |row: &&Row| matches!(row.kind, Kind::Amount(_)) && !reclaim(row) && !hosts(row);

    page.push_str("\n## Processor time of a request (less is better)\n\n");
    page.push_str(PLACES);
    let and_kept = System::COMPARED_AND_KEPT.as_slice();
    page.push_str(&table(plain().filter(processor), and_kept, &mut notes));
    page.push_str("\n## Rates (more is better)\n\n");
    page.push_str(PLACES);
    page.push_str(&table(plain().filter(rates), compared, &mut notes));
    page.push_str("\n## Times (less is better)\n\n");
    let times = plain().filter(|row| row.kind == Kind::Time);
    page.push_str(&table(times, compared, &mut notes));
    page.push_str("\nThe \"no filter\" of the fragmented disk is a plugin that does nothing but add as many extents.\n");
    page.push_str("\n## Space that is given back (less is better, not ratios)\n\n");
    page.push_str(&table(plain().filter(reclaim), and_kept, &mut notes));
    let _ = write!(page, "\n{RECLAIM}");
    page.push_str("\n## Many hosts and one server (less is better, not ratios)\n\n");
    page.push_str(&table(plain().filter(hosts), compared, &mut notes));
    let _ = write!(page, "\n{HOSTS}");
    page.push_str("\n## Amounts (less is better, not ratios)\n\n");
    page.push_str(&table(plain().filter(amounts), compared, &mut notes));
    page.push_str(
        "\n\"Core\" rows are counted in the core of the filter without nbdkit, over a base and a store that do \
         nothing. Instructions are callgrind's, and those of the kernel too perf's, where the \
         machine lets it count.\n",
    );
    page.push_str("\n## An overlay that is kept\n\nProcessor time of a request (less is better), as ratios:\n\n");
    page.push_str(&table(kept().filter(processor), &System::KEPT, &mut notes));
    page.push_str("\nRates (more is better), as ratios:\n\n");
    page.push_str(&table(kept().filter(rates), &System::KEPT, &mut notes));
    page.push_str("\nTimes (less is better), as they are:\n\n");
    page.push_str(&table(kept().filter(amounts), &System::KEPT, &mut notes));
    page.push_str(
        "\nSaving the diff is to end nbdkit (SIGTERM) where the overlay is kept, and `qemu-img create` with \
         `qemu-img rebase` where it is not. The image of the start-up has all the tables of one to 1 % of which was \
         written, but not the 10 GiB of data.\n",
    );
    page.push_str(&notes.text());
    page
}

fn table<'a>(rows: impl Iterator<Item = &'a Row>, systems: &[System], notes: &mut Notes) -> String {
    let mut table = String::from("| | no filter |");
    for system in systems {
        let _ = write!(table, " {} |", system.name());
    }
    let _ = write!(
        table,
        " to reach |\n{}|\n",
        "|---".repeat(systems.len() + 3)
    );
    for row in rows {
        let _ = write!(table, "| {} |", full_title(row));
        let none = no_filter(row, notes);
        let _ = write!(table, " {none} |");
        for &system in systems {
            let figure = match row.shown(system) {
                Some(spread) => ranged(spread),
                None => "-".into(),
            };
            let marks = notes.marks(row, system);
            let _ = write!(table, " {figure}{marks} |");
        }
        let verdicts: Vec<_> = goals(&row.id)
            .iter()
            .map(|goal| verdict(row, *goal))
            .collect();
        let _ = writeln!(table, " {} |", verdicts.join("<br>"));
    }
    table
}

fn full_title(row: &Row) -> String {
    match row.kind {
        Kind::OfLimit(limit) => format!("{} (part of {}/s)", row.title, short(limit)),
        Kind::Amount(unit) => format!("{} ({unit})", row.title),
        Kind::Rate | Kind::Processor | Kind::Time => row.title.clone(),
    }
}

fn no_filter(row: &Row, notes: &mut Notes) -> String {
    let marks = notes.marks(row, System::NoFilter);
    let figure = match (row.kind, row.own(System::NoFilter)) {
        (_, None) => "-".into(),
        (Kind::Rate, Some(own)) if own.median >= 10_000.0 => {
            format!("{} k/s", short(own.median / 1000.0))
        }
        (Kind::Rate, Some(own)) => format!("{}/s", short(own.median)),
        (Kind::OfLimit(limit), Some(own)) => short(own.median / limit),
        (Kind::Processor, Some(own)) => format!("{} µs", short(own.median * 1e6)),
        (Kind::Time, Some(own)) => format!("{} ms", short(own.median * 1000.0)),
        (Kind::Amount(_), Some(own)) => ranged(own),
    };
    format!("{figure}{marks}")
}

/// Reasons, each told once.
#[derive(Default)]
struct Notes(Vec<String>);

impl Notes {
    fn marks(&mut self, row: &Row, system: System) -> String {
        let mut marks = String::new();
        let reasons = [&row.failures, &row.notes].map(|all| all.get(&system));
        for reason in reasons.into_iter().flatten().flatten() {
            let known = self.0.iter().position(|note| note == reason);
            let number = known.unwrap_or_else(|| {
                self.0.push(reason.clone());
                self.0.len() - 1
            });
            let _ = write!(marks, " [{}]", number + 1);
        }
        marks
    }

    fn text(&self) -> String {
        if self.0.is_empty() {
            return String::new();
        }
        let mut text = String::from("\n## Notes\n\n");
        for (index, note) in self.0.iter().enumerate() {
            let _ = writeln!(text, "{}. {note}", index + 1);
        }
        text
    }
}
