//! Every file that a crash could leave of what was recorded.
//!
//! A crash may come after any event. What was made safe before is there; of what
//! was not, any part may be, sector by sector. All combinations are tried where
//! they are few, else those that find most, and random ones.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::content::{Change, Content, SECTOR, Sector};
use super::random::Random;
use super::recorder::Event;
use crate::disk::TestBase;

/// How much is tried.
#[derive(Clone, Copy)]
pub struct Bound {
    /// Of so many parts all combinations.
    pub all_of: usize,
    /// Else so many combinations after an event.
    pub combinations: usize,
    /// Only after every n-th event, and after flushes.
    pub every: usize,
}

/// What sectors of the disk may hold after a crash: what they had at the last flush,
/// or what they were asked to become since.
#[derive(Clone)]
pub struct Allowed<'a> {
    base: &'a TestBase,
    block: u64,
    /// By number: what it may be, and since which request; oldest first. All sectors of
    /// blocks that were touched are here.
    sectors: BTreeMap<u64, Vec<(usize, Arc<Sector>)>>,
    asked: usize,
}

/// What the base has; beyond its end zeroes.
pub fn base_sector(base: &TestBase, number: u64) -> Sector {
    std::array::from_fn(|i| {
        let at = number * SECTOR + i as u64;
        if at < base.size { base.byte(at) } else { 0 }
    })
}

impl<'a> Allowed<'a> {
    /// `start`: what was there before, where it is not what the base has.
    pub fn new(base: &'a TestBase, block: u64, start: &BTreeMap<u64, Arc<Sector>>) -> Self {
        let mut allowed = Allowed {
            base,
            block,
            sectors: BTreeMap::new(),
            asked: 0,
        };
        for (number, sector) in start {
            allowed.touch(*number);
            allowed
                .sectors
                .insert(*number, vec![(0, Arc::clone(sector))]);
        }
        allowed
    }

    fn touch(&mut self, number: u64) {
        if self.sectors.contains_key(&number) {
            return;
        }
        let per_block = self.block / SECTOR;
        let first = number / per_block * per_block;
        let end = (first + per_block).min(self.base.size.div_ceil(SECTOR));
        for number in first..end {
            let sector = Arc::new(base_sector(self.base, number));
            self.sectors.entry(number).or_insert(vec![(0, sector)]);
        }
    }

    fn ask(&mut self, sectors: &[(u64, Arc<Sector>)]) {
        self.asked += 1;
        for (number, sector) in sectors {
            self.touch(*number);
            let versions = self.sectors.get_mut(number).expect("touched");
            versions.push((self.asked, Arc::clone(sector)));
        }
    }

    fn flush(&mut self, asked: usize, is_covered: impl Fn(u64) -> bool) {
        let covered = self
            .sectors
            .iter_mut()
            .filter(|(number, _)| is_covered(**number));
        for (_, versions) in covered {
            // None: a later flush was told of first.
            let last = versions.iter().rposition(|version| version.0 <= asked);
            versions.drain(..last.unwrap_or_default());
        }
    }

    /// The sectors that can't but be what the base has are not among them.
    pub fn numbers(&self) -> impl Iterator<Item = u64> {
        self.sectors.keys().copied()
    }

    pub fn touches(&self, block: u64) -> bool {
        self.sectors.contains_key(&(block * self.block / SECTOR))
    }

    pub fn expect(&self, number: u64, found: &Sector) -> Result<(), String> {
        let versions = &self.sectors[&number];
        if versions
            .iter()
            .rev()
            .any(|(_, version)| **version == *found)
        {
            return Ok(());
        }
        let bad = (0..SECTOR as usize)
            .find(|&i| versions.iter().all(|(_, version)| version[i] != found[i]));
        let Some(i) = bad else { return Ok(()) };
        let possible: Vec<u8> = versions.iter().map(|(_, version)| version[i]).collect();
        Err(format!(
            "byte {} of the disk is {}, not one of {possible:?} (the base has {})",
            number * SECTOR + i as u64,
            found[i],
            base_sector(self.base, number)[i]
        ))
    }
}

/// A sector's part of a change.
struct Part {
    change: Change,
    /// The event that it belongs to.
    event: usize,
    is_safe: bool,
}

/// Calls `visit` with each file, and with what the disk in it may be. `owner` tells
/// whose a sector is, for flushes that one client can speak of.
pub fn explore<'a>(
    start: &Content,
    before: Allowed<'a>,
    events: &[Event],
    bound: Bound,
    random: &mut Random,
    owner: impl Fn(u64) -> u64,
    visit: &mut dyn FnMut(&Content, &Allowed<'a>) -> Result<(), String>,
) -> Allowed<'a> {
    let mut safe = start.clone();
    let mut newest = start.clone();
    let mut parts: Vec<Part> = Vec::new();
    let mut allowed = before;
    for (number, event) in events.iter().enumerate() {
        // The parts that a combination must have one of, to be a new one.
        let mut fresh = None;
        match event {
            Event::Asked(sectors) => {
                allowed.ask(sectors);
                continue;
            }
            Event::Changed(change) | Event::ChangedSafely(change) => {
                let is_safe = matches!(event, Event::ChangedSafely(_));
                let first = parts.len();
                parts.extend(change.torn(&newest).into_iter().map(|change| Part {
                    change,
                    event: number,
                    is_safe,
                }));
                newest.apply(change);
                if !is_safe {
                    fresh = Some(first..parts.len());
                }
            }
            Event::Synced { before } => {
                for part in parts.iter_mut().filter(|part| part.event < *before) {
                    part.is_safe = true;
                }
                let count = parts.iter().take_while(|part| part.is_safe).count();
                for part in parts.drain(..count) {
                    safe.apply(&part.change);
                }
                continue;
            }
            Event::Flushed { asked, owner: None } => allowed.flush(*asked, |_| true),
            Event::Flushed {
                asked,
                owner: Some(one),
            } => allowed.flush(*asked, |number| owner(number) == *one),
        }
        if number % bound.every != 0 && !matches!(event, Event::Flushed { .. }) {
            continue;
        }
        for chosen in combinations(&parts, fresh, bound, random) {
            let mut content = safe.clone();
            for (part, is_there) in parts.iter().zip(&chosen) {
                if *is_there {
                    content.apply(&part.change);
                }
            }
            if let Err(what) = visit(&content, &allowed) {
                panic!("{what}\n{}", describe(events, number, &parts, &chosen));
            }
        }
    }
    allowed
}

fn describe(events: &[Event], number: usize, parts: &[Part], chosen: &[bool]) -> String {
    let mut told = format!("A crash after event {number} of {}, with", events.len());
    for (part, is_there) in parts.iter().zip(chosen) {
        let range = part.change.range();
        let what = match part.change {
            Change::Write { .. } => "write",
            Change::Zero(_) => "hole",
            Change::Grow(_) => "growth",
            Change::Cut(_) => "cut",
        };
        told += &format!(
            "\n  {} of event {}: {what}, {:#x}..{:#x}",
            if *is_there { "all" } else { "nothing" },
            part.event,
            range.start,
            range.end
        );
    }
    told
}

/// For each combination, which parts are there.
fn combinations(
    parts: &[Part],
    fresh: Option<Range<usize>>,
    bound: Bound,
    random: &mut Random,
) -> Vec<Vec<bool>> {
    let free: Vec<usize> = (0..parts.len()).filter(|i| !parts[*i].is_safe).collect();
    let mut found = Vec::new();
    let mut add = |is_there: &mut dyn FnMut(usize) -> bool| {
        let chosen: Vec<bool> = (0..parts.len())
            .map(|i| parts[i].is_safe || is_there(i))
            .collect();
        let is_new = fresh
            .as_ref()
            .is_none_or(|fresh| chosen[fresh.clone()].contains(&true));
        if is_new {
            found.push(chosen);
        }
    };
    if free.len() <= bound.all_of {
        for mask in 0..1u32 << free.len() {
            add(&mut |i| {
                free.binary_search(&i)
                    .is_ok_and(|bit| (mask >> bit) & 1 != 0)
            });
        }
        return found;
    }
    let fresh = fresh.clone().unwrap_or(0..0);
    add(&mut |_| true);
    add(&mut |_| false);
    add(&mut |i| fresh.contains(&i));
    for turn in 0..bound.combinations {
        let (one, other) = (random.among(&free), random.among(&free));
        let seed = random.next();
        match turn % 6 {
            // Any parts, any events as a whole, one of them, two, all but one, and a
            // new one with what else there is.
            0 => add(&mut |i| Random::new(seed ^ i as u64).below(2) == 0),
            1 => add(&mut |i| Random::new(seed ^ parts[i].event as u64).below(2) == 0),
            2 => add(&mut |i| i == one || (fresh.contains(&i) && i != other)),
            3 => add(&mut |i| i == one || i == other),
            4 => add(&mut |i| i != one),
            _ => add(&mut |i| !fresh.contains(&i) || Random::new(seed ^ i as u64).below(2) == 0),
        }
    }
    found
}
