//! Writing: what a hold of the stripes does to whole blocks and to parts of blocks. When
//! it is done, and under which hold, is decided in [`super::change`].

use std::ops::Range;

use super::change::stored_or_deferred;
use super::content::Content;
use super::map::BlockMap;
use super::stripes::{Exclusive, Held};
use super::{Overlay, Purpose, State, Store};
use crate::base::Base;
use crate::block::{BlockNum, ByteRange, Piece, parts};
use crate::buffer::{buffer, is_zero};
use crate::error::{Error, Result};

/// What is stored is a copy of the base, or what a client has sent. Known when the code is
/// compiled, so that nobody pays for it who has no limit.
pub(super) const COPY: bool = true;
pub(super) const SENT: bool = false;

impl<S: Store> Overlay<S> {
    /// Writes `buf` at `offset`.
    pub fn write(&self, base: &impl Base, buf: &[u8], offset: u64) -> Result<()> {
        let range = ByteRange::checked(offset, buf.len() as u64, self.size)?;
        let content = Content::Bytes {
            bytes: buf,
            origin: offset,
        };
        // The most frequent case pays for no splitting.
        let done = if self.block_size.is_whole(range, self.size)
            && !log::log_enabled!(log::Level::Trace)
        {
            let blocks = self.block_size.touched_by(range);
            let progress = self.reclaim.progress();
            let stored = self.stripes.shared(&blocks, |held| {
                let stored = self.store_blocks::<SENT, _>(held, &blocks, buf);
                stored_or_deferred(held, range, stored)
            });
            match stored {
                Ok(()) => return Ok(()),
                Err(not_stored) => self.store_later(&blocks, content, not_stored, progress),
            }
        } else {
            self.change(base, range, content)
        };
        self.give_back_if_failed(range, done)
    }

    /// Changes `bytes` of `block`. `block_bytes` is room for the whole block; if the block
    /// is *base*, it has the base's bytes around those that change.
    pub(super) fn put_part(
        &self,
        held: &Held<'_, Exclusive>,
        block: BlockNum,
        bytes: ByteRange,
        block_bytes: &mut [u8],
        content: Content<'_>,
    ) -> Result<()> {
        let blocks = block..block.next();
        match self.map.state(block)? {
            State::Data => return self.change_in_place(held, bytes, content),
            State::Zero if content.may_trim() => return Ok(()),
            State::Zero => block_bytes.fill(0),
            State::Base => {}
        }
        let start = self.block_size.start_of(block);
        let target = &mut block_bytes[bytes.in_buffer(start)];
        match content.bytes(bytes) {
            Some(new) => target.copy_from_slice(new),
            None => target.fill(0),
        }
        if matches!(content, Content::Zeroes(_)) && !content.may_trim() {
            // The client wants the space: a block that is all zeroes is stored too.
            return self.store_run::<SENT, _>(held, &blocks, block_bytes, start);
        }
        self.store_blocks::<SENT, _>(held, &blocks, block_bytes)
    }

    /// Changes bytes of a *data* block.
    pub(super) fn change_in_place<How>(
        &self,
        _held: &Held<'_, How>,
        bytes: ByteRange,
        content: Content<'_>,
    ) -> Result<()> {
        match content.bytes(bytes) {
            Some(new) => self.store.write(new, bytes.start),
            // Not a hole, though the client may allow it: a block that is *data* keeps
            // all of its space, so that a later write can't run out of it half way.
            None => self.write_zeroes(bytes),
        }
    }

    /// Changes `bytes`, which may begin or end within a block of which a newer change has
    /// stored the rest: so that block is not *base*.
    pub(super) fn put_piecewise(
        &self,
        held: &Held<'_, Exclusive>,
        bytes: ByteRange,
        content: Content<'_>,
    ) -> Result<()> {
        for piece in self.block_size.pieces(bytes, self.size) {
            match piece {
                Piece::Whole { blocks, .. } => self.put_blocks(held, &blocks, content)?,
                Piece::Partial { block, bytes } => {
                    if self.map.state(block)? == State::Base {
                        return Err(Error::new(
                            libc::EIO,
                            format!("internal error: {block:?} is base, but was stored before"),
                        ));
                    }
                    let whole = self.bytes_of(&(block..block.next()));
                    self.put_part(held, block, bytes, &mut buffer(whole.len())?, content)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn put_blocks(
        &self,
        held: &Held<'_, Exclusive>,
        blocks: &Range<BlockNum>,
        content: Content<'_>,
    ) -> Result<()> {
        match content.bytes(self.bytes_of(blocks)) {
            Some(new) => self.store_blocks::<SENT, _>(held, blocks, new),
            None if content.may_trim() => self.discard(held, blocks),
            None => self.zero_and_keep(held, blocks),
        }
    }

    /// Puts `bytes`, which are all those of `blocks`, into the store, and publishes.
    ///
    /// Blocks of zeroes that have no data are not stored. Looking for them costs
    /// a word a block where there is data.
    #[inline(always)]
    pub(super) fn store_blocks<const IS_COPY: bool, How>(
        &self,
        held: &Held<'_, How>,
        blocks: &Range<BlockNum>,
        bytes: &[u8],
    ) -> Result<()> {
        // Nearly every small request is one block that begins with data.
        if blocks.start.next() == blocks.end && bytes[0] != 0 {
            let origin = self.block_size.start_of(blocks.start);
            return self.store_run::<IS_COPY, _>(held, blocks, bytes, origin);
        }
        self.store_runs::<IS_COPY, _>(held, blocks, bytes)
    }

    /// As [`Overlay::store_blocks`], for each run of blocks that are to be stored or not.
    #[inline(never)]
    fn store_runs<const IS_COPY: bool, How>(
        &self,
        held: &Held<'_, How>,
        blocks: &Range<BlockNum>,
        bytes: &[u8],
    ) -> Result<()> {
        let origin = self.block_size.start_of(blocks.start);
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
                let bytes = &bytes[part.in_buffer(origin)];
                self.store_run::<IS_COPY, _>(held, &run, bytes, part.start)?;
            } else {
                let purpose = if IS_COPY {
                    Purpose::Copy
                } else {
                    Purpose::Zero
                };
                self.reserve_for_zero(held, &run, purpose)?;
                self.publish(&run, BlockMap::set_zero_unless_data)?;
            }
            start = end;
        }
        Ok(())
    }

    /// Stores all the `bytes` of `blocks`, the first of which is at `offset`.
    fn store_run<const IS_COPY: bool, How>(
        &self,
        held: &Held<'_, How>,
        blocks: &Range<BlockNum>,
        bytes: &[u8],
        offset: u64,
    ) -> Result<()> {
        let purpose = if IS_COPY {
            Purpose::Copy
        } else {
            Purpose::Data
        };
        self.make_data(held, blocks, purpose, || self.store.write(bytes, offset))
    }

    /// Makes `blocks` *data*, all the bytes of which are stored by `put`.
    #[inline(always)]
    pub(super) fn make_data<How>(
        &self,
        held: &Held<'_, How>,
        blocks: &Range<BlockNum>,
        purpose: Purpose,
        put: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if let Some(limit) = &self.limit {
            return self.make_data_within(limit, held, blocks, purpose, put);
        }
        self.reserve_for_data(held, blocks, purpose)?;
        put()?;
        self.publish(blocks, BlockMap::set_data)
    }

    /// To be called before `blocks` become *data*. Under the hold those that are *data*
    /// stay that, and of them there is note already.
    #[inline(always)]
    pub(super) fn reserve_for_data<How>(
        &self,
        held: &Held<'_, How>,
        blocks: &Range<BlockNum>,
        purpose: Purpose,
    ) -> Result<()> {
        debug_assert!(held.covers(blocks));
        match self.store.reserve(blocks, purpose) {
            Err(e) if e.is_full() && self.map.run(blocks)? == (State::Data, blocks.end) => Ok(()),
            reserved => reserved,
        }
    }

    /// To be called before `blocks` become *zero*.
    pub(super) fn reserve_for_zero<How>(
        &self,
        held: &Held<'_, How>,
        blocks: &Range<BlockNum>,
        purpose: Purpose,
    ) -> Result<()> {
        debug_assert!(held.covers(blocks));
        if let Some(limit) = &self.limit {
            drop(limit.begin_change(|| 0, purpose.share())?);
            // In the parts in which it is published: a mark for all of them may need nothing
            // where one for a part needs a node. While it is published the map must not grow,
            // because who lacks room waits, and may hold a lock of the store by then.
            for part in parts(blocks.clone(), |start| self.store.publish_end(start)) {
                self.map.grow_for_zero(&part, purpose.share())?;
            }
        }
        self.store.reserve(blocks, purpose)
    }

    // Here and below the compiler would make a call of what is shorter than one.
    #[inline(always)]
    fn must_store(&self, block: BlockNum, bytes: &[u8], origin: u64) -> Result<bool> {
        let part = self.bytes_of(&(block..block.next())).in_buffer(origin);
        Ok(!is_zero(&bytes[part]) || self.map.state(block)? == State::Data)
    }
}
