//! How a request changes the disk: what it is made of, in which order, and what happens
//! when there is no space. The locking is that of [`super`], and the order of changes that
//! of [`super::stripes`].
//!
//! A request is made of at most three pieces: a part of a block, whole blocks, a part of
//! a block. All of them take their place in the order before anything is waited for. The
//! whole blocks are stored at once. A part whose block is not *data* needs the rest of
//! the block (read-modify-write): it is deferred, the base is read, and then it is stored.
//!
//! Whole blocks go by steps where it takes time to store them, so that one large request
//! keeps others waiting for a step at most: a discard, which changes memory only, by
//! windows; what is stored, by areas.

use std::ops::Range;

use super::content::Content;
use super::stripes::{Deferral, Held};
use super::write::SENT;
use super::{Overlay, State, Store};
use crate::base::Base;
use crate::block::{BlockNum, ByteRange, Piece, parts};
use crate::buffer::buffer;
use crate::counters::Counter;
use crate::error::{Error, Result};

/// How many bytes of the disk are discarded under one hold of the stripes, where there is
/// something in the block map. Most windows cover whole leaves, which costs no time for
/// each block. A part for which there is nothing costs the same whatever its size.
const WINDOW: u64 = 1 << 30;

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

impl<S: Store> Overlay<S> {
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
            Ok(match was {
                State::Data => match self.change_in_place(held, bytes, content) {
                    // Whole blocks of the same request may make room.
                    Err(failure) if failure.is_full() => later(Some(Full { failure, progress })),
                    done => {
                        done?;
                        held.supersede(bytes, None);
                        Begun::InPlace
                    }
                },
                // A trim promises nothing, and it must not take space.
                State::Base if content.is_trim() => Begun::Nothing,
                State::Zero if content.may_trim() => {
                    held.supersede(bytes, None);
                    Begun::Nothing
                }
                State::Base | State::Zero => later(None),
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
            Begun::Deferred(change) => {
                if change.full.is_none() {
                    self.counters.add(Counter::ReadModifyWrites, 1);
                }
                Ok(Some(change))
            }
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

    /// Puts `content` into all bytes of `blocks`.
    pub(super) fn change_whole(
        &self,
        blocks: &Range<BlockNum>,
        content: Content<'_>,
    ) -> Result<()> {
        let bytes = self.bytes_of(blocks);
        let progress = self.reclaim.progress();
        let stored = match content.bytes(bytes) {
            Some(new) => self.stripes.shared(blocks, |held| {
                let done = self.store_blocks::<SENT, _>(held, blocks, new);
                stored_or_deferred(held, bytes, done)
            }),
            None if self.is_one_step(blocks, content) => self.stripes.exclusive(blocks, |held| {
                let done = self.put_blocks(held, blocks, content);
                stored_or_deferred(held, bytes, done)
            }),
            None => {
                let deferral = self.stripes.shared(blocks, |held| held.defer(bytes));
                return self.change_by_steps(blocks, content, &deferral);
            }
        };
        match stored {
            Ok(()) => Ok(()),
            Err(not_stored) => self.store_later(blocks, content, not_stored, progress),
        }
    }

    /// Stores what found no space, if some could be given back since `progress`.
    #[cold]
    pub(super) fn store_later(
        &self,
        blocks: &Range<BlockNum>,
        content: Content<'_>,
        not_stored: NotStored<'_>,
        progress: u64,
    ) -> Result<()> {
        match not_stored {
            NotStored::Failed(e) => Err(e),
            NotStored::Full(deferral, e) => {
                self.room_after(progress, e)?;
                self.again(self.bytes_of(blocks), || {
                    self.change_by_steps(blocks, content, &deferral)
                })
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

    /// Whether [`Overlay::steps`] has one step only.
    pub(super) fn is_one_step(&self, blocks: &Range<BlockNum>, content: Content<'_>) -> bool {
        self.step_end(blocks.start, content) >= blocks.end
    }

    /// `blocks`, cut into what is changed under one hold of the stripes.
    pub(super) fn steps<'a>(
        &'a self,
        blocks: Range<BlockNum>,
        content: Content<'a>,
    ) -> impl Iterator<Item = Range<BlockNum>> + 'a {
        parts(blocks, move |start| self.step_end(start, content))
    }

    fn step_end(&self, start: BlockNum, content: Content<'_>) -> BlockNum {
        if content.may_trim() {
            let step = (WINDOW / self.block_size.bytes()).max(1);
            let window = BlockNum((start.0 / step + 1) * step);
            return window.max(self.map.part_end(start));
        }
        self.stripes.area_end(start)
    }

    /// Runs `attempt` to change `range`, and once more if it found no space and some could
    /// be given back since. No stripe is held.
    fn with_room(&self, range: ByteRange, mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
        let progress = self.reclaim.progress();
        match self.within_limit(&mut attempt) {
            Err(e) if e.is_full() => {
                self.room_after(progress, e)?;
                self.again(range, || self.within_limit(&mut attempt))
            }
            done => done,
        }
    }

    /// Runs `attempt`, and again as long as it is over the limit and something was given back
    /// since: what was, another may have taken.
    fn within_limit(&self, attempt: &mut impl FnMut() -> Result<()>) -> Result<()> {
        loop {
            let given_back = self.given_back();
            match attempt() {
                Err(e) if e.is_over_limit() => {
                    self.make_room();
                    if self.given_back() == given_back {
                        return Err(e);
                    }
                }
                done => return done,
            }
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

/// Why a change was not stored under its first hold.
pub(super) enum NotStored<'a> {
    Failed(Error),
    /// There is no space in the store; and the change's place in the order.
    Full(Deferral<'a>, Error),
}

/// What is `done` is a change of `bytes` under its first hold.
#[inline(always)]
pub(super) fn stored_or_deferred<'a, How>(
    held: &Held<'a, How>,
    bytes: ByteRange,
    done: Result<()>,
) -> std::result::Result<(), NotStored<'a>> {
    match done {
        Ok(()) => {
            held.supersede(bytes, None);
            Ok(())
        }
        Err(e) if e.is_full() => Err(NotStored::Full(held.defer(bytes), e)),
        Err(e) => Err(NotStored::Failed(e)),
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
