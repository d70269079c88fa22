//! What is to be reached, row by row. A miss is shown, never asserted.

use super::runner::{Row, Spread, short};
use super::systems::System;

#[derive(Clone, Copy)]
pub enum Goal {
    /// What the table shows for this filter (for the overlay that is kept, where the
    /// row is about that) (a ratio or an amount), at least or at most.
    AtLeast(f64),
    AtMost(f64),
    /// What the table shows for this system, at most.
    OfAtMost(System, f64),
    /// This many times another system's rate.
    Times(System, f64),
    /// This many times what another system takes, at most.
    TimesAtMost(System, f64),
    /// Not more than this above "no filter", in the row's unit.
    Beyond(f64),
}

/// The goals of a row.
pub fn goals(id: &str) -> &'static [Goal] {
    use Goal::{AtLeast, AtMost, Beyond, OfAtMost, Times, TimesAtMost};
    if let Some(load) = id.strip_prefix("disk-cpu-").or(id.strip_prefix("cpu-")) {
        return if of_whole_blocks(load) {
            &[OfAtMost(System::Ours, 1.05), OfAtMost(System::Kept, 1.08)]
        } else {
            &[]
        };
    }
    match id {
        "read-4k-16" | "read-1m-4" => &[AtLeast(0.97)],
        "write-4k-16" => &[
            AtLeast(0.95),
            Times(System::CDefault, 3.5),
            Times(System::C4K, 1.0),
        ],
        "write-1m-4" => &[AtLeast(0.95)],
        "slow-write-512" => &[AtLeast(0.85)],
        "map-1T" => &[AtMost(1.3)],
        "map-fragmented" => &[AtMost(1.5)],
        "zero-16T" | "trim-16T" => &[AtMost(0.5)],
        "space-whole" => &[AtMost(0.0)],
        "memory-7E" => &[Beyond(2.0)],
        "memory-whole" => &[AtMost(8.0)],
        "memory-trim" | "memory-write" => &[AtMost(72.0)],
        "start-1G" | "start-1T" | "start-1P" | "start-7E" => &[Beyond(5.0)],
        "kept-never" => &[Times(System::Ours, 0.97), Times(System::QemuKept, 1.5)],
        "disk-kept-never" | "kept-32" | "disk-kept-32" => &[Times(System::QemuKept, 1.5)],
        "kept-1" | "disk-kept-1" => &[Times(System::QemuKept, 1.0)],
        "kept-resume" => &[AtMost(60.0)],
        _ if id.starts_with("open-") || id.starts_with("disk-open-") => &[Beyond(20.0)],
        "kept-move" | "disk-kept-move" => &[TimesAtMost(System::NoFilter, 2.0)],
        "instructions-write-far" | "allocations-write-far" => &[],
        _ if id.starts_with("library-") => &[AtMost(400.0)],
        _ if id.starts_with("instructions-") => &[AtMost(400.0)],
        _ if id.starts_with("allocations-") => &[AtMost(0.001)],
        _ => &[],
    }
}

/// Whether a load is reads or writes of whole blocks, and no flushes between them.
///
/// In the mix "no filter" does not read what the others do.
fn of_whole_blocks(load: &str) -> bool {
    let others = [
        "mix-",
        "slow-mix-",
        "write-512-",
        "slow-write-512",
        "kept-32",
        "kept-1",
    ];
    !others.iter().any(|other| load.starts_with(other))
}

/// What is to be reached, and whether it was.
pub fn verdict(row: &Row, goal: Goal) -> String {
    let (wanted, found, reached) = match goal {
        Goal::AtLeast(least) => {
            let found = row.shown(row.subject);
            (
                format!("≥ {least}"),
                found,
                found.map(|f| f.median >= least),
            )
        }
        Goal::AtMost(most) => {
            let found = row.shown(row.subject);
            (format!("≤ {most}"), found, found.map(|f| f.median <= most))
        }
        Goal::OfAtMost(system, most) => {
            let found = row.shown(system);
            let wanted = format!("{} ≤ {most}", system.name());
            (wanted, found, found.map(|f| f.median <= most))
        }
        Goal::Times(system, least) => {
            let found = row.ratio(row.subject, system);
            let wanted = format!("≥ {least} × {}", system.name());
            (wanted, found, found.map(|f| f.median >= least))
        }
        Goal::TimesAtMost(system, most) => {
            let found = row.ratio(row.subject, system);
            let wanted = format!("≤ {most} × {}", system.name());
            (wanted, found, found.map(|f| f.median <= most))
        }
        Goal::Beyond(most) => {
            let found = row.both(row.subject, System::NoFilter, |a, b| a - b);
            let wanted = format!("≤ no filter + {most}");
            (wanted, found, found.map(|f| f.median <= most))
        }
    };
    let word = match reached {
        Some(true) => "reached",
        Some(false) => "**not reached**",
        None => "not measured",
    };
    let figure = found.map_or(String::new(), |f: Spread| format!(" ({})", short(f.median)));
    format!("{wanted}: {word}{figure}")
}
