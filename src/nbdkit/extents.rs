//! The extents list of nbdkit as a safe type.

use std::ptr::NonNull;

use super::sys;
use crate::base::{Allocation, Extent};
use crate::block::ByteRange;
use crate::error::{Error, Result};

/// A list of our own, to ask the layer below with.
pub struct ExtentList {
    list: NonNull<sys::nbdkit_extents>,
}

impl ExtentList {
    /// An empty list. It keeps what is added within `range`: nbdkit cuts an extent
    /// that reaches past its end.
    pub fn new(range: ByteRange) -> Result<Self> {
        // SAFETY: takes two numbers; gives a new list, or null after it has
        // written a message.
        let list = unsafe { sys::nbdkit_extents_new(range.start, range.end) };
        NonNull::new(list)
            .map(|list| ExtentList { list })
            .ok_or_else(|| Error::from_below(libc::ENOMEM, "no memory for a list of extents"))
    }

    /// For passing to nbdkit; valid as long as `self`.
    pub fn as_ptr(&mut self) -> *mut sys::nbdkit_extents {
        self.list.as_ptr()
    }

    /// The extents in the list.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        let list = self.list.as_ptr();
        // SAFETY: the list is valid, and `self` is borrowed while it is looked at.
        let count = unsafe { sys::nbdkit_extents_count(list) };
        (0..count).map(move |i| {
            // SAFETY: as above, and `i` is below the count, which can't change.
            let extent = unsafe { sys::nbdkit_get_extent(list, i) };
            let is = |flag: i32| extent.type_ & flag as u32 != 0;
            Extent {
                bytes: ByteRange {
                    start: extent.offset,
                    end: extent.offset + extent.length,
                },
                allocation: Allocation {
                    hole: is(sys::NBDKIT_EXTENT_HOLE),
                    zero: is(sys::NBDKIT_EXTENT_ZERO),
                },
            }
        })
    }
}

impl Drop for ExtentList {
    fn drop(&mut self) {
        // SAFETY: made by nbdkit_extents_new, freed once.
        unsafe { sys::nbdkit_extents_free(self.list.as_ptr()) };
    }
}

/// Adds `extents` to the list of a request.
///
/// # Safety
/// `list` is the list that nbdkit passed to the request that is under way.
pub unsafe fn add(list: *mut sys::nbdkit_extents, extents: &[Extent]) -> Result<()> {
    for extent in extents {
        let mut kind = 0;
        if extent.allocation.hole {
            kind |= sys::NBDKIT_EXTENT_HOLE;
        }
        if extent.allocation.zero {
            kind |= sys::NBDKIT_EXTENT_ZERO;
        }
        // SAFETY: the caller vouches for the list; the rest are numbers.
        let added = unsafe {
            sys::nbdkit_add_extent(list, extent.bytes.start, extent.bytes.len(), kind as u32)
        };
        if added == -1 {
            return Err(Error::from_below(libc::ENOMEM, "adding an extent"));
        }
    }
    Ok(())
}
