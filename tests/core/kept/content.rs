//! What a file holds, by sectors, and the changes that are made to it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// What a disk writes as a whole, also when its power fails.
pub const SECTOR: u64 = 512;
pub type Sector = [u8; SECTOR as usize];

/// A sparse file. Sectors that are not there are zeroes.
#[derive(Clone, Default)]
pub struct Content {
    pub size: u64,
    sectors: BTreeMap<u64, Arc<Sector>>,
}

/// Offsets are those in the file, in bytes.
#[derive(Debug, Clone)]
pub enum Change {
    Write { offset: u64, bytes: Vec<u8> },
    Zero(Range<u64>),
}

/// `range` cut at the sectors' ends.
fn by_sectors(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let sectors = range.start / SECTOR..range.end.div_ceil(SECTOR);
    sectors.map(move |n| range.start.max(n * SECTOR)..range.end.min((n + 1) * SECTOR))
}

impl Change {
    pub fn range(&self) -> Range<u64> {
        match self {
            Change::Write { offset, bytes } => *offset..offset + bytes.len() as u64,
            Change::Zero(range) => range.clone(),
        }
    }

    /// The parts that a crash does or does not leave. Zeroes over what `newest` does
    /// not hold change nothing.
    pub fn torn(&self, newest: &Content) -> Vec<Change> {
        let parts = by_sectors(self.range());
        match self {
            Change::Write { offset, bytes } => parts
                .map(|part| {
                    let place = (part.start - offset) as usize..(part.end - offset) as usize;
                    Change::Write {
                        offset: part.start,
                        bytes: bytes[place].to_vec(),
                    }
                })
                .collect(),
            Change::Zero(_) => parts
                .filter(|part| newest.sectors.contains_key(&(part.start / SECTOR)))
                .map(Change::Zero)
                .collect(),
        }
    }
}

impl Content {
    pub fn read(&self, buf: &mut [u8], offset: u64) {
        for part in by_sectors(offset..offset + buf.len() as u64) {
            let target = &mut buf[(part.start - offset) as usize..(part.end - offset) as usize];
            match self.sectors.get(&(part.start / SECTOR)) {
                Some(sector) => {
                    let at = (part.start % SECTOR) as usize;
                    target.copy_from_slice(&sector[at..at + target.len()]);
                }
                None => target.fill(0),
            }
        }
    }

    pub fn bytes(&self, range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.read(&mut bytes, range.start);
        bytes
    }

    /// The sectors of `range` that are there, with their offsets.
    pub fn present(&self, range: Range<u64>) -> impl Iterator<Item = (u64, &Sector)> {
        let sectors = range.start.div_ceil(SECTOR)..range.end.div_ceil(SECTOR);
        self.sectors
            .range(sectors)
            .map(|(number, sector)| (number * SECTOR, &**sector))
    }

    /// The first byte at or behind `offset` that is there, if there is one.
    pub fn next_present(&self, offset: u64) -> Option<u64> {
        let (number, _) = self.sectors.range(offset / SECTOR..).next()?;
        Some(offset.max(number * SECTOR))
    }

    pub fn apply(&mut self, change: &Change) {
        let range = change.range();
        assert!(range.end <= self.size, "the file does not grow: {range:?}");
        for part in by_sectors(range.clone()) {
            let number = part.start / SECTOR;
            let is_whole = part.end - part.start == SECTOR;
            if is_whole && matches!(change, Change::Zero(_)) {
                self.sectors.remove(&number);
                continue;
            }
            let sector = self
                .sectors
                .entry(number)
                .or_insert_with(|| Arc::new([0; SECTOR as usize]));
            let at = (part.start % SECTOR) as usize;
            let target = &mut Arc::make_mut(sector)[at..at + (part.end - part.start) as usize];
            match change {
                Change::Write { offset, bytes } => {
                    let from = (part.start - offset) as usize;
                    target.copy_from_slice(&bytes[from..from + target.len()]);
                }
                Change::Zero(_) => target.fill(0),
            }
        }
    }
}
