//! What a request puts into a range of the disk.

use crate::block::ByteRange;
use crate::error::Result;

/// What a client wants to become of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroing {
    /// The bytes are of no use any more (NBD_CMD_TRIM). Whole blocks read as zeroes
    /// afterwards, parts of blocks may keep their bytes.
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
    pub fn may_trim(self) -> bool {
        match self {
            Zeroing::Trim => true,
            Zeroing::Zero { may_trim, .. } => may_trim,
        }
    }
}

/// What a request puts into its bytes.
#[derive(Clone, Copy)]
pub enum Content<'a> {
    /// These, the first of which is for the byte `origin` of the disk.
    Bytes {
        bytes: &'a [u8],
        origin: u64,
    },
    Zeroes(Zeroing),
}

impl<'a> Content<'a> {
    /// What is for `range`, if it is bytes.
    pub fn bytes(&self, range: ByteRange) -> Option<&'a [u8]> {
        match self {
            Content::Bytes { bytes, origin } => Some(&bytes[range.in_buffer(*origin)]),
            Content::Zeroes(_) => None,
        }
    }

    pub fn may_trim(&self) -> bool {
        matches!(self, Content::Zeroes(how) if how.may_trim())
    }

    pub fn is_trim(&self) -> bool {
        matches!(self, Content::Zeroes(Zeroing::Trim))
    }

    /// Who trims because there is no space must not be stopped by that: NBD allows that
    /// a trim does nothing. (Over `cow-limit` all has been trimmed that needs no memory. The
    /// rest would be forgotten, and a client goes on with what succeeds.)
    pub fn unless_full_trim(&self, done: Result<()>) -> Result<()> {
        match done {
            Err(e) if self.is_trim() && e.is_full() && !e.is_over_limit() => {
                log::debug!("trim: something keeps its old value: {e}");
                Ok(())
            }
            done => done,
        }
    }
}
