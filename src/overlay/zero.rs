//! Zero and trim: the requests that may cover the whole disk at once.
//!
//! The locking is that of [`super`]; how they go by steps is told in [`super::change`].

use std::ops::Range;

use super::content::{Content, Zeroing};
use super::map::BlockMap;
use super::stripes::{AREA, Exclusive, Held};
use super::{Overlay, Purpose, State, Store};
use crate::base::Base;
use crate::block::{BlockNum, ByteRange, Piece, parts};
use crate::buffer::is_zero;
use crate::error::{Error, Result};

/// What is written where zeroes must be written.
static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

/// More than this of one block is not written in a moment.
const LARGE_PART: u64 = 1 << 20;

/// Blocks up to this size are looked through when a part of them becomes zeroes.
const MAX_LOOKED_THROUGH: u64 = 64 << 10;

impl<S: Store> Overlay<S> {
    /// Makes `len` bytes at `offset` read as zeroes; a trim does so for whole blocks only.
    /// ENOTSUP, before anything has changed, if `how` says that it must be fast and it
    /// can't be.
    pub fn zero(&self, base: &impl Base, offset: u64, len: u64, how: Zeroing) -> Result<()> {
        let range = ByteRange::checked(offset, len, self.size)?;
        let must_be_fast = matches!(how, Zeroing::Zero { fast: true, .. });
        if must_be_fast && !how.may_trim() && !self.store.can_zero_range() {
            return Err(Error::not_fast(
                "the overlay's file system can't zero a range fast and keep its space",
            ));
        }
        for piece in self.block_size.pieces(range, self.size) {
            if must_be_fast && self.is_slow_to_zero(&piece, how)? {
                return Err(Error::not_fast(
                    "a large part of a block can't be zeroed fast (cow-block-size)",
                ));
            }
        }
        log::trace!("zero {range:?}, {how:?}");
        let done = self.change(base, range, Content::Zeroes(how));
        if how.may_trim() {
            self.shrink_map(range);
        }
        self.give_back_later();
        self.give_back_if_failed(range, done)
    }

    /// Zeroes in a part of a block are written; and with them, in a block that is not
    /// *data*, the rest of the block.
    fn is_slow_to_zero(&self, piece: &Piece, how: Zeroing) -> Result<bool> {
        let Piece::Partial { block, bytes } = piece else {
            return Ok(false);
        };
        Ok(match self.map.state(*block)? {
            State::Data => bytes.len() > LARGE_PART,
            State::Zero if how.may_trim() => false,
            State::Zero | State::Base => self.bytes_of(&(*block..block.next())).len() > LARGE_PART,
        })
    }

    /// Makes `blocks` *zero*; their space is given back later. ENOSPC if there is no space
    /// to keep note of that for all of them: those that have data are *zero* all the same.
    pub(super) fn discard(
        &self,
        held: &Held<'_, Exclusive>,
        blocks: &Range<BlockNum>,
    ) -> Result<()> {
        if self.has_orphans {
            self.pending.insert(self.bytes_of(blocks));
        }
        match self.reserve_for_zero(held, blocks, Purpose::Zero) {
            Err(e) if e.is_full() => self.discard_what_fits(held, blocks),
            reserved => reserved.and_then(|()| self.discard_reserved(held, blocks)),
        }
    }

    /// As [`Overlay::discard`], where there is not enough space to keep note of it.
    ///
    /// First goes the data, of which there is note already. When that is given back there
    /// may be space for the rest.
    fn discard_what_fits(
        &self,
        held: &Held<'_, Exclusive>,
        blocks: &Range<BlockNum>,
    ) -> Result<()> {
        let mut full = Ok(());
        for wanted in [State::Data, State::Base] {
            for run in self.map.runs(blocks.clone()) {
                let (state, run) = run?;
                if state != wanted {
                    continue;
                }
                for part in self.parts_to_discard(run) {
                    match self.reserve_for_zero(held, &part, Purpose::Zero) {
                        // Others may need nothing.
                        Err(e) if e.is_over_limit() => full = Err(e),
                        reserved => reserved.and_then(|()| self.discard_reserved(held, &part))?,
                    }
                }
            }
        }
        full
    }

    /// `blocks`, cut where it makes a difference to the block map, if that may not grow as it
    /// likes.
    fn parts_to_discard(&self, blocks: Range<BlockNum>) -> impl Iterator<Item = Range<BlockNum>> {
        parts(blocks, |start| match self.limit {
            Some(_) => self.map.part_end(start),
            None => BlockNum(u64::MAX),
        })
    }

    /// There is space for the note of it.
    fn discard_reserved(&self, held: &Held<'_, Exclusive>, blocks: &Range<BlockNum>) -> Result<()> {
        debug_assert!(held.covers(blocks));
        // From data to data, if they are not far from each other: a disk may be
        // fragmented, and what is punched is looked at again.
        let mut unused: Option<ByteRange> = None;
        for run in self.map.runs(blocks.clone()) {
            let (State::Data, run) = run? else { continue };
            let run = self.bytes_of(&run);
            match &mut unused {
                Some(before) if run.start - before.end < AREA => before.end = run.end,
                Some(before) => {
                    self.pending.insert(*before);
                    *before = run;
                }
                None => unused = Some(run),
            }
        }
        // First, or a change that is made in part would leave space that nobody gives back.
        // What is punched is decided by the map, when the stripes are free again.
        if let Some(unused) = unused {
            self.pending.insert(unused);
        }
        self.publish(blocks, BlockMap::set_zero)?;
        self.map.prune(blocks);
        Ok(())
    }

    /// Gives up the memory of the map for parts of the disk that have become zeroes piece
    /// by piece, of which the last ones were in `range`. No stripe is held.
    ///
    /// What lies in `range` as a whole was given up when it became zeroes.
    pub(super) fn shrink_map(&self, range: ByteRange) {
        let blocks = self.block_size.touched_by(range);
        if blocks.is_empty() {
            return;
        }
        for block in [blocks.start, BlockNum(blocks.end.0 - 1)] {
            // One level of the tree after the other.
            while let Some(whole) = self.map.zeroed_around(block) {
                self.stripes
                    .exclusive(&whole, |_alone| self.map.prune(&whole));
            }
        }
    }

    /// Makes `blocks` zeroes that take space.
    pub(super) fn zero_and_keep(
        &self,
        held: &Held<'_, Exclusive>,
        blocks: &Range<BlockNum>,
    ) -> Result<()> {
        let bytes = self.bytes_of(blocks);
        self.make_data(held, blocks, Purpose::Data, || {
            match self.store.zero_range(bytes) {
                Ok(true) => Ok(()),
                Ok(false) => self.write_zeroes(bytes),
                Err(e) => {
                    self.write_zeroes_over_data(blocks)?;
                    Err(e)
                }
            }
        })
    }

    /// A range that could not be zeroed has no certain bytes any more: ext4 drops what was
    /// written to it and is not on the disk yet, and older bytes come back. What is *data*
    /// has its space, so its blocks can become zeroes as a whole.
    fn write_zeroes_over_data(&self, blocks: &Range<BlockNum>) -> Result<()> {
        for run in self.map.runs(blocks.clone()) {
            if let (State::Data, run) = run? {
                self.write_zeroes(self.bytes_of(&run))?;
            }
        }
        Ok(())
    }

    /// Writes zeroes to the store; publishes nothing.
    pub(super) fn write_zeroes(&self, bytes: ByteRange) -> Result<()> {
        let mut at = bytes.start;
        while at < bytes.end {
            let len = (bytes.end - at).min(ZEROES.len() as u64);
            self.store.write(&ZEROES[..len as usize], at)?;
            at += len;
        }
        Ok(())
    }

    /// Discards a *data* block if all of it is zeroes: it may have been trimmed or zeroed
    /// piece by piece. Nobody has asked for this, so a failure is nobody's.
    ///
    /// It is looked through without a hold first, because most often it is not zero.
    pub(super) fn free_if_zero(&self, block: BlockNum) {
        let blocks = block..block.next();
        let is_data = || Ok::<_, Error>(self.map.state(block)? == State::Data);
        let is_free = || Ok::<_, Error>(is_data()? && self.is_stored_as_zeroes(&blocks)?);
        let done = is_free().and_then(|free| {
            if !free {
                return Ok(());
            }
            self.stripes.exclusive(&blocks, |held| {
                if is_free()? {
                    self.discard(held, &blocks)?;
                }
                Ok(())
            })
        });
        if let Err(e) = done {
            log::debug!("{block:?} keeps its space: {e}");
            self.note_untold(&e);
        }
    }

    /// Stops at the first part that has something else.
    fn is_stored_as_zeroes(&self, blocks: &Range<BlockNum>) -> Result<bool> {
        let bytes = self.bytes_of(blocks);
        if bytes.len() > MAX_LOOKED_THROUGH {
            return Ok(false);
        }
        let mut part = [0; 4096];
        let mut at = bytes.start;
        while at < bytes.end {
            let len = (bytes.end - at).min(part.len() as u64);
            let part = &mut part[..len as usize];
            self.store.read(part, at)?;
            if !is_zero(part) {
                return Ok(false);
            }
            at += len;
        }
        Ok(true)
    }
}
