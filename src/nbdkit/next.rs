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
const MAX_READ: u32 = 64 << 20;

/// What a layer below said of itself for one connection.
#[derive(Debug, Clone, Copy)]
pub struct Capabilities {
    size: u64,
    can_extents: bool,
    can_cache: bool,
    /// What the offset and the length of a read must be a multiple of: a power of two.
    unit: u64,
    max_read: u32,
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
        let (unit, max_read) = match self.advice()? {
            // nbdkit has checked them: the minimum is a power of two of at most
            // 64K, and the maximum a multiple of it, or 2^32 - 1.
            Some(advice) => (advice.minimum, advice.maximum.min(MAX_READ)),
            None => (1, MAX_READ),
        };
        Ok(Capabilities {
            size,
            can_extents,
            can_cache,
            unit: unit.into(),
            max_read,
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

    pub fn with<'a>(self, capabilities: &'a Capabilities) -> NextBase<'a> {
        NextBase {
            next: self,
            capabilities,
        }
    }
}

/// The size in bytes of the default export of the layer below, asked for before
/// any client has connected.
///
/// # Safety
/// `backend` is what nbdkit passed to *after_fork*, and that is under way.
pub unsafe fn size_before_connections(backend: *mut sys::nbdkit_backend) -> Result<u64> {
    // SAFETY: the caller's promise; the name ends with NUL. (1: read-only, and the
    // context belongs to no connection.)
    let ops = unsafe { sys::nbdkit_next_context_open(backend, 1, c"".as_ptr(), 1) };
    if ops.is_null() {
        return Err(Error::from_below(libc::EIO, "opening the default export"));
    }
    // SAFETY: nobody else has it, and it is used before it is closed only.
    let next = unsafe { Next::new(ops) };
    let size = if call!(next, prepare) == 0 {
        let size = u64::try_from(call!(next, get_size));
        call!(next, finalize);
        size.ok()
    } else {
        None
    };
    // SAFETY: opened above.
    unsafe { sys::nbdkit_next_context_close(ops) };
    size.ok_or_else(|| Error::from_below(libc::EIO, "asking the default export for its size"))
}

/// nbdkit's convention: -1, and the errno in `*err`.
fn result(answer: c_int, err: c_int, tried: impl FnOnce() -> String) -> Result<()> {
    match answer {
        0 => Ok(()),
        _ => Err(Error::from_below(err, tried())),
    }
}

impl NextBase<'_> {
    fn read_aligned(&self, buf: &mut [u8], offset: u64) -> Result<()> {
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
        let (unit, end) = (self.capabilities.unit, offset + buf.len() as u64);
        let is_aligned = |at: u64| at % unit == 0 || at == self.size();
        if is_aligned(offset) && is_aligned(end) {
            return self.read_aligned(buf, offset);
        }
        // A client that does not heed the layer's minimum, or the rest of a block
        // around what such a client writes.
        let start = offset / unit * unit;
        let end = end.next_multiple_of(unit).min(self.size());
        let mut around = buffer(end - start)?;
        self.read_aligned(&mut around, start)?;
        let at = (offset - start) as usize;
        buf.copy_from_slice(&around[at..at + buf.len()]);
        Ok(())
    }

    fn cache(&self, range: ByteRange) -> Result<()> {
        if !self.capabilities.can_cache {
            return Ok(());
        }
        let mut err = 0;
        let len = range.len() as u32;
        let answer = call!(self.next, cache, len, range.start, 0, &raw mut err);
        result(answer, err, || {
            format!("caching {len} bytes at {} in the layer below", range.start)
        })
    }

    fn extents(&self, range: ByteRange, only_first: bool, list: &mut Vec<Extent>) -> Result<()> {
        if !self.capabilities.can_extents {
            return push(
                list,
                Extent {
                    bytes: range,
                    allocation: Allocation::DATA,
                },
            );
        }
        let mut answered = ExtentList::new(range)?;
        let flags = if only_first {
            sys::NBDKIT_FLAG_REQ_ONE as u32
        } else {
            0
        };
        let mut err = 0;
        let len = range.len() as u32;
        let answer = call!(
            self.next,
            extents,
            len,
            range.start,
            flags,
            answered.as_ptr(),
            &raw mut err
        );
        result(answer, err, || {
            format!(
                "asking the layer below for the extents of {len} bytes at {}",
                range.start
            )
        })?;
        answered.iter().try_for_each(|extent| push(list, extent))
    }
}
