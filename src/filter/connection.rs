//! A connection's requests, and what its client is advised.

use crate::base::{Base, Extent};
use crate::block::{BlockSize, ByteRange};
use crate::counters::{Counter, Counters, Operation, Shard};
use crate::error::{Error, Result};
use crate::error_log;
use crate::overlay::{Overlay, Store, Zeroing};

use super::Filter;
use super::config::ScopeKind;
use super::exports::{Member, each};

/// Block-size advice to clients, in bytes (NBD_INFO_BLOCK_SIZE).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Advice {
    pub minimum: u32,
    pub preferred: u32,
    pub maximum: u32,
}

/// nbdkit refuses a preferred size above this.
const MAX_PREFERRED: u64 = 32 << 20;

/// A filter above that sets a minimum of as much, but no preferred size, refuses every
/// client where ours is less. It is also what most clients work with.
const MIN_PREFERRED: u64 = 4096;

/// A client's connection to an export.
pub struct Connection<'a> {
    filter: &'a Filter,
    overlay: Member<'a>,
}

impl<'a> Connection<'a> {
    pub(super) fn new(filter: &'a Filter, overlay: Member<'a>) -> Self {
        Connection { filter, overlay }
    }

    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        each!(&self.overlay, overlay => overlay.size())
    }

    /// Whether what one connection has written is seen by the others.
    pub fn can_multi_conn(&self) -> bool {
        self.filter.config.scope == ScopeKind::Export
    }

    /// The advice to the client, given that of the layer below (`None`: it has none).
    pub fn advice(&self, below: Option<Advice>) -> Advice {
        advice(each!(&self.overlay, overlay => overlay.block_size()), below)
    }

    pub fn read(&self, base: &impl Base, buf: &mut [u8], offset: u64) -> Result<()> {
        log::trace!("request: read {} bytes at {offset}", buf.len());
        let copy = self.filter.config.on_read.is_on();
        each!(&self.overlay, overlay => {
            let counts = overlay.counters().here();
            let done = overlay.read(&Counted { base, counts }, buf, offset, copy);
            counted(overlay, counts, Operation::Read, buf.len() as u64, done)
        })
    }

    /// With `fua`, here and below: what was written is safe from power loss, where
    /// it is kept at all.
    pub fn write(&self, base: &impl Base, buf: &[u8], offset: u64, fua: bool) -> Result<()> {
        log::trace!("request: write {} bytes at {offset}, fua={fua}", buf.len());
        each!(&self.overlay, overlay => {
            let counts = overlay.counters().here();
            let done = overlay.write(&Counted { base, counts }, buf, offset);
            let done = flushed_if(fua, overlay, counts, done);
            counted(overlay, counts, Operation::Write, buf.len() as u64, done)
        })
    }

    pub fn zero(
        &self,
        base: &impl Base,
        offset: u64,
        len: u64,
        how: Zeroing,
        fua: bool,
    ) -> Result<()> {
        log::trace!("request: zero {len} bytes at {offset}, {how:?}, fua={fua}");
        let operation = match how {
            Zeroing::Trim => Operation::Trim,
            Zeroing::Zero { .. } => Operation::Zero,
        };
        each!(&self.overlay, overlay => {
            let counts = overlay.counters().here();
            let done = overlay.zero(&Counted { base, counts }, offset, len, how);
            let done = flushed_if(fua, overlay, counts, done);
            counted(overlay, counts, operation, len, done)
        })
    }

    /// Covers what all connections have written. (A temporary overlay need not
    /// survive anything: nothing is left to do.)
    pub fn flush(&self) -> Result<()> {
        log::trace!("request: flush");
        each!(&self.overlay, overlay => {
            let counts = overlay.counters().here();
            counted(overlay, counts, Operation::Flush, 0, overlay.flush())
        })
    }

    pub fn cache(&self, base: &impl Base, offset: u64, len: u64) -> Result<()> {
        log::trace!("request: cache {len} bytes at {offset}");
        let copy = self.filter.config.on_cache;
        each!(&self.overlay, overlay => {
            let counts = overlay.counters().here();
            let done = overlay.cache(&Counted { base, counts }, offset, len, copy);
            counted(overlay, counts, Operation::Cache, len, done)
        })
    }

    pub fn extents(
        &self,
        base: &impl Base,
        offset: u64,
        len: u64,
        only_first: bool,
    ) -> Result<Vec<Extent>> {
        log::trace!("request: extents of {len} bytes at {offset}, only_first={only_first}");
        each!(&self.overlay, overlay => {
            let counts = overlay.counters().here();
            let found = overlay.extents(base, offset, len, only_first);
            counted(overlay, counts, Operation::Extents, len, found)
        })
    }

    /// Logs what there is to tell of the export.
    pub(super) fn log_figures(&self) {
        if !log::log_enabled!(target: "cow", log::Level::Debug) {
            return;
        }
        if let Some(figures) = self.overlay.figures() {
            // The end is what programs look for that read the log of nbdkit's own cow filter.
            log::debug!(
                target: "cow",
                "a client disconnects: {}; cow: underlying file size: {}",
                figures.json(),
                figures.size,
            );
        }
    }
}

/// The base, with what is read of it counted.
struct Counted<'a, B> {
    base: &'a B,
    counts: &'a Shard,
}

impl<B: Base> Base for Counted<'_, B> {
    #[inline(always)]
    fn size(&self) -> u64 {
        self.base.size()
    }

    #[inline(always)]
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.counts.add(Counter::BaseReads, 1);
        self.counts.add(Counter::BaseReadBytes, buf.len() as u64);
        self.base.read(buf, offset)
    }

    fn cache(&self, range: ByteRange) -> Result<()> {
        self.base.cache(range)
    }

    fn extents(&self, range: ByteRange, only_first: bool, list: &mut Vec<Extent>) -> Result<()> {
        self.base.extents(range, only_first, list)
    }
}

/// What a change with FUA comes to, which is `done`.
#[inline(always)]
fn flushed_if<S: Store>(
    fua: bool,
    overlay: &Overlay<S>,
    counts: &Shard,
    done: Result<()>,
) -> Result<()> {
    if !fua {
        return done;
    }
    counts.add(Counter::Fua, 1);
    done.and_then(|()| overlay.flush())
}

/// Counts a request of `bytes` that has come to `done`. It comes last: who finds nothing
/// counted since he looked at the overlay finds that as it was.
#[inline(always)]
fn counted<T, S: Store>(
    overlay: &Overlay<S>,
    counts: &Shard,
    request: Operation,
    bytes: u64,
    done: Result<T>,
) -> Result<T> {
    counts.request(request, bytes);
    done.map_err(|error| failed(overlay.counters(), request, error))
}

#[cold]
#[inline(never)]
fn failed(counters: &Counters, request: Operation, error: Error) -> Error {
    // An answer that the client has asked for.
    if error.refuses_fast_zero() {
        return error.unlogged();
    }
    let kind = counters.failed(request, &error);
    // What the layer below has logged is its own.
    if error.is_reported() {
        return error;
    }
    match error_log::admit(kind) {
        Some(unlogged) => error.after(unlogged),
        None => error.unlogged(),
    }
}

fn advice(block_size: BlockSize, below: Option<Advice>) -> Advice {
    let preferred = block_size.bytes().clamp(MIN_PREFERRED, MAX_PREFERRED) as u32;
    let Some(below) = below else {
        // We split requests ourselves, so any size is right.
        return Advice {
            minimum: 1,
            preferred,
            maximum: u32::MAX,
        };
    };
    // The best size that the layer takes.
    let fits = |size: &u32| (below.minimum..=below.maximum).contains(size);
    let sizes = [preferred, MIN_PREFERRED as u32, below.preferred];
    Advice {
        preferred: sizes
            .into_iter()
            .filter(fits)
            .max()
            .unwrap_or(below.preferred),
        ..below
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(block_size: u64, below: Option<(u32, u32, u32)>) -> (u32, u32, u32) {
        let block_size = BlockSize::new(block_size).expect("a block size");
        let below = below.map(|(minimum, preferred, maximum)| Advice {
            minimum,
            preferred,
            maximum,
        });
        let advice = advice(block_size, below);
        (advice.minimum, advice.preferred, advice.maximum)
    }

    #[test]
    fn without_constraints_below_any_size_goes_and_the_block_size_is_best() {
        assert_eq!(of(512, None), (1, 4096, u32::MAX));
        assert_eq!(of(4096, None), (1, 4096, u32::MAX));
        assert_eq!(of(65536, None), (1, 65536, u32::MAX));
        assert_eq!(of(1 << 31, None), (1, 32 << 20, u32::MAX));
    }

    #[test]
    fn constraints_below_are_kept_but_the_preferred_size_is_raised() {
        assert_eq!(of(65536, Some((512, 4096, 1 << 20))), (512, 65536, 1 << 20));
        assert_eq!(of(4096, Some((512, 65536, 1 << 20))), (512, 65536, 1 << 20));
        assert_eq!(of(65536, Some((512, 4096, 32768))), (512, 4096, 32768));
        assert_eq!(of(512, Some((1, 512, u32::MAX))), (1, 4096, u32::MAX));
        assert_eq!(of(65536, Some((512, 512, 32768))), (512, 4096, 32768));
        assert_eq!(of(4096, Some((512, 512, 2048))), (512, 512, 2048));
        assert_eq!(of(512, Some((65536, 65536, 65536))), (65536, 65536, 65536));
    }
}
