//! A set of byte ranges: ranges that meet or overlap are one.

use std::collections::BTreeMap;

use crate::block::ByteRange;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Ranges {
    /// From the start of a range to its end. No two of them meet.
    ends: BTreeMap<u64, u64>,
}

impl Ranges {
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Adds `range`, which may be empty.
    pub fn insert(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let mut merged = range;
        // Those that begin in the range or at its end, and the one before, if it
        // reaches the range.
        let met = |ends: &BTreeMap<u64, u64>, merged: ByteRange| {
            let (start, end) = ends.range(..=merged.end).next_back()?;
            (*end >= merged.start).then_some((*start, *end))
        };
        while let Some((start, end)) = met(&self.ends, merged) {
            self.ends.remove(&start);
            merged.start = merged.start.min(start);
            merged.end = merged.end.max(end);
        }
        self.ends.insert(merged.start, merged.end);
    }

    /// Takes the lowest range out of the set.
    pub fn pop_first(&mut self) -> Option<ByteRange> {
        let (start, end) = self.ends.pop_first()?;
        Some(ByteRange { start, end })
    }

    /// Whether any byte of `range` is in the set.
    pub fn meets(&self, range: ByteRange) -> bool {
        self.within(range).next().is_some()
    }

    /// The parts of `range` that are in the set, in ascending order.
    pub fn within(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> + '_ {
        let before = self.ends.range(..range.start).next_back();
        let inside = self.ends.range(range.start..range.end);
        before
            .into_iter()
            .chain(inside)
            .map(move |(&start, &end)| ByteRange { start, end }.clamp_to(range))
            .filter(|part| !part.is_empty())
    }

    /// The parts of `range` that are not in the set, in ascending order.
    pub fn gaps(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> + '_ {
        let mut at = range.start;
        let end = ByteRange {
            start: range.end,
            end: range.end,
        };
        self.within(range)
            .chain(std::iter::once(end))
            .filter_map(move |part| {
                let gap = ByteRange {
                    start: at,
                    end: part.start,
                };
                at = part.end;
                (!gap.is_empty()).then_some(gap)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange { start, end }
    }

    proptest! {
        #[test]
        fn a_set_of_ranges_is_a_set_of_bytes(
            inserted in prop::collection::vec((0u64..200, 0u64..40), 0..20),
            asked in (0u64..200, 0u64..60),
        ) {
            let mut ranges = Ranges::default();
            let mut bytes = [false; 260];
            for (start, len) in inserted {
                ranges.insert(range(start, start + len));
                bytes[start as usize..(start + len) as usize].fill(true);
            }
            let asked = range(asked.0, asked.0 + asked.1);
            let covers = |parts: &[ByteRange], at: u64| {
                parts.iter().any(|part| (part.start..part.end).contains(&at))
            };
            let within: Vec<ByteRange> = ranges.within(asked).collect();
            let gaps: Vec<ByteRange> = ranges.gaps(asked).collect();
            prop_assert_eq!(ranges.meets(asked), !within.is_empty());
            prop_assert!(within.iter().chain(&gaps).all(|part| !part.is_empty()));
            for at in 0..260 {
                let is_asked = (asked.start..asked.end).contains(&at);
                prop_assert_eq!(covers(&within, at), is_asked && bytes[at as usize]);
                prop_assert_eq!(covers(&gaps, at), is_asked && !bytes[at as usize]);
            }
            // Whole ranges come out in order, and no two of them meet.
            let mut last_end = None;
            while let Some(part) = ranges.pop_first() {
                prop_assert!(last_end.is_none_or(|end| end < part.start));
                prop_assert!((part.start..part.end).all(|at| bytes[at as usize]));
                bytes[part.start as usize..part.end as usize].fill(false);
                last_end = Some(part.end);
            }
            prop_assert!(bytes.iter().all(|byte| !byte));
        }
    }
}
