//! The layer below (the plugin, or the next filter) as a [`Base`].

use std::os::raw::c_int;

use super::extents::ExtentList;
use super::sys;
use crate::base::{Allocation, Base, Extent};
use crate::block::ByteRange;
use crate::buffer::{buffer, push};
use crate::error::{Error, Result};
use crate::filter::Advice;

/// A client's read is never longer than this, so nothing below us has to cope
/// with more; a fill of very large blocks is split.
const MAX_READ: u64 = 64 << 20;

/// What a layer below said of itself for one connection.
#[derive(Debug, Clone, Copy)]
pub struct Capabilities {
    size: u64,
    can_extents: bool,
    can_cache: bool,
    /// What the offset and the length of a request must be a multiple of.
    unit: u64,
    /// The most bytes in a request: a multiple of `unit`, below 2^32.
    max: u64,
    /// The most bytes in a read: the same, but no more than [`MAX_READ`].
    max_read: u64,
}

impl Capabilities {
    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// `struct nbdkit_next_ops`, in a connection.
#[derive(Clone, Copy)]
pub struct Next {
    ops: *mut sys::nbdkit_next,
}

/// [`Next`] once its capabilities are known, for the requests.
pub struct NextBase<'a> {
    next: Next,
    capabilities: &'a Capabilities,
}

/// Calls a member of `nbdkit_next_ops`. Every member is set in every instance
/// that nbdkit makes.
macro_rules! call {
    ($next:expr, $member:ident $(, $arg:expr)*) => {{
        let ops = $next.ops;
        // SAFETY: `ops` is valid by the contract of `Next::new`; the arguments are
        // right for the member by the header that both were made from.
        unsafe {
            let member = (*ops).$member.expect("nbdkit sets every member");
            member(ops $(, $arg)*)
        }
    }};
}

impl Next {
    /// # Safety
    /// `ops` is what nbdkit passed to the callback that is under way, and neither
    /// the value nor a copy of it is used after that callback.
    pub unsafe fn new(ops: *mut sys::nbdkit_next) -> Self {
        Next { ops }
    }

    /// Asks what the layer can do. nbdkit wants some of these calls to come
    /// before the first read; it remembers the answers.
    pub fn capabilities(self) -> Result<Capabilities> {
        let size = call!(self, get_size);
        let size = u64::try_from(size)
            .map_err(|_| Error::from_below(libc::EIO, "asking for the size of the disk"))?;
        let can_extents = self.flag(call!(self, can_extents), "can_extents")? != 0;
        let can_cache = self.flag(call!(self, can_cache), "can_cache")? != sys::NBDKIT_CACHE_NONE;
        let (unit, max) = self
            .advice()?
            .map_or((1, u32::MAX), |advice| (advice.minimum, advice.maximum));
        let (unit, max) = (u64::from(unit), u64::from(max));
        // nbdkit checks what a plugin says, but not what a filter says, and there is one
        // that takes any number for a maximum.
        let max = whole_units(max, unit);
        Ok(Capabilities {
            size,
            can_extents,
            can_cache,
            unit,
            max,
            max_read: max.min(whole_units(MAX_READ, unit)),
        })
    }

    fn flag(self, answer: c_int, name: &'static str) -> Result<c_int> {
        match answer {
            -1 => Err(Error::from_below(libc::EIO, name)),
            answer => Ok(answer),
        }
    }

    /// The layer's block-size constraints; `None` if it has none.
    pub fn advice(self) -> Result<Option<Advice>> {
        let (mut minimum, mut preferred, mut maximum) = (0, 0, 0);
        let answer = call!(
            self,
            block_size,
            &raw mut minimum,
            &raw mut preferred,
            &raw mut maximum
        );
        self.flag(answer, "block_size")?;
        Ok((minimum != 0).then_some(Advice {
            minimum,
            preferred,
            maximum,
        }))
    }

    pub fn with(self, capabilities: &Capabilities) -> NextBase<'_> {
        NextBase {
            next: self,
            capabilities,
        }
    }
}

/// nbdkit's convention: -1, and the errno in `*err`.
fn result(answer: c_int, err: c_int, tried: impl FnOnce() -> String) -> Result<()> {
    match answer {
        0 => Ok(()),
        _ => Err(Error::from_below(err, tried())),
    }
}

impl NextBase<'_> {
    /// `range` and what must be asked for with it: the layer takes whole units, and its
    /// last one may be cut by the end of the disk.
    ///
    /// The range of a request may be smaller than a unit: between two blocks of the
    /// overlay, around what is written to a part of a block, or because its client does
    /// not heed the layer's minimum.
    fn rounded_out(&self, range: ByteRange) -> ByteRange {
        let unit = self.capabilities.unit;
        ByteRange {
            start: range.start / unit * unit,
            end: range.end.next_multiple_of(unit).min(self.size()),
        }
    }

    /// Reads a range of whole units.
    fn read_units(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut at = offset;
        for piece in buf.chunks_mut(self.capabilities.max_read as usize) {
            let mut err = 0;
            let len = piece.len() as u32;
            let answer = call!(
                self.next,
                pread,
                piece.as_mut_ptr().cast(),
                len,
                at,
                0,
                &raw mut err
            );
            result(answer, err, || {
                format!("reading {len} bytes at {at} from the layer below")
            })?;
            at += u64::from(len);
        }
        Ok(())
    }
}

impl Base for NextBase<'_> {
    fn size(&self) -> u64 {
        self.capabilities.size
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = ByteRange {
            start: offset,
            end: offset + buf.len() as u64,
        };
        let units = self.rounded_out(range);
        if units == range {
            return self.read_units(buf, offset);
        }
        let mut around = buffer(units.len())?;
        self.read_units(&mut around, units.start)?;
        buf.copy_from_slice(&around[range.in_buffer(units.start)]);
        Ok(())
    }

    fn cache(&self, range: ByteRange) -> Result<()> {
        if !self.capabilities.can_cache {
            return Ok(());
        }
        // A layer may do it by reading, and reads no more than its maximum at once.
        let mut rest = self.rounded_out(range);
        while !rest.is_empty() {
            let mut err = 0;
            let (at, len) = (rest.start, rest.len().min(self.capabilities.max));
            let answer = call!(self.next, cache, len as u32, at, 0, &raw mut err);
            result(answer, err, || {
                format!("caching {len} bytes at {at} in the layer below")
            })?;
            rest.start += len;
        }
        Ok(())
    }

    fn extents(&self, range: ByteRange, only_first: bool, list: &mut Vec<Extent>) -> Result<()> {
        if !self.capabilities.can_extents {
            return push(list, data(range));
        }
        let unit = self.capabilities.unit;
        let mut units = self.rounded_out(range);
        // Rounded out, a range may be too long for a request; the rest is asked for later.
        let max = whole_units(u32::MAX.into(), unit);
        units.end = units.end.min(units.start + max);
        let mut answered = ExtentList::new(units)?;
        // The first extent of the units may end before `range` starts.
        let is_first_ours = units.start == range.start;
        let flags = if only_first && is_first_ours {
            sys::NBDKIT_FLAG_REQ_ONE as u32
        } else {
            0
        };
        let mut err = 0;
        let (at, len) = (units.start, units.len());
        let answer = call!(
            self.next,
            extents,
            len as u32,
            at,
            flags,
            answered.as_ptr(),
            &raw mut err
        );
        result(answer, err, || {
            format!("asking the layer below for the extents of {len} bytes at {at}")
        })?;
        let known = list.len();
        for extent in answered.iter() {
            let bytes = extent.bytes.clamp_to(range);
            if !bytes.is_empty() {
                push(list, Extent { bytes, ..extent })?;
            }
        }
        if list.len() == known && !is_first_ours {
            // Asked again, it would say the same. What is not known is data.
            let first = ByteRange {
                start: range.start,
                end: units.start + unit,
            };
            push(list, data(first.clamp_to(range)))?;
        }
        Ok(())
    }
}

/// The largest multiple of `unit` up to `limit`, but one at least.
fn whole_units(limit: u64, unit: u64) -> u64 {
    (limit / unit).max(1) * unit
}

fn data(bytes: ByteRange) -> Extent {
    Extent {
        bytes,
        allocation: Allocation::DATA,
    }
}
