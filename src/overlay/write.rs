//! Changes of the disk: whole blocks, and parts of blocks. The locking is that of
//! [`super`], and the order of changes that of [`super::stripes`].
//!
//! A request is made of at most three pieces: a part of a block, whole blocks, a part of
//! a block. All of them take their place in the order before anything is waited for. The
//! whole blocks are stored at once. A part whose block is not *data* needs the rest of
//! the block (read-modify-write): it is deferred, the base is read, and then it is stored.

use std::ops::Range;

use super::map::BlockMap;
use super::stripes::{Deferral, Exclusive, Held};
use super::zero::Zeroing;
use super::{Overlay, State, Store};
use crate::base::Base;
use crate::block::{BlockNum, ByteRange, Piece};
use crate::buffer::{buffer, is_zero};
use crate::error::{Error, Result};

/// What a request puts into its bytes.
#[derive(Clone, Copy)]
pub(super) enum Content<'a> {
    /// These, the first of which is for the byte `origin` of the disk.
    Bytes {
        bytes: &'a [u8],
        origin: u64,
    },
    Zeroes(Zeroing),
}

/// A part of a block that is to be changed by a read-modify-write.
struct PartialChange<'a> {
    deferral: Deferral<'a>,
    block: BlockNum,
    bytes: ByteRange,
    /// The block's state when the change took its place in the order.
    was: State,
    /// It was tried in place, and there was no space in the store.
    full: Option<Full>,
}

/// A change found no space in the store.
struct Full {
    failure: Error,
    /// That of [`Reclaim`](super::Reclaim) before the change.
    progress: u64,
}

/// How far a part of a block got in its first hold.
enum Begun<'a> {
    /// There was nothing to do.
    Nothing,
    InPlace,
    Deferred(PartialChange<'a>),
}

/// The most that is read of the base at once for parts of two blocks. Of larger blocks
/// it would be too much that a request does not need.
const MAX_READ_FOR_TWO: u64 = 2 * (64 << 10);

impl<'a> Content<'a> {
    /// What is for `range`, if it is bytes.
    fn bytes(&self, range: ByteRange) -> Option<&'a [u8]> {
        match self {
            Content::Bytes { bytes, origin } => Some(&bytes[range.in_buffer(*origin)]),
            Content::Zeroes(_) => None,
        }
    }

    pub(super) fn may_trim(&self) -> bool {
        matches!(self, Content::Zeroes(how) if how.may_trim())
    }

    fn is_trim(&self) -> bool {
        matches!(self, Content::Zeroes(Zeroing::Trim))
    }

    /// Who trims because there is no space must not be stopped by that: NBD allows that
    /// a trim does nothing.
    fn unless_full_trim(&self, done: Result<()>) -> Result<()> {
        match done {
            Err(e) if self.is_trim() && e.is_full() => {
                log::debug!("trim: something keeps its old value: {e}");
                Ok(())
            }
            done => done,
        }
    }
}

impl<S: Store> Overlay<S> {
    /// Writes `buf` at `offset`.
    pub fn write(&self, base: &impl Base, buf: &[u8], offset: u64) -> Result<()> {
        let range = ByteRange::checked(offset, buf.len() as u64, self.size)?;
        let content = Content::Bytes {
            bytes: buf,
            origin: offset,
        };
        // The most frequent case pays for no splitting.
        if self.block_size.is_whole(range, self.size) && !log::log_enabled!(log::Level::Trace) {
            let done = self.change_whole(&self.block_size.touched_by(range), content);
            return self.give_back_if_failed(range, done);
        }
        let done = self.change(base, range, content);
        self.give_back_if_failed(range, done)
    }

    /// Puts `content` into `range`.
    pub(super) fn change(
        &self,
        base: &impl Base,
        range: ByteRange,
        content: Content<'_>,
    ) -> Result<()> {
        let mut parts = [None, None];
        let mut whole = None;
        for piece in self.block_size.pieces(range, self.size) {
            if log::log_enabled!(log::Level::Trace) {
                trace_change(piece.clone());
            }
            match piece {
                Piece::Partial { block, bytes } => {
                    let place = usize::from(parts[0].is_some());
                    parts[place] = self.begin_part(block, bytes, content)?;
                }
                Piece::Whole { blocks, .. } => whole = Some(blocks),
            }
        }
        if let Some(blocks) = whole {
            content.unless_full_trim(self.change_whole(&blocks, content))?;
        }
        content.unless_full_trim(self.finish_parts(base, parts, content))
    }

    /// Changes `bytes` of `block`, which has others that must stay as they are, or gives
    /// what is to be done when the rest of the block is known.
    fn begin_part(
        &self,
        block: BlockNum,
        bytes: ByteRange,
        content: Content<'_>,
    ) -> Result<Option<PartialChange<'_>>> {
        let progress = self.reclaim.progress();
        let begun = self.stripes.shared(&(block..block.next()), |held| {
            let was = self.map.state(block)?;
            let later = |full| {
                Begun::Deferred(PartialChange {
                    deferral: held.defer(bytes),
                    block,
                    bytes,
                    was,
                    full,
                })
            };
            match was {
                State::Data => match self.change_in_place(held, bytes, content) {
                    // Whole blocks of the same request may make room.
                    Err(failure) if failure.is_full() => {
                        return Ok(later(Some(Full { failure, progress })));
                    }
                    done => done?,
                },
                // A trim promises nothing, and it must not take space.
                State::Base if content.is_trim() => return Ok(Begun::Nothing),
                State::Zero if content.may_trim() => {}
                State::Base | State::Zero => return Ok(later(None)),
            }
            held.supersede(bytes, None);
            Ok(match was {
                State::Data => Begun::InPlace,
                State::Base | State::Zero => Begun::Nothing,
            })
        })?;
        match begun {
            Begun::Nothing => Ok(None),
            Begun::InPlace => {
                if content.may_trim() {
                    self.free_if_zero(block);
                }
                Ok(None)
            }
            Begun::Deferred(change) => Ok(Some(change)),
        }
    }

    /// Reads what is missing around the parts of at most two blocks, and stores them.
    fn finish_parts(
        &self,
        base: &impl Base,
        parts: [Option<PartialChange<'_>>; 2],
        content: Content<'_>,
    ) -> Result<()> {
        if let [Some(first), Some(second)] = &parts {
            if let Some(mut span) = self.read_for_two(base, first, second) {
                let (low, high) = span.split_at_mut(self.block_size.bytes() as usize);
                self.finish_part(first, low, content)?;
                return self.finish_part(second, high, content);
            }
        }
        for mut change in parts.into_iter().flatten() {
            if let Some(full) = change.full.take() {
                let room = self.room_after(full.progress, full.failure);
                if room.is_err() {
                    content.unless_full_trim(room)?;
                    continue;
                }
            }
            let whole = self.bytes_of(&(change.block..change.block.next()));
            let mut block_bytes = buffer(whole.len())?;
            if change.was == State::Base {
                read_around(base, &mut block_bytes, whole, change.bytes)?;
            }
            self.finish_part(&change, &mut block_bytes, content)?;
        }
        Ok(())
    }

    /// The base's bytes of two neighbouring blocks, by one call: with a slow base two
    /// calls cost twice as much. `None` if it can't be done so: then each is read alone.
    fn read_for_two(
        &self,
        base: &impl Base,
        first: &PartialChange<'_>,
        second: &PartialChange<'_>,
    ) -> Option<Vec<u8>> {
        let span = self.bytes_of(&(first.block..second.block.next()));
        let is_one_read = first.was == State::Base
            && second.was == State::Base
            && first.block.next() == second.block
            && span.len() <= MAX_READ_FOR_TWO;
        if !is_one_read {
            return None;
        }
        let mut bytes = buffer(span.len()).ok()?;
        // What can't be read may be just what is overwritten.
        base.read(&mut bytes, span.start).ok()?;
        Some(bytes)
    }

    /// Stores a part of a block. `block_bytes` is for the whole block, and has the rest of
    /// it as it was when the change took its place.
    fn finish_part(
        &self,
        change: &PartialChange<'_>,
        block_bytes: &mut [u8],
        content: Content<'_>,
    ) -> Result<()> {
        let block = change.block;
        self.with_room(change.bytes, || {
            self.stripes.exclusive(&(block..block.next()), |held| {
                let newer = held.newer(&change.deferral, change.bytes);
                for part in newer.gaps(change.bytes) {
                    self.put_part(held, block, part, block_bytes, content)?;
                    held.supersede(part, Some(&change.deferral));
                }
                Ok(())
            })
        })?;
        if content.may_trim() {
            self.free_if_zero(block);
        }
        Ok(())
    }

    /// Changes `bytes` of `block`. `block_bytes` is room for the whole block; if the block
    /// is *base*, it has the base's bytes around those that change.
    fn put_part(
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
            return self.store_run(held, &blocks, block_bytes, start);
        }
        self.store_blocks(held, &blocks, block_bytes)
    }

    /// Changes bytes of a *data* block.
    fn change_in_place<How>(
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

    /// Puts `content` into all bytes of `blocks`.
    pub(super) fn change_whole(
        &self,
        blocks: &Range<BlockNum>,
        content: Content<'_>,
    ) -> Result<()> {
        let bytes = self.bytes_of(blocks);
        let progress = self.reclaim.progress();
        let begun = match content.bytes(bytes) {
            Some(new) => self.stripes.shared(blocks, |held| {
                let done = self.store_blocks(held, blocks, new);
                stored_or_deferred(held, bytes, done)
            })?,
            None if self.is_one_step(blocks, content) => {
                self.stripes.exclusive(blocks, |held| {
                    let done = self.put_blocks(held, blocks, content);
                    stored_or_deferred(held, bytes, done)
                })?
            }
            None => {
                let deferral = self.stripes.shared(blocks, |held| held.defer(bytes));
                return self.change_by_steps(blocks, content, &deferral);
            }
        };
        match begun {
            None => Ok(()),
            Some((deferral, e)) => {
                self.room_after(progress, e)?;
                self.again(bytes, || self.change_by_steps(blocks, content, &deferral))
            }
        }
    }

    /// Does step by step what was deferred, so that others wait for a step at most.
    #[cold]
    fn change_by_steps(
        &self,
        blocks: &Range<BlockNum>,
        content: Content<'_>,
        deferral: &Deferral<'_>,
    ) -> Result<()> {
        let mut full = Ok(());
        for step in self.steps(blocks.clone(), content) {
            let bytes = self.bytes_of(&step);
            let done = self.with_room(bytes, || {
                self.stripes.exclusive(&step, |held| {
                    let newer = held.newer(deferral, bytes);
                    for part in newer.gaps(bytes) {
                        self.put_piecewise(held, part, content)?;
                        held.supersede(part, Some(deferral));
                    }
                    Ok(())
                })
            });
            match done {
                // What can't be discarded for want of space keeps nothing behind it from
                // being given back.
                Err(e) if e.is_full() && content.may_trim() => full = Err(e),
                done => done?,
            }
        }
        full
    }

    /// Changes `bytes`, which may begin or end within a block of which a newer change has
    /// stored the rest: so that block is not *base*.
    fn put_piecewise(
        &self,
        held: &Held<'_, Exclusive>,
        bytes: ByteRange,
        content: Content<'_>,
    ) -> Result<()> {
        for piece in self.block_size.pieces(bytes, self.size) {
            match piece {
                Piece::Whole { blocks, .. } => self.put_blocks(held, &blocks, content)?,
                Piece::Partial { block, bytes } => {
                    debug_assert_ne!(self.map.state(block)?, State::Base);
                    let whole = self.bytes_of(&(block..block.next()));
                    self.put_part(held, block, bytes, &mut buffer(whole.len())?, content)?;
                }
            }
        }
        Ok(())
    }

    fn put_blocks(
        &self,
        held: &Held<'_, Exclusive>,
        blocks: &Range<BlockNum>,
        content: Content<'_>,
    ) -> Result<()> {
        match content.bytes(self.bytes_of(blocks)) {
            Some(new) => self.store_blocks(held, blocks, new),
            None if content.may_trim() => self.discard(held, blocks),
            None => self.zero_and_keep(held, blocks),
        }
    }

    /// Puts `bytes`, which are all those of `blocks`, into the store, and publishes.
    ///
    /// Blocks of zeroes that have no data are not stored. Looking for them costs
    /// a word a block where there is data.
    pub(super) fn store_blocks<How>(
        &self,
        held: &Held<'_, How>,
        blocks: &Range<BlockNum>,
        bytes: &[u8],
    ) -> Result<()> {
        let origin = self.block_size.start_of(blocks.start);
        // Nearly every small request is one block that begins with data.
        if blocks.start.next() == blocks.end && bytes[0] != 0 {
            return self.store_run(held, blocks, bytes, origin);
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
                self.store_run(held, &run, &bytes[part.in_buffer(origin)], part.start)?;
            } else {
                self.store.reserve(&run, State::Zero)?;
                self.publish(&run, BlockMap::set_zero_unless_data)?;
            }
            start = end;
        }
        Ok(())
    }

    /// Stores all the `bytes` of `blocks`, the first of which is at `offset`.
    fn store_run<How>(
        &self,
        held: &Held<'_, How>,
        blocks: &Range<BlockNum>,
        bytes: &[u8],
        offset: u64,
    ) -> Result<()> {
        self.reserve_for_data(held, blocks)?;
        self.store.write(bytes, offset)?;
        self.publish(blocks, BlockMap::set_data)
    }

    /// To be called before `blocks` become *data*. Under the hold those that are *data*
    /// stay that, and of them there is note already.
    #[inline(always)]
    pub(super) fn reserve_for_data<How>(
        &self,
        held: &Held<'_, How>,
        blocks: &Range<BlockNum>,
    ) -> Result<()> {
        debug_assert!(held.covers(blocks));
        match self.store.reserve(blocks, State::Data) {
            Err(e) if e.is_full() && self.map.run(blocks)? == (State::Data, blocks.end) => Ok(()),
            reserved => reserved,
        }
    }

    // Here and below the compiler would make a call of what is shorter than one.
    #[inline(always)]
    fn must_store(&self, block: BlockNum, bytes: &[u8], origin: u64) -> Result<bool> {
        let part = self.bytes_of(&(block..block.next())).in_buffer(origin);
        Ok(!is_zero(&bytes[part]) || self.map.state(block)? == State::Data)
    }

    /// Runs `attempt` to change `range`, and once more if it found no space and some could
    /// be given back since. No stripe is held.
    fn with_room(&self, range: ByteRange, mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
        let progress = self.reclaim.progress();
        match attempt() {
            Err(e) if e.is_full() => {
                self.room_after(progress, e)?;
                self.again(range, attempt)
            }
            done => done,
        }
    }

    /// Runs `attempt` to change `range` after another attempt that has found no space. No
    /// stripe is held.
    fn again(&self, range: ByteRange, attempt: impl FnOnce() -> Result<()>) -> Result<()> {
        attempt()?;
        // What the first attempt has stored may have been left out this time.
        self.give_back_unused(range);
        Ok(())
    }

    /// Makes room after `failure`, which is for want of space. It is the outcome if
    /// nothing was given back since `progress`: a client must hear of an error that it
    /// alone can be told of.
    #[cold]
    fn room_after(&self, progress: u64, failure: Error) -> Result<()> {
        self.make_room();
        if self.reclaim.progress() == progress {
            return Err(failure);
        }
        Ok(())
    }
}

/// What came of a change of `bytes` under its first hold: if it found no space, its place
/// in the order, and why.
#[inline(always)]
fn stored_or_deferred<'a, How>(
    held: &Held<'a, How>,
    bytes: ByteRange,
    done: Result<()>,
) -> Result<Option<(Deferral<'a>, Error)>> {
    match done {
        Ok(()) => {
            held.supersede(bytes, None);
            Ok(None)
        }
        Err(e) if e.is_full() => Ok(Some((held.defer(bytes), e))),
        Err(e) => Err(e),
    }
}

/// Fills `buf`, which stands for the block `whole`, with what the base has of it
/// around `bytes`. One call, if it can be: with a slow base the number of calls is what
/// costs.
fn read_around(base: &impl Base, buf: &mut [u8], whole: ByteRange, bytes: ByteRange) -> Result<()> {
    let head = ByteRange {
        start: whole.start,
        end: bytes.start,
    };
    let tail = ByteRange {
        start: bytes.end,
        end: whole.end,
    };
    // What can't be read may be just what is overwritten.
    if !head.is_empty() && !tail.is_empty() && base.read(buf, whole.start).is_ok() {
        return Ok(());
    }
    for part in [head, tail] {
        if !part.is_empty() {
            base.read(&mut buf[part.in_buffer(whole.start)], part.start)?;
        }
    }
    Ok(())
}

// By value and out of line, as in [`super`].

#[cold]
#[inline(never)]
fn trace_change(piece: Piece) {
    log::trace!("change {piece:?}");
}
