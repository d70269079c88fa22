//! Write: whole blocks, and parts of blocks. The locking is that of [`super`].

use std::ops::Range;

use super::map::BlockMap;
use super::zero::is_full;
use super::{Overlay, State, Store};
use crate::base::{Base, Extent};
use crate::block::{BlockNum, ByteRange, Piece};
use crate::buffer::{buffer, is_zero};
use crate::error::Result;

/// What a partial write puts into its block.
#[derive(Clone, Copy)]
pub(super) enum New<'a> {
    Bytes(&'a [u8]),
    /// Zeroes; `may_trim`: they need not take space.
    Zeroes {
        may_trim: bool,
    },
}

impl<S: Store> Overlay<S> {
    /// Writes `buf` at `offset`.
    pub fn write(&self, base: &impl Base, buf: &[u8], offset: u64) -> Result<()> {
        let range = ByteRange::checked(offset, buf.len() as u64, self.size)?;
        let is_traced = log::log_enabled!(log::Level::Trace);
        // The most frequent case pays for no splitting.
        if self.block_size.is_whole(range, self.size) && !is_traced {
            let blocks = self.block_size.touched_by(range);
            let _held = self.stripes.shared(&blocks);
            return self.store_blocks(&blocks, buf);
        }
        let base = &self.halves(base, range)?;
        for piece in self.block_size.pieces(range, self.size) {
            if is_traced {
                trace_write(piece.clone());
            }
            match piece {
                Piece::Partial { block, bytes } => {
                    self.modify(
                        base,
                        block,
                        bytes,
                        New::Bytes(&buf[bytes.in_buffer(offset)]),
                    )?;
                }
                Piece::Whole { blocks, bytes } => {
                    let _held = self.stripes.shared(&blocks);
                    self.store_blocks(&blocks, &buf[bytes.in_buffer(offset)])?;
                }
            }
        }
        Ok(())
    }

    /// `base`, for a request that changes `range`. If that is a part of one block and a
    /// part of the next, both of them *base*, the bytes around it are fetched now, in
    /// one call: with a slow base two calls cost twice as much.
    ///
    /// That a block becomes something else meanwhile is seen where it is changed, as
    /// always.
    pub(super) fn halves<'a, B: Base>(
        &self,
        base: &'a B,
        range: ByteRange,
    ) -> Result<Halves<'a, B>> {
        let blocks = self.block_size.touched_by(range);
        let span = self.bytes_of(&blocks);
        let is_two = blocks.end.0 - blocks.start.0 == 2
            && span.start < range.start
            && range.end < span.end
            && span.len() <= MAX_HALVES;
        let mut halves = Halves {
            base,
            span,
            bytes: Vec::new(),
        };
        if is_two && self.map.run(&blocks)? == (State::Base, blocks.end) {
            halves.bytes = buffer(span.len())?;
            base.read(&mut halves.bytes, span.start)?;
        }
        Ok(halves)
    }

    /// Changes `bytes` of `block`, which has others that must stay as they are.
    pub(super) fn modify(
        &self,
        base: &impl Base,
        block: BlockNum,
        bytes: ByteRange,
        new: New<'_>,
    ) -> Result<()> {
        let blocks = block..block.next();
        let before = {
            let _held = self.stripes.shared(&blocks);
            match self.map.state(block)? {
                State::Data => return self.modify_in_place(bytes, new),
                // Right whatever others do meanwhile: at this moment the block
                // was zeroes, and that is where this request is in the order.
                State::Zero if matches!(new, New::Zeroes { may_trim: true }) => return Ok(()),
                before => before,
            }
        };

        let whole = self.bytes_of(&blocks);
        let mut block_bytes = buffer(whole.len())?;
        if before == State::Base {
            read_around(base, &mut block_bytes, whole, bytes)?;
        }

        let _held = self.stripes.exclusive(&blocks);
        match self.map.state(block)? {
            State::Data => return self.modify_in_place(bytes, new),
            State::Zero if before == State::Base => block_bytes.fill(0),
            State::Zero | State::Base => {}
        }
        let target = &mut block_bytes[bytes.in_buffer(whole.start)];
        match new {
            New::Bytes(client) => target.copy_from_slice(client),
            New::Zeroes { .. } => target.fill(0),
        }
        if matches!(new, New::Zeroes { may_trim: false }) {
            // The client wants the space: a block that is all zeroes is stored too.
            return self.store_run(&blocks, &block_bytes, whole.start);
        }
        self.store_blocks(&blocks, &block_bytes)
    }

    /// Changes bytes of a *data* block. The caller holds its stripe, shared at least.
    fn modify_in_place(&self, bytes: ByteRange, new: New<'_>) -> Result<()> {
        match new {
            New::Bytes(client) => self.change(|store| store.write(client, bytes.start)),
            // Not a hole, though the client may allow it: a block that is *data* keeps
            // all of its space, so that a later write can't run out of it half way.
            New::Zeroes { .. } => self.write_zeroes(bytes),
        }
    }

    /// Puts `bytes`, which are all those of `blocks`, into the store, and publishes.
    /// The caller holds the stripes of `blocks`, shared at least.
    ///
    /// Blocks of zeroes that have no data are not stored. Looking for them costs
    /// a word a block where there is data.
    pub(super) fn store_blocks(&self, blocks: &Range<BlockNum>, bytes: &[u8]) -> Result<()> {
        let origin = self.block_size.start_of(blocks.start);
        // Nearly every small request is one block that begins with data.
        if blocks.start.next() == blocks.end && bytes[0] != 0 {
            return self.store_run(blocks, bytes, origin);
        }
        let mut start = blocks.start;
        while start < blocks.end {
            let stored = self.must_store(start, bytes, origin)?;
            let mut end = start.next();
            while end < blocks.end && self.must_store(end, bytes, origin)? == stored {
                end = end.next();
            }
            let run = start..end;
            if stored {
                let part = self.bytes_of(&run);
                self.store_run(&run, &bytes[part.in_buffer(origin)], part.start)?;
            } else {
                self.store.reserve(&run, State::Zero)?;
                self.publish(&run, BlockMap::set_zero_unless_data)?;
            }
            start = end;
        }
        Ok(())
    }

    /// Stores all the `bytes` of `blocks`, the first of which is at `offset`.
    fn store_run(&self, blocks: &Range<BlockNum>, bytes: &[u8], offset: u64) -> Result<()> {
        self.reserve_for_data(blocks)?;
        self.change(|store| store.write(bytes, offset))?;
        self.publish(blocks, BlockMap::set_data)
    }

    /// To be called before `blocks` become *data*, with their stripes held, shared at
    /// least: so those that are *data* stay that, and of them there is note already.
    #[inline(always)]
    pub(super) fn reserve_for_data(&self, blocks: &Range<BlockNum>) -> Result<()> {
        match self.store.reserve(blocks, State::Data) {
            Err(e) if is_full(&e) && self.map.run(blocks)? == (State::Data, blocks.end) => Ok(()),
            reserved => reserved,
        }
    }

    // Here and below the compiler would make a call of what is shorter than one.
    #[inline(always)]
    fn must_store(&self, block: BlockNum, bytes: &[u8], origin: u64) -> Result<bool> {
        let part = self.bytes_of(&(block..block.next())).in_buffer(origin);
        Ok(!is_zero(&bytes[part]) || self.map.state(block)? == State::Data)
    }
}

/// Of larger blocks it would be too much that a request does not need.
const MAX_HALVES: u64 = 2 * (64 << 10);

/// A base of which some bytes may be here already: see [`Overlay::halves`].
pub(super) struct Halves<'a, B> {
    base: &'a B,
    span: ByteRange,
    /// Those of `span`, or none.
    bytes: Vec<u8>,
}

impl<B: Base> Base for Halves<'_, B> {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if self.bytes.is_empty() {
            return self.base.read(buf, offset);
        }
        // Nothing else is asked for: both blocks lie within the span.
        let at = (offset - self.span.start) as usize;
        buf.copy_from_slice(&self.bytes[at..at + buf.len()]);
        Ok(())
    }

    fn cache(&self, range: ByteRange) -> Result<()> {
        self.base.cache(range)
    }

    fn extents(&self, range: ByteRange, only_first: bool, list: &mut Vec<Extent>) -> Result<()> {
        self.base.extents(range, only_first, list)
    }
}

/// Fills `buf`, which stands for the block `whole`, with what the base has of it
/// around `bytes`. One call: with a slow base the number of calls is what costs.
fn read_around(base: &impl Base, buf: &mut [u8], whole: ByteRange, bytes: ByteRange) -> Result<()> {
    let mut missing = whole;
    if bytes.start == whole.start {
        missing.start = bytes.end;
    } else if bytes.end == whole.end {
        missing.end = bytes.start;
    }
    base.read(&mut buf[missing.in_buffer(whole.start)], missing.start)
}

// By value and out of line, as in [`super`].

#[cold]
#[inline(never)]
fn trace_write(piece: Piece) {
    log::trace!("write {piece:?}");
}
