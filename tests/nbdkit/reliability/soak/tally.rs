//! What was done, so that one sees that a soak was not idle.

use std::collections::BTreeMap;
use std::fmt;

#[derive(Default)]
pub struct Tally {
    /// Requests that were answered, and their bytes.
    answered: BTreeMap<&'static str, (u64, u64)>,
    /// Requests that failed as they may, by their errno.
    failed: BTreeMap<(&'static str, u32), u64>,
    /// What else happened.
    events: BTreeMap<&'static str, u64>,
}

impl Tally {
    pub fn answered(&mut self, kind: &'static str, bytes: u64) {
        let (count, sum) = self.answered.entry(kind).or_default();
        *count += 1;
        *sum += bytes;
    }

    pub fn failed(&mut self, kind: &'static str, errno: u32) {
        *self.failed.entry((kind, errno)).or_default() += 1;
    }

    pub fn happened(&mut self, event: &'static str, times: u64) {
        *self.events.entry(event).or_default() += times;
    }

    pub fn add(&mut self, other: Tally) {
        for (kind, (count, bytes)) in other.answered {
            let sum = self.answered.entry(kind).or_default();
            *sum = (sum.0 + count, sum.1 + bytes);
        }
        for (kind, count) in other.failed {
            *self.failed.entry(kind).or_default() += count;
        }
        for (event, times) in other.events {
            self.happened(event, times);
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, (count, bytes)) in &self.answered {
            writeln!(f, "  {count:>9} {kind}, {} MiB", bytes >> 20)?;
        }
        for ((kind, errno), count) in &self.failed {
            writeln!(f, "  {count:>9} {kind} failed with errno {errno}")?;
        }
        for (event, times) in &self.events {
            writeln!(f, "  {times:>9} {event}")?;
        }
        Ok(())
    }
}
