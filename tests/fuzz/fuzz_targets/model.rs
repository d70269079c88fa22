//! What the disk should hold: the image as the specification reads it when the
//! overlay was opened, and the blocks that requests have changed since.

use std::collections::BTreeMap;

use nbdkit_cow_filter::base::{Allocation, Base, Extent};
use nbdkit_cow_filter::block::ByteRange;
use nbdkit_cow_filter::buffer::is_zero;
use nbdkit_cow_filter::error::Result;

use crate::memory::Sparse;
use crate::spec::{Found, Qcow2};

/// A base of any size, from a formula. Some sectors are zeroes.
pub struct FormulaBase {
    pub size: u64,
}

/// (Without a branch: the fuzzer's eyes are on each.)
fn base_byte(at: u64) -> u8 {
    const MASKS: [u8; 7] = [255, 255, 255, 255, 255, 0, 255];
    let sector = at / 512;
    ((at ^ (at >> 8) ^ (at >> 16) ^ sector) as u8 | 1) & MASKS[(sector % 7) as usize]
}

impl Base for FormulaBase {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = ByteRange::checked(offset, buf.len() as u64, self.size)?;
        for (at, byte) in (range.start..).zip(buf) {
            *byte = base_byte(at);
        }
        Ok(())
    }

    fn cache(&self, range: ByteRange) -> Result<()> {
        assert!(range.start <= range.end && range.end <= self.size);
        Ok(())
    }

    fn extents(&self, range: ByteRange, _only_first: bool, list: &mut Vec<Extent>) -> Result<()> {
        list.push(Extent {
            bytes: range,
            allocation: Allocation::DATA,
        });
        Ok(())
    }
}

pub struct Model {
    /// The file when the overlay was opened.
    opened: Sparse,
    /// The disk's exact size.
    pub size: u64,
    pub block: u64,
    /// Blocks that were changed since, by number; `None` is zeroes.
    changed: BTreeMap<u64, Option<Vec<u8>>>,
}

impl Model {
    pub fn new(opened: Sparse, size: u64, block: u64) -> Self {
        Model {
            opened,
            size,
            block,
            changed: BTreeMap::new(),
        }
    }

    pub fn bytes_of(&self, block: u64) -> ByteRange {
        let start = block * self.block;
        ByteRange {
            start,
            end: self.size.min(start + self.block),
        }
    }

    /// The blocks that `range` touches.
    fn touched(&self, range: ByteRange) -> std::ops::Range<u64> {
        range.start / self.block..range.end.div_ceil(self.block)
    }

    pub fn is_changed(&self, block: u64) -> bool {
        self.changed.contains_key(&block)
    }

    pub fn changed(&self) -> impl Iterator<Item = u64> + '_ {
        self.changed.keys().copied()
    }

    /// The bytes of `part`, which lies within `block`.
    fn part(&self, image: &Qcow2, block: u64, part: ByteRange) -> Vec<u8> {
        let start = self.bytes_of(block).start;
        match self.changed.get(&block) {
            Some(Some(bytes)) => bytes[part.in_buffer(start)].to_vec(),
            Some(None) => vec![0; part.len() as usize],
            None => spec_bytes(&self.opened, image, part),
        }
    }

    pub fn read(&self, range: ByteRange) -> Vec<u8> {
        let image = Qcow2::open(&self.opened);
        let mut bytes = Vec::new();
        for block in self.touched(range) {
            bytes.extend(self.part(&image, block, self.bytes_of(block).clamp_to(range)));
        }
        bytes
    }

    pub fn write(&mut self, bytes: &[u8], at: u64) {
        let range = ByteRange {
            start: at,
            end: at + bytes.len() as u64,
        };
        self.change(range, |part, old| {
            old.copy_from_slice(&bytes[part.in_buffer(at)]);
        });
    }

    pub fn zero(&mut self, range: ByteRange) {
        self.change(range, |_, old| old.fill(0));
    }

    fn change(&mut self, range: ByteRange, put: impl Fn(ByteRange, &mut [u8])) {
        for block in self.touched(range) {
            let of_block = self.bytes_of(block);
            let part = of_block.clamp_to(range);
            if part.is_empty() {
                continue;
            }
            let mut bytes = if part == of_block {
                vec![0; of_block.len() as usize]
            } else {
                self.part(&Qcow2::open(&self.opened), block, of_block)
            };
            put(part, &mut bytes[part.in_buffer(of_block.start)]);
            self.changed
                .insert(block, (!is_zero(&bytes)).then_some(bytes));
        }
    }

    /// A part of `block` at its start and one at its end: what is not whole shows
    /// there, and an input with many blocks does not take all day.
    pub fn samples(&self, block: u64) -> [ByteRange; 2] {
        const LEN: u64 = 24;
        let ByteRange { start, end } = self.bytes_of(block);
        [
            ByteRange {
                start,
                end: end.min(start + LEN),
            },
            ByteRange {
                start: start.max(end.saturating_sub(LEN)),
                end,
            },
        ]
    }
}

/// Bytes of one block, as the specification has `file` read.
pub fn spec_bytes(file: &Sparse, image: &Qcow2, range: ByteRange) -> Vec<u8> {
    let mut bytes = vec![0; range.len() as usize];
    match image.lookup(range.start) {
        Found::Zero => {}
        Found::Base => {
            for (at, byte) in (range.start..).zip(&mut bytes) {
                *byte = base_byte(at);
            }
        }
        Found::Data(host) => file.read(&mut bytes, host + range.start % image.block()),
    }
    bytes
}
