//! Zero and trim: the requests that may cover the whole disk at once.
//!
//! The locking is that of [`super`]; whole blocks go by windows, so that one
//! large request neither keeps all writers out for its whole time nor takes the
//! stripes once for every MiB of a disk that has nothing stored.

use std::ops::Range;

use super::{New, Overlay, State, Store};
use crate::base::Base;
use crate::block::{BlockNum, ByteRange, Piece};
use crate::error::{Error, Result};

/// How many bytes of the disk are zeroed under one hold of the stripes.
const WINDOW: u64 = 1 << 30;

/// What is written where zeroes must be written.
static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

/// How a client wants its zeroes (NBD_CMD_WRITE_ZEROES and its flags).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Zeroing {
    /// The space may be given back (no NBD_CMD_FLAG_NO_HOLE).
    pub may_trim: bool,
    /// ENOTSUP is wanted rather than written zeroes (NBD_CMD_FLAG_FAST_ZERO).
    pub fast: bool,
}

impl Zeroing {
    /// What a trim asks for.
    pub const TRIM: Self = Zeroing {
        may_trim: true,
        fast: false,
    };
}

impl<S: Store> Overlay<S> {
    /// Makes `len` bytes at `offset` read as zeroes.
    pub fn zero(&self, base: &impl Base, offset: u64, len: u64, how: Zeroing) -> Result<()> {
        let range = ByteRange::checked(offset, len, self.size)?;
        if how.fast && !how.may_trim && !self.store.can_zero_range() {
            return Err(Error::new(
                libc::ENOTSUP,
                "the overlay's file system can't zero a range fast and keep its space",
            ));
        }
        let may_trim = how.may_trim;
        for piece in self.block_size.pieces(range, self.size) {
            log::trace!("zero {piece:?}, may_trim={may_trim}");
            match piece {
                Piece::Partial { block, bytes } => {
                    self.modify(base, block, bytes, New::Zeroes { may_trim })?;
                }
                Piece::Whole { blocks, .. } => {
                    for window in self.windows(blocks) {
                        if may_trim {
                            self.discard(window)?;
                        } else {
                            self.zero_and_keep(window)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes `blocks` *zero* and gives their space back.
    fn discard(&self, blocks: Range<BlockNum>) -> Result<()> {
        let _held = self.stripes.exclusive(&blocks);
        // One hole from the first to the last block that is stored: a hole over
        // what is a hole already costs nothing, and a disk may be fragmented.
        let mut stored: Option<Range<BlockNum>> = None;
        for run in self.map.runs(blocks.clone()) {
            if let (State::Data, run) = run? {
                stored = Some(stored.map_or(run.start, |s| s.start)..run.end);
            }
        }
        self.map.set_zero(&blocks)?;
        if let Some(stored) = stored {
            // Where there is no hole punching the map alone says it.
            self.store.punch(self.bytes_of(&stored))?;
        }
        Ok(())
    }

    /// Makes `blocks` zeroes that take space.
    fn zero_and_keep(&self, blocks: Range<BlockNum>) -> Result<()> {
        let _held = self.stripes.shared(&blocks);
        let bytes = self.bytes_of(&blocks);
        if !self.store.zero_range(bytes)? {
            self.write_zeroes(bytes)?;
        }
        self.map.set_data(&blocks)
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
