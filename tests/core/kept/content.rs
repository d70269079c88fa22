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
    /// Makes the file longer where it has to.
    Write { offset: u64, bytes: Vec<u8> },
    /// What lies beyond the end stays beyond it.
    Zero(Range<u64>),
    /// The file is this long at least.
    Grow(u64),
    /// The file is this long at most.
    Cut(u64),
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
            // From where the file does not have what it had.
            Change::Grow(size) | Change::Cut(size) => *size..*size,
        }
    }

    /// The parts that a crash does or does not leave, where the file was `newest`. Zeroes
    /// over what that does not hold change nothing. A write beyond the end may have made
    /// the file longer, and nothing of it is there.
    pub fn torn(&self, newest: &Content) -> Vec<Change> {
        let parts = by_sectors(self.range());
        match self {
            Change::Write { offset, bytes } => {
                let end = self.range().end;
                let longer = (end > newest.size).then_some(Change::Grow(end));
                let written = parts.map(|part| {
                    let place = (part.start - offset) as usize..(part.end - offset) as usize;
                    Change::Write {
                        offset: part.start,
                        bytes: bytes[place].to_vec(),
                    }
                });
                longer.into_iter().chain(written).collect()
            }
            Change::Zero(_) => parts
                .filter(|part| newest.sectors.contains_key(&(part.start / SECTOR)))
                .map(Change::Zero)
                .collect(),
            Change::Grow(_) | Change::Cut(_) => vec![self.clone()],
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
        match change {
            Change::Write { offset, bytes } => self.write(bytes, *offset),
            Change::Zero(range) => self.zero(range.clone()),
            Change::Grow(size) => self.size = self.size.max(*size),
            Change::Cut(size) if *size < self.size => {
                self.zero(*size..self.size);
                self.size = *size;
            }
            Change::Cut(_) => {}
        }
    }

    pub fn write(&mut self, bytes: &[u8], offset: u64) {
        let range = offset..offset + bytes.len() as u64;
        self.size = self.size.max(range.end);
        for part in by_sectors(range) {
            let from = (part.start - offset) as usize..(part.end - offset) as usize;
            self.place(part).copy_from_slice(&bytes[from]);
        }
    }

    fn zero(&mut self, range: Range<u64>) {
        let range = range.start..range.end.min(self.size);
        let sectors = range.start / SECTOR..range.end.div_ceil(SECTOR);
        // A hole may be long, and there may be little in it.
        let touched: Vec<u64> = match sectors.is_empty() {
            true => Vec::new(),
            false => self.sectors.range(sectors).map(|(n, _)| *n).collect(),
        };
        for number in touched {
            let start = range.start.max(number * SECTOR);
            let end = range.end.min((number + 1) * SECTOR);
            match end - start {
                SECTOR => drop(self.sectors.remove(&number)),
                _ => self.place(start..end).fill(0),
            }
        }
    }

    /// The bytes of `part`, which lies in one sector.
    fn place(&mut self, part: Range<u64>) -> &mut [u8] {
        let sector = self
            .sectors
            .entry(part.start / SECTOR)
            .or_insert_with(|| Arc::new([0; SECTOR as usize]));
        let at = (part.start % SECTOR) as usize;
        &mut Arc::make_mut(sector)[at..at + (part.end - part.start) as usize]
    }
}
