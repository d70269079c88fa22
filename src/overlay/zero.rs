//! Zero and trim: the requests that may cover the whole disk at once.
//!
//! The locking is that of [`super`]; whole blocks go by windows, so that one
//! large request neither keeps all writers out for its whole time nor takes the
//! stripes once for every MiB of a disk that has nothing stored.

use std::ops::Range;

use super::map::BlockMap;
use super::write::New;
use super::{Overlay, State, Store};
use crate::base::Base;
use crate::block::{BlockNum, ByteRange, Piece};
use crate::error::{Error, Result};
use crate::sync::Ordering;

/// How many bytes of the disk are zeroed under one hold of the stripes.
const WINDOW: u64 = 1 << 30;

/// What is written where zeroes must be written.
static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

/// What a client wants to become of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroing {
    /// The bytes are of no use any more (NBD_CMD_TRIM). They read as zeroes
    /// afterwards, but that is more than NBD promises.
    Trim,
    /// Zeroes (NBD_CMD_WRITE_ZEROES).
    Zero {
        /// The space may be given back (no NBD_CMD_FLAG_NO_HOLE).
        may_trim: bool,
        /// ENOTSUP is wanted rather than written zeroes (NBD_CMD_FLAG_FAST_ZERO).
        fast: bool,
    },
}

impl Zeroing {
    fn may_trim(self) -> bool {
        match self {
            Zeroing::Trim => true,
            Zeroing::Zero { may_trim, .. } => may_trim,
        }
    }
}

/// More than this of one block is not zeroed in a moment: parts are written.
const LARGE_PART: u64 = 1 << 20;

fn is_large_part(piece: &Piece) -> bool {
    matches!(piece, Piece::Partial { bytes, .. } if bytes.len() > LARGE_PART)
}

/// Whoever trims because there is no space must not be stopped by that: NBD allows that
/// a trim does nothing.
fn unless_full_trim(done: Result<()>, how: Zeroing) -> Result<()> {
    match done {
        Err(e) if how == Zeroing::Trim && is_full(&e) => {
            log::debug!("trim: something keeps its old value: {e}");
            Ok(())
        }
        done => done,
    }
}

/// Whether an error says that there is no space.
pub(super) fn is_full(error: &Error) -> bool {
    matches!(error.errno(), libc::ENOSPC | libc::EDQUOT)
}

impl<S: Store> Overlay<S> {
    /// Makes `len` bytes at `offset` read as zeroes.
    pub fn zero(&self, base: &impl Base, offset: u64, len: u64, how: Zeroing) -> Result<()> {
        let range = ByteRange::checked(offset, len, self.size)?;
        let must_be_fast = matches!(how, Zeroing::Zero { fast: true, .. });
        let pieces = || self.block_size.pieces(range, self.size);
        if must_be_fast && !how.may_trim() && !self.store.can_zero_range() {
            return Err(Error::new(
                libc::ENOTSUP,
                "the overlay's file system can't zero a range fast and keep its space",
            ));
        }
        if must_be_fast && pieces().any(|piece| is_large_part(&piece)) {
            return Err(Error::new(
                libc::ENOTSUP,
                "a large part of a block can't be zeroed fast (cow-block-size)",
            ));
        }
        // Whole blocks first: on a full file system they make room for the others.
        for piece in pieces() {
            if let Piece::Whole { blocks, .. } = piece {
                self.zero_whole(blocks, how)?;
            }
        }
        let base = &self.halves(base, range)?;
        for piece in pieces() {
            if let Piece::Partial { block, bytes } = piece {
                self.zero_part(base, block, bytes, how)?;
            }
        }
        Ok(())
    }

    fn zero_whole(&self, blocks: Range<BlockNum>, how: Zeroing) -> Result<()> {
        log::trace!("zero {blocks:?}, {how:?}");
        if !how.may_trim() {
            return self
                .windows(blocks)
                .try_for_each(|window| self.zero_and_keep(window));
        }
        // What has no space to be told of keeps nothing from being given back behind it.
        let mut full = Ok(());
        for window in self.windows(blocks) {
            match self.discard(window) {
                Err(e) if is_full(&e) => full = Err(e),
                done => done?,
            }
        }
        unless_full_trim(full, how)
    }

    fn zero_part(
        &self,
        base: &impl Base,
        block: BlockNum,
        bytes: ByteRange,
        how: Zeroing,
    ) -> Result<()> {
        log::trace!("zero {bytes:?} of {block:?}, {how:?}");
        let may_trim = how.may_trim();
        unless_full_trim(
            self.modify(base, block, bytes, New::Zeroes { may_trim }),
            how,
        )
    }

    /// Makes `blocks` *zero* and gives their space back. ENOSPC if there is no space to
    /// keep note of that for all of them: those that have data are *zero* all the same.
    fn discard(&self, blocks: Range<BlockNum>) -> Result<()> {
        let _held = self.stripes.exclusive(&blocks);
        match self.store.reserve(&blocks, State::Zero) {
            Err(e) if is_full(&e) => self.discard_with_data_first(blocks),
            reserved => reserved.and_then(|()| self.discard_held(blocks)),
        }
    }

    /// As [`Overlay::discard`], where there may not be enough space to keep note of it.
    ///
    /// What is given back may do for that. So first go the bytes that nobody can read,
    /// which need no note, then the data, of which there is note already.
    fn discard_with_data_first(&self, blocks: Range<BlockNum>) -> Result<()> {
        let runs = |wanted: State| {
            let all = self.map.runs(blocks.clone());
            all.filter(move |run| !matches!(run, Ok((state, _)) if *state != wanted))
        };
        if self.has_orphans.load(Ordering::Relaxed) {
            for run in runs(State::Base).chain(runs(State::Zero)) {
                let bytes = self.bytes_of(&run?.1);
                self.change(|store| store.punch(bytes))?;
            }
        }
        for run in runs(State::Data).chain(runs(State::Base)) {
            let (_, run) = run?;
            self.store.reserve(&run, State::Zero)?;
            self.discard_held(run)?;
        }
        Ok(())
    }

    /// The caller holds the stripes of `blocks`, and there is space for the note of it.
    fn discard_held(&self, blocks: Range<BlockNum>) -> Result<()> {
        let hole = if self.has_orphans.load(Ordering::Relaxed) {
            Some(blocks.clone())
        } else {
            self.stored(&blocks)?
        };
        self.publish(&blocks, BlockMap::set_zero)?;
        if let Some(hole) = hole {
            // Where there is no hole punching the map alone says it.
            self.change(|store| store.punch(self.bytes_of(&hole)))?;
        }
        Ok(())
    }

    /// From the first to the last of `blocks` that is *data*: one hole for all of
    /// them, since a disk may be fragmented, and a hole over a hole costs little.
    fn stored(&self, blocks: &Range<BlockNum>) -> Result<Option<Range<BlockNum>>> {
        let mut stored: Option<Range<BlockNum>> = None;
        for run in self.map.runs(blocks.clone()) {
            if let (State::Data, run) = run? {
                stored = Some(stored.map_or(run.start, |s| s.start)..run.end);
            }
        }
        Ok(stored)
    }

    /// Makes `blocks` zeroes that take space.
    fn zero_and_keep(&self, blocks: Range<BlockNum>) -> Result<()> {
        let _held = self.stripes.shared(&blocks);
        let bytes = self.bytes_of(&blocks);
        self.reserve_for_data(&blocks)?;
        if !self.change(|store| store.zero_range(bytes))? {
            self.write_zeroes(bytes)?;
        }
        self.publish(&blocks, BlockMap::set_data)
    }

    /// Writes zeroes to the store; publishes nothing.
    pub(super) fn write_zeroes(&self, bytes: ByteRange) -> Result<()> {
        let mut at = bytes.start;
        while at < bytes.end {
            let len = (bytes.end - at).min(ZEROES.len() as u64);
            self.change(|store| store.write(&ZEROES[..len as usize], at))?;
            at += len;
        }
        Ok(())
    }

    /// `blocks` cut at multiples of [`WINDOW`], so that most windows cover whole
    /// leaves of the block map.
    fn windows(&self, blocks: Range<BlockNum>) -> impl Iterator<Item = Range<BlockNum>> + use<S> {
        let step = (WINDOW / self.block_size.bytes()).max(1);
        let mut rest = blocks;
        std::iter::from_fn(move || {
            if rest.start >= rest.end {
                return None;
            }
            let next = BlockNum((rest.start.0 / step + 1) * step);
            let window = rest.start..rest.end.min(next);
            rest.start = window.end;
            Some(window)
        })
    }
}
