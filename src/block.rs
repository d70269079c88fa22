//! Units: block sizes, block numbers, byte ranges; and the one splitter.
//!
//! A block number and a byte offset are both 64-bit numbers, and adding one to
//! the other is always a bug, so they are different types. A request is split
//! here and nowhere else, into at most three [`Piece`]s: a partial block, whole
//! blocks, a partial block. The last block of a disk may be shorter than the
//! others; a piece that covers it up to the end of the disk is *whole*, because
//! no byte of the base would survive in it.

use std::fmt;
use std::ops::Range;

use crate::error::{Error, Result};

/// A power of two from 512 to 2G: the unit of the block map, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSize {
    shift: u32,
}

impl BlockSize {
    /// 512, a disk's sector.
    pub const MIN: u64 = 1 << 9;
    /// 2G: the largest power of two that is a 32-bit count of bytes.
    pub const MAX: u64 = 1 << 31;

    /// `None` if `bytes` is no power of two or out of range.
    pub fn new(bytes: u64) -> Option<Self> {
        (bytes.is_power_of_two() && (Self::MIN..=Self::MAX).contains(&bytes)).then(|| BlockSize {
            shift: bytes.trailing_zeros(),
        })
    }

    /// Bytes in a block.
    pub fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// The block that holds the byte at `offset`.
    pub fn block_of(self, offset: u64) -> BlockNum {
        BlockNum(offset >> self.shift)
    }

    /// How many blocks a disk of `size` bytes has, the short last one included.
    pub fn count(self, size: u64) -> BlockNum {
        BlockNum(size.div_ceil(self.bytes()))
    }

    /// The offset in bytes at which `block` starts.
    pub fn start_of(self, block: BlockNum) -> u64 {
        block.0 << self.shift
    }

    /// The bytes of `blocks`, cut at the end of a disk of `size` bytes.
    pub fn bytes_of(self, blocks: &Range<BlockNum>, size: u64) -> ByteRange {
        ByteRange {
            start: self.start_of(blocks.start),
            end: size.min(self.start_of(blocks.end)),
        }
    }

    /// All blocks that `range` touches.
    pub fn touched_by(self, range: ByteRange) -> Range<BlockNum> {
        if range.is_empty() {
            let block = self.block_of(range.start);
            return block..block;
        }
        self.block_of(range.start)..self.block_of(range.end - 1).next()
    }

    /// Whether `range`, which lies within a disk of `size` bytes, has blocks and has all
    /// bytes of each: it is one [`Piece::Whole`].
    pub fn is_whole(self, range: ByteRange, size: u64) -> bool {
        let mask = self.bytes() - 1;
        !range.is_empty() && range.start & mask == 0 && (range.end & mask == 0 || range.end == size)
    }

    /// Splits `range`, which lies within a disk of `size` bytes: see [`Piece`].
    pub fn pieces(self, range: ByteRange, size: u64) -> Pieces {
        debug_assert!(range.start <= range.end && range.end <= size);
        Pieces {
            rest: range,
            size,
            block_size: self,
        }
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes().fmt(f)
    }
}

/// A block's number, counted from the start of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockNum(pub u64);

impl BlockNum {
    /// The block after this one.
    pub fn next(self) -> Self {
        BlockNum(self.0 + 1)
    }
}

/// `blocks`, one part after the other: the one that begins at a block ends at `end_of` that
/// block, or before it.
pub fn parts(
    blocks: Range<BlockNum>,
    end_of: impl Fn(BlockNum) -> BlockNum,
) -> impl Iterator<Item = Range<BlockNum>> {
    let mut rest = blocks;
    std::iter::from_fn(move || {
        if rest.start >= rest.end {
            return None;
        }
        let part = rest.start..rest.end.min(end_of(rest.start));
        rest.start = part.end;
        Some(part)
    })
}

/// Bytes of the disk, `start` included, `end` not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRange {
    pub start: u64,
    pub end: u64,
}

impl ByteRange {
    /// `len` bytes at `offset`. EINVAL if they reach past `size`: nbdkit checks
    /// requests too, but a mistake there must not become a write past the end.
    pub fn checked(offset: u64, len: u64, size: u64) -> Result<Self> {
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(ByteRange { start: offset, end }),
            _ => Err(Error::new(
                libc::EINVAL,
                format!(
                    "{len} bytes at offset {offset} reach past the end of the disk ({size} bytes)"
                ),
            )),
        }
    }

    pub fn len(self) -> u64 {
        self.end - self.start
    }

    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// The part of this range that lies in `other`; empty if they do not meet.
    pub fn clamp_to(self, other: ByteRange) -> ByteRange {
        let start = self.start.clamp(other.start, other.end);
        ByteRange {
            start,
            end: self.end.clamp(start, other.end),
        }
    }

    /// Where this range lies in a buffer whose first byte is byte `origin` of the disk.
    pub fn in_buffer(self, origin: u64) -> Range<usize> {
        (self.start - origin) as usize..(self.end - origin) as usize
    }
}

/// A part of a request that is handled in one way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Some bytes of `block`, which has others that the request leaves alone.
    Partial { block: BlockNum, bytes: ByteRange },
    /// Every byte of `blocks`.
    Whole {
        blocks: Range<BlockNum>,
        bytes: ByteRange,
    },
}

/// The pieces of a request in ascending order; see [`BlockSize::pieces`].
#[derive(Debug)]
pub struct Pieces {
    rest: ByteRange,
    size: u64,
    block_size: BlockSize,
}

impl Iterator for Pieces {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.rest.is_empty() {
            return None;
        }
        let ByteRange { start, end } = self.rest;
        let mask = self.block_size.bytes() - 1;
        let block = self.block_size.block_of(start);
        // The short last block is whole if it is covered to the end of the disk.
        let whole_end = if end == self.size { end } else { end & !mask };
        if start & mask == 0 && whole_end > start {
            self.rest.start = whole_end;
            let bytes = ByteRange {
                start,
                end: whole_end,
            };
            return Some(Piece::Whole {
                blocks: self.block_size.touched_by(bytes),
                bytes,
            });
        }
        let bytes = ByteRange {
            start,
            end: end.min((start | mask) + 1),
        };
        self.rest.start = bytes.end;
        Some(Piece::Partial { block, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(start: u64, end: u64, size: u64) -> Vec<Piece> {
        let block_size = BlockSize::new(4096).expect("4096 is a block size");
        block_size.pieces(ByteRange { start, end }, size).collect()
    }

    fn partial(block: u64, start: u64, end: u64) -> Piece {
        Piece::Partial {
            block: BlockNum(block),
            bytes: ByteRange { start, end },
        }
    }

    fn whole(blocks: Range<u64>, start: u64, end: u64) -> Piece {
        Piece::Whole {
            blocks: BlockNum(blocks.start)..BlockNum(blocks.end),
            bytes: ByteRange { start, end },
        }
    }

    #[test]
    fn block_sizes_are_powers_of_two_from_512_to_2g() {
        for good in [512, 4096, 65536, 1 << 31] {
            assert_eq!(BlockSize::new(good).map(BlockSize::bytes), Some(good));
        }
        for bad in [0, 1, 256, 3000, 513, 1 << 32, u64::MAX] {
            assert_eq!(BlockSize::new(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_request_is_split_into_head_body_and_tail() {
        assert_eq!(split(0, 0, 10000), []);
        assert_eq!(split(100, 200, 10000), [partial(0, 100, 200)]);
        assert_eq!(split(0, 4096, 10000), [whole(0..1, 0, 4096)]);
        assert_eq!(
            split(100, 8292, 20000),
            [
                partial(0, 100, 4096),
                whole(1..2, 4096, 8192),
                partial(2, 8192, 8292)
            ]
        );
        assert_eq!(
            split(4000, 4200, 20000),
            [partial(0, 4000, 4096), partial(1, 4096, 4200)]
        );
    }

    #[test]
    fn the_short_last_block_is_whole_when_covered_to_the_end_of_the_disk() {
        assert_eq!(split(8192, 10000, 10000), [whole(2..3, 8192, 10000)]);
        assert_eq!(split(8192, 9999, 10000), [partial(2, 8192, 9999)]);
        assert_eq!(split(8193, 10000, 10000), [partial(2, 8193, 10000)]);
        assert_eq!(split(0, 10000, 10000), [whole(0..3, 0, 10000)]);
        assert_eq!(split(0, 1, 1), [whole(0..1, 0, 1)]);
    }

    #[test]
    fn a_range_past_the_end_is_refused() {
        for (offset, len) in [(0, 101), (100, 1), (u64::MAX, 1), (101, 0)] {
            let error = ByteRange::checked(offset, len, 100).expect_err("past the end");
            assert_eq!(error.errno(), libc::EINVAL);
        }
        assert!(ByteRange::checked(100, 0, 100).is_ok());
    }

    proptest! {
        #[test]
        fn pieces_cover_the_request_once_and_in_order(
            shift in 9u32..20, size in 0u64..5_000_000, a in any::<u64>(), b in any::<u64>()
        ) {
            let (a, b) = (a % (size + 1), b % (size + 1));
            let range = ByteRange { start: a.min(b), end: a.max(b) };
            let block_size = BlockSize::new(1 << shift).expect("in range");
            let mut at = range.start;
            let mut count = 0;
            let pieces: Vec<Piece> = block_size.pieces(range, size).collect();
            prop_assert_eq!(
                block_size.is_whole(range, size),
                matches!(&pieces[..], [Piece::Whole { .. }])
            );
            for piece in block_size.pieces(range, size) {
                count += 1;
                match piece {
                    Piece::Partial { block, bytes } => {
                        prop_assert_eq!(bytes.start, at);
                        prop_assert_eq!(block_size.touched_by(bytes), block..block.next());
                        prop_assert!(bytes.len() < block_size.bytes());
                        at = bytes.end;
                    }
                    Piece::Whole { blocks, bytes } => {
                        prop_assert_eq!(bytes.start, at);
                        prop_assert_eq!(block_size.bytes_of(&blocks, size), bytes);
                        prop_assert!(!bytes.is_empty());
                        at = bytes.end;
                    }
                }
            }
            prop_assert_eq!(at, range.end);
            prop_assert!(count <= 3);
        }
    }
}
