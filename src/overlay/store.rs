//! Where an overlay keeps the bytes of its *data* blocks, as the core sees it.

use std::ops::Range;

use super::budget::Share;
use crate::block::{BlockNum, ByteRange};
use crate::error::Result;

/// What is going to become of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// *Data*.
    Data,
    /// *Data* or *zero*, by a copy of the base, which nobody has asked for.
    Copy,
    /// *Zero*, which takes no space but that of the tables.
    Zero,
}

impl Purpose {
    /// How much of the limit may be used for it.
    pub fn share(self) -> Share {
        match self {
            Purpose::Copy => Share::Half,
            Purpose::Data | Purpose::Zero => Share::All,
        }
    }
}

/// Where an overlay keeps its bytes. A trait, so that tests can make each
/// operation fail or wait.
pub trait Store: Send + Sync {
    /// Fills `buf` from `offset`. Bytes that were never written read as zeroes.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes all of `buf` at `offset`.
    fn write(&self, buf: &[u8], offset: u64) -> Result<()>;

    /// Makes `range` read as zeroes and gives its space back. `false`: can't be
    /// done here, and nothing has changed.
    fn punch(&self, range: ByteRange) -> Result<bool>;

    /// The first byte at or behind `offset` that may take space: what lies between is a
    /// hole, and need not be punched. `None`: not known.
    fn next_stored(&self, _offset: u64) -> Option<u64> {
        None
    }

    /// Makes `range` read as zeroes and keeps or takes space for it, without
    /// writing them. `false`: can't be done here, and nothing has changed.
    fn zero_range(&self, range: ByteRange) -> Result<bool>;

    /// Whether [`Store::zero_range`] works here.
    fn can_zero_range(&self) -> bool;

    /// To be called before `blocks` change, and before bytes are written that are to be
    /// *data*: takes the space that keeping note of it needs, if it needs any.
    fn reserve(&self, _blocks: &Range<BlockNum>, _purpose: Purpose) -> Result<()> {
        Ok(())
    }

    /// Has `change` change the states of `blocks` in the block map, as a whole or in
    /// parts, one after the other. It tells whether there was anything to change.
    ///
    /// A store that keeps what is written must know what has changed since the last
    /// flush; one that doesn't has nothing to do.
    fn publish(
        &self,
        blocks: &Range<BlockNum>,
        change: impl Fn(&Range<BlockNum>) -> Result<bool>,
    ) -> Result<()> {
        change(blocks).map(drop)
    }

    /// The end of the part that has `block` and in which [`Store::publish`] has blocks
    /// changed at once.
    fn publish_end(&self, _block: BlockNum) -> BlockNum {
        BlockNum(u64::MAX)
    }

    /// Makes what was written before safe from power loss, if the store is kept at
    /// all. `word` looks a word of the block map up, by its number.
    fn flush(&self, _word: &dyn Fn(u64) -> u64) -> Result<()> {
        Ok(())
    }

    /// How many flushes there were that did something, and how many shared one of those.
    fn flushes(&self) -> (u64, u64) {
        (0, 0)
    }
}
