//! Changes of which the client can't know what came of them: it reads, looks whether that is
//! possible, and believes it.

use std::ops::Range;

use super::bytes::{Change, Content, PAGE, pages};
use super::client::{Client, Expectation, Met, Request, Result, What, overlap};
use crate::harness::nbd::CMD_READ;

const MIB: u64 = 1 << 20;

impl Client<'_> {
    /// Reads where a change may have been done or not, and believes what is there.
    pub fn settle(
        &mut self,
        numbers: Vec<u64>,
        range: Range<u64>,
        changes: &[Change],
        unit: u64,
    ) -> Result {
        const LONGEST: u64 = MIB / 4;
        let mut pieces: Vec<Range<u64>> = Vec::new();
        let add = |pieces: &mut Vec<Range<u64>>, piece: Range<u64>| match pieces.last_mut() {
            Some(last) if last.end == piece.start && piece.end - last.start <= LONGEST => {
                last.end = piece.end;
            }
            _ => pieces.push(piece),
        };
        match changes
            .iter()
            .all(|change| matches!(change.content, Content::Zeroes))
        {
            // Where there were zeroes before, there are now.
            true => {
                for number in self.region.now.used(&range) {
                    let start = (number * PAGE).max(range.start);
                    let end = ((number + 1) * PAGE).min(range.end);
                    add(&mut pieces, start..end);
                }
            }
            false => pages(range).for_each(|piece| add(&mut pieces, piece)),
        }
        for own in pieces {
            let expectation = Expectation {
                before: self.region.now.get(&own),
                changes: changes.to_vec(),
                own,
            };
            self.settle_again(expectation, numbers.clone(), unit)?;
        }
        Ok(())
    }

    pub fn settle_again(
        &mut self,
        expectation: Expectation,
        numbers: Vec<u64>,
        unit: u64,
    ) -> Result {
        let range = expectation.own.clone();
        let what = |_| What::Settle(expectation, numbers, unit);
        self.send(CMD_READ, ("read after a change", 0), range, &[], what)
    }

    /// Whether a change of this range may be sent while others of the same bytes are in
    /// flight. Few do, for what comes of them is known less exactly.
    pub fn may_meet(&mut self, range: &Range<u64>) -> bool {
        let is_in_the_way = |request: &Request| {
            let is_large = request.name.starts_with("large");
            request.keeps_others_out_of(range)
                && (is_large || matches!(request.what, What::Settle(..)))
        };
        let torn = self.torn.iter().flat_map(|torn| torn.requests.values());
        let in_the_way = self.in_flight.values().any(is_in_the_way)
            || torn
                .into_iter()
                .any(|request| request.keeps_others_out_of(range));
        !in_the_way && self.met.len() < 4 && self.random.once_in(2)
    }

    /// Takes note of the changes in flight that a new one meets.
    pub fn note_who_meets(&mut self, number: u64, change: &Change) {
        let is_met = |request: &Request| {
            matches!(request.what, What::Change(_)) && overlap(&request.range, &change.range)
        };
        let others = self.in_flight.iter().filter(|(_, request)| is_met(request));
        let others: Vec<_> = others
            .map(|(number, request)| (*number, request.changes()[0].clone()))
            .collect();
        let waits = self
            .met
            .iter()
            .any(|met| overlap(&met.change.range, &change.range));
        if others.is_empty() && !waits {
            return;
        }
        for (number, change) in others.into_iter().chain([(number, change.clone())]) {
            if self.met.iter().all(|met| met.number != number) {
                self.met.push(Met {
                    number,
                    change,
                    is_over: false,
                });
            }
        }
    }

    /// A change is over, and may have been done or not; one that others have met waits for
    /// them.
    pub fn over(&mut self, number: u64, change: Change, unit: u64) -> Result {
        let Some(met) = self.met.iter_mut().find(|met| met.number == number) else {
            self.settle(vec![number], change.range.clone(), &[change], unit)?;
            self.look_if_settled(number);
            return Ok(());
        };
        met.is_over = true;
        if self.met.iter().any(|met| !met.is_over) {
            return Ok(());
        }
        let met = std::mem::take(&mut self.met);
        let numbers: Vec<u64> = met.iter().map(|met| met.number).collect();
        let changes: Vec<_> = met.into_iter().map(|met| met.change).collect();
        // Each byte once, whoever has changed it.
        let mut ranges: Vec<_> = changes.iter().map(|change| change.range.clone()).collect();
        ranges.sort_by_key(|range| range.start);
        let mut end = 0;
        for range in ranges {
            let range = range.start.max(end)..range.end;
            end = end.max(range.end);
            self.settle(numbers.clone(), range, &changes, 1)?;
        }
        numbers
            .iter()
            .for_each(|number| self.look_if_settled(*number));
        self.tally
            .happened("changes that have met", numbers.len() as u64);
        Ok(())
    }

    /// Whether all has been read where this change may have been done or not.
    pub fn look_if_settled(&mut self, number: u64) {
        let is_of_it = |request: &Request| matches!(&request.what, What::Settle(_, of, _) if of.contains(&number));
        if !self.in_flight.values().any(is_of_it) {
            self.region.settled(number, self.clock);
        }
    }
}
