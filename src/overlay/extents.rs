//! Extents: which parts of the disk take space, and which read as zeroes.
//!
//! Takes no lock, as reads: a map that changes meanwhile is seen before or after
//! the change. An extent never reaches past the request: nbdkit 1.32 aborts when
//! one of more than 4 GiB does.

use super::{Overlay, State, Store};
use crate::base::{Allocation, Base, Extent};
use crate::block::ByteRange;
use crate::buffer::push;
use crate::error::{Error, Result};

/// A reply of more extents than this would be cut by nbdkit; the client asks
/// again for the rest.
const MAX_EXTENTS: usize = 1 << 20;

/// The reply under construction: neighbours that are alike become one.
struct Reply {
    extents: Vec<Extent>,
    max: usize,
}

impl Reply {
    /// False once the reply is complete: `extent` and all after it are too much.
    fn add(&mut self, extent: Extent) -> Result<bool> {
        let full = self.extents.len() == self.max;
        match self.extents.last_mut() {
            Some(last) if last.allocation == extent.allocation => {
                last.bytes.end = extent.bytes.end;
            }
            _ if full => return Ok(false),
            _ => push(&mut self.extents, extent)?,
        }
        Ok(true)
    }
}

impl<S: Store> Overlay<S> {
    /// The extents of `len` bytes at `offset`, in ascending order without gaps,
    /// neighbours different from each other; all within the request. They cover
    /// all of it, or as much as one reply can hold; with `only_first` there is
    /// one (NBD_CMD_FLAG_REQ_ONE). EIO if the base breaks its promise.
    pub fn extents(
        &self,
        base: &impl Base,
        offset: u64,
        len: u64,
        only_first: bool,
    ) -> Result<Vec<Extent>> {
        let range = ByteRange::checked(offset, len, self.size)?;
        let mut below = Below::new(base, range.end, only_first);
        let mut reply = Reply {
            extents: Vec::new(),
            max: if only_first { 1 } else { MAX_EXTENTS },
        };
        for run in self.map.runs(self.block_size.touched_by(range)) {
            let (state, blocks) = run?;
            let bytes = self.bytes_of(&blocks).clamp_to(range);
            log::trace!("extent {bytes:?}: {state:?}");
            let goes_on = match state {
                State::Data => reply.add(Extent {
                    bytes,
                    allocation: Allocation::DATA,
                })?,
                State::Zero => reply.add(Extent {
                    bytes,
                    allocation: Allocation::HOLE,
                })?,
                State::Base => below.add_to(&mut reply, bytes)?,
            };
            if !goes_on {
                break;
            }
        }
        Ok(reply.extents)
    }
}

/// What the base has said about its extents so far.
///
/// It is asked for all of the rest of the request, not for one run of the map:
/// between overlay blocks there may be a million runs, and a call for each would
/// cost more than sending the reply.
struct Below<'a, B> {
    base: &'a B,
    end: u64,
    only_first: bool,
    known: Vec<Extent>,
    /// Extents of `known` before this one lie before all that will be asked for.
    at: usize,
}

impl<'a, B: Base> Below<'a, B> {
    fn new(base: &'a B, end: u64, only_first: bool) -> Self {
        Below {
            base,
            end,
            only_first,
            known: Vec::new(),
            at: 0,
        }
    }

    /// Adds the base's extents of `bytes` to the reply; false as [`Reply::add`].
    fn add_to(&mut self, reply: &mut Reply, bytes: ByteRange) -> Result<bool> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.only_first && self.is_exhausted(rest.start) && !reply.extents.is_empty() {
                // One extent was asked for, and there is one. That it might go on
                // is not worth another call: the base may be far away.
                return Ok(false);
            }
            let known = self.extent_at(rest.start)?;
            let part = ByteRange {
                start: rest.start,
                end: rest.end.min(known.bytes.end),
            };
            let goes_on = reply.add(Extent {
                bytes: part,
                allocation: known.allocation,
            })?;
            if !goes_on {
                return Ok(false);
            }
            rest.start = part.end;
        }
        Ok(true)
    }

    /// Whether the base was asked, and what it said ends before `offset`.
    fn is_exhausted(&self, offset: u64) -> bool {
        self.known
            .last()
            .is_some_and(|last| last.bytes.end <= offset)
    }

    /// The base's extent that holds the byte at `offset`.
    fn extent_at(&mut self, offset: u64) -> Result<Extent> {
        while let Some(extent) = self.known.get(self.at) {
            if offset < extent.bytes.end {
                return Ok(*extent);
            }
            self.at += 1;
        }
        self.known.clear();
        self.at = 0;
        let rest = ByteRange {
            start: offset,
            end: self.end,
        };
        self.base.extents(rest, self.only_first, &mut self.known)?;
        match self.known.first() {
            Some(first) if first.bytes.start == offset && offset < first.bytes.end => Ok(*first),
            _ => Err(Error::new(
                libc::EIO,
                format!("the layer below gave no extent for offset {offset}"),
            )),
        }
    }
}
