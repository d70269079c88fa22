//! What lies beneath the overlay, as the core sees it.
//!
//! The core relies on one property: *a base never changes*. Two reads of the
//! same bytes give the same bytes, whatever happened between them; that is what
//! makes it right to read the base without a lock and look at the block map
//! again afterwards.

use crate::block::ByteRange;
use crate::error::Result;

/// What is known of a piece of the disk (NBD's `base:allocation`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// No space is taken for it (`NBD_STATE_HOLE`).
    pub hole: bool,
    /// It reads as zeroes (`NBD_STATE_ZERO`).
    pub zero: bool,
}

impl Allocation {
    pub const DATA: Self = Allocation {
        hole: false,
        zero: false,
    };
    pub const HOLE: Self = Allocation {
        hole: true,
        zero: true,
    };
}

/// A run of bytes of the disk and what is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub bytes: ByteRange,
    pub allocation: Allocation,
}

/// A disk that is only read, and that never changes.
pub trait Base {
    /// The disk's size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` with the bytes at `offset`, or fails with the errno of the layer below.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Asks for `range` to be prefetched; success where the layer can't do that.
    fn cache(&self, range: ByteRange) -> Result<()>;

    /// Adds to `list` what is known of `range`: extents in ascending order
    /// without gaps, the first at `range.start`, none reaching past `range.end`,
    /// at least one. They may end before `range` does. With `only_first`, one is enough.
    fn extents(&self, range: ByteRange, only_first: bool, list: &mut Vec<Extent>) -> Result<()>;
}
