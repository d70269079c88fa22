//! The overlay: a disk that can be written to, over a base that never changes.
//!
//! A block's bytes are in the base, in the [`Store`], or nowhere (zeroes); the
//! block map (`map`) says which. Requests run in parallel. All locking is done
//! here, in `change` and in `reclaim`, and this is the argument for it.
//!
//! # Who changes what
//!
//! | operation | stripes | writes to the store | then publishes |
//! |---|---|---|---|
//! | read | none | nothing | nothing |
//! | write of whole blocks | shared | the client's bytes | *data* (*zero*, if all zeroes and no data yet) |
//! | write into a *data* block, in place | shared | the client's bytes | nothing |
//! | fill, read-modify-write | exclusive | whole blocks | *data* or *zero* |
//! | zeroes that keep their space | exclusive | zeroes | *data* |
//! | discard (trim, zeroes that may trim) | exclusive | nothing | *zero* |
//! | giving space back (`reclaim`) | exclusive | a hole, where nothing is *data* | nothing |
//!
//! A *fill* saves what the base has (cow-on-read, cow-on-cache). It and a
//! *read-modify-write* (of the block around a partial write) write bytes that their client
//! did not send. That is where data is lost if one is careless, because between reading
//! the base and writing to the store another request may have written to the block.
//!
//! # The rule
//!
//! *The base never changes, so read it without a lock; then lock, look at the
//! state again, and only then write and publish.* No stripe is held across a
//! call to the base.
//!
//! # Why no acknowledged write is lost
//!
//! Take a write W that was acknowledged, and some byte of it in block b. What
//! could put another value there that no later request asked for?
//!
//! - *A fill of b that read the base before W.* It has to take b's stripe
//!   exclusively and look at the state again. If W was a whole block or a
//!   read-modify-write, b is *data* or *zero* by then, and the fill is dropped. If W was
//!   in place, b was *data* all along. If W comes after the fill has let go, W sees
//!   *data*. There is no fourth case, since W holds the stripe shared from its
//!   look at the state until it has published.
//! - *A read-modify-write of other bytes of b that read the base before W.* It too looks
//!   again. If b has become *data* it writes its own client's bytes in place; if b has
//!   become *zero* the rest of the block is zeroes.
//! - *A read-modify-write of the same byte that came before W.* It heard of W, and leaves
//!   that byte out: see the order of changes in `stripes`. One that came after W may
//!   have its own byte there.
//! - *A discard that another client sent to other bytes of b.* Zeroes in a part of a
//!   block are a write in place or a read-modify-write, so they write those other bytes
//!   only. (A trim of a part of a block that is *base* does nothing.) A discard of b as a
//!   whole overlaps W: if it came first it is followed by W, and if it came later it was
//!   asked for.
//! - *The punching of a discard that came before W.* It happens under an exclusive hold,
//!   and only where b is not *data* then. If W was stored, b is *data*. If W comes after
//!   it, W stores its bytes behind it. A write in place needs b to be *data*, and a block
//!   that becomes *data* is stored as a whole.
//! - *A write of whole blocks, of which b is one, in flight together with W.* It
//!   overlaps W, either order is right. If it is all zeroes and b has become
//!   *data* under its hands (through W, which also holds the stripe shared, so
//!   W is a whole-block write), it is dropped for b: that is the order "zeroes
//!   first". Fills and discards can't be in between: they need the stripe alone.
//! - *A read that started before W and copies (cow-on-read).* It is a fill.
//!
//! A read takes no lock. It sees a state, then reads from where the state says.
//! If the state changes in between, the change was in flight together with the
//! read: it may get the old bytes, the new ones, or zeroes where a discard was in
//! flight. It can't see bytes that never were, because *data* is published after
//! the bytes are there, and the store is never truncated or reused for another
//! block.
//!
//! # When something fails
//!
//! A state is published only after the store has taken the bytes, so a block
//! that could not be stored is what it was before. What the store did take of it
//! is orphaned space, which nobody can read, and is given back like that of a discard.
//!
//! What nobody asked for (a copy of the base, the freeing of a block that has become
//! zeroes) never makes a request fail.

pub mod budget;
mod change;
mod content;
mod extents;
mod limit;
mod map;
mod ranges;
mod reclaim;
mod store;
mod stripes;
mod write;
mod zero;

use std::ops::Range;
use std::sync::{Arc, OnceLock};

pub use budget::{Account, Budget};
pub use content::Zeroing;
pub use limit::OVERLAY_LEN;
pub use map::{BlockMap, State, Usage};
pub use reclaim::Reclaim;
pub use store::{Purpose, Store};

use crate::base::Base;
use crate::block::{BlockNum, BlockSize, ByteRange, parts};
use crate::buffer::buffer;
use crate::counters::{Counter, Counters, Operation};
use crate::error::{Error, Result};
use crate::error_log;
use limit::Limit;
use reclaim::Pending;
use stripes::Stripes;
use write::COPY;

/// How much of the base cow-on-cache reads at a time: it bounds the memory that
/// a request of up to 4G takes.
const CACHE_CHUNK: u64 = 4 << 20;

/// See the module's documentation.
pub struct Overlay<S> {
    size: u64,
    block_size: BlockSize,
    map: BlockMap,
    stripes: Stripes,
    store: S,
    /// The store may have bytes that the map does not know of: discards look for them.
    has_orphans: bool,
    pending: Pending,
    reclaim: Arc<Reclaim>,
    counters: Counters,
    /// Why a change of the store has failed of which no client could be told. Some
    /// systems (NFS) tell of a write that was lost with a later one, and once only.
    untold: OnceLock<String>,
    /// The last field: when this is dropped, which gives back what is charged, the store's
    /// files are closed.
    limit: Option<Limit>,
}

impl<S: Store> Overlay<S> {
    /// An overlay in which nothing was written yet, for a disk of `size` bytes.
    pub fn new(size: u64, block_size: BlockSize, store: S) -> Self {
        Overlay {
            size,
            block_size,
            map: BlockMap::new(block_size.count(size)),
            stripes: Stripes::new(block_size),
            store,
            has_orphans: false,
            pending: Pending::default(),
            reclaim: Arc::default(),
            counters: Counters::default(),
            untold: OnceLock::new(),
            limit: None,
        }
    }

    /// An overlay over a store that has content: `load` fills the map.
    pub fn resume(
        size: u64,
        block_size: BlockSize,
        store: S,
        load: impl FnOnce(&S, &BlockMap) -> Result<()>,
    ) -> Result<Self> {
        let overlay = Overlay {
            // A crash leaves bytes that no flush has told of.
            has_orphans: true,
            ..Self::new(size, block_size, store)
        };
        load(&overlay.store, &overlay.map)?;
        // Nobody else has it yet.
        overlay.map.prune(&(BlockNum(0)..block_size.count(size)));
        Ok(overlay)
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Whether every block is *base*.
    pub fn is_untouched(&self) -> bool {
        self.map.is_untouched()
    }

    /// What the block map has in it now. Takes time for each part of the disk that was
    /// written to.
    pub fn usage(&self) -> Usage {
        self.map.usage()
    }

    /// Where the bytes are kept.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// What came of its requests. Those of clients are counted by who makes them.
    #[inline(always)]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The state of the block that holds the byte at `offset`.
    pub fn state_at(&self, offset: u64) -> Result<State> {
        self.map.state(self.block_size.block_of(offset))
    }

    /// Whether all blocks of which `range` has bytes are *base*. EINVAL if it has none, or
    /// reaches past the disk's end.
    pub fn is_base(&self, range: ByteRange) -> Result<bool> {
        let blocks = self.block_size.touched_by(range);
        Ok(self.map.run(&blocks)? == (State::Base, blocks.end))
    }

    /// Fills `buf` with the disk's bytes at `offset`. With `copy`, whole blocks
    /// of the base are read and saved in the overlay (cow-on-read); that they
    /// can't be saved does not make the read fail.
    pub fn read(&self, base: &impl Base, buf: &mut [u8], offset: u64, copy: bool) -> Result<()> {
        let range = ByteRange::checked(offset, buf.len() as u64, self.size)?;
        // Not by `runs`, which the compiler calls for each block: most reads are of one.
        let mut rest = self.block_size.touched_by(range);
        while rest.start < rest.end {
            let (state, end) = self.map.run(&rest)?;
            let blocks = rest.start..end;
            rest.start = end;
            let part = self.bytes_of(&blocks).clamp_to(range);
            if log::log_enabled!(log::Level::Trace) {
                trace_read(part, state);
            }
            let piece = &mut buf[part.in_buffer(offset)];
            match state {
                State::Zero => piece.fill(0),
                State::Data => self.store.read(piece, part.start)?,
                State::Base if copy && self.has_room_for_copy(&blocks) => {
                    self.read_and_copy(base, piece, part)?;
                }
                State::Base => base.read(piece, part.start)?,
            }
        }
        Ok(())
    }

    fn read_and_copy(&self, base: &impl Base, buf: &mut [u8], part: ByteRange) -> Result<()> {
        let blocks = self.block_size.touched_by(part);
        let whole = self.bytes_of(&blocks);
        let saved = if whole == part {
            base.read(buf, part.start)?;
            self.fill(blocks, buf, Counter::CopiedOnRead)
        } else {
            match read_whole(base, whole) {
                Ok(bytes) => {
                    buf.copy_from_slice(&bytes[part.in_buffer(whole.start)]);
                    self.fill(blocks, &bytes, Counter::CopiedOnRead)
                }
                // The client has not asked for the rest of the blocks. It may be what
                // can't be read, or what there is no memory for.
                Err(e) => {
                    base.read(buf, part.start)?;
                    Err(e)
                }
            }
        };
        if let Err(e) = saved {
            self.note_not_saved(Operation::CowOnRead, &e);
        }
        Ok(())
    }

    /// That a copy is not saved must not fail the request that it is made for.
    fn note_not_saved(&self, why: Operation, error: &Error) {
        // That a limit leaves no room for copies is no failure.
        if error.is_over_limit() {
            return;
        }
        let kind = self.counters.failed(why, error);
        // What the layer below could not read it has told of itself.
        if !error.is_reported() {
            error_log::warn(kind, || {
                format!("{}: what was read is not saved: {error}", why.name())
            });
        }
        self.note_untold(error);
    }

    /// Takes note of an error of which no client is told. A flush has to tell of it if it
    /// may be that of an earlier write. A want of space is taken for one of this write:
    /// what was acknowledged had its space. (On NFS that is not so: the server may find
    /// out later that there is none.)
    fn note_untold(&self, error: &Error) {
        if error.is_of_write() && !error.is_full() {
            self.untold.get_or_init(|| error.to_string());
        }
    }

    /// Saves `bytes`, which the base has in `blocks`, where the blocks are still
    /// *base*, and counts those. One stripe at a time, so that writers beside it wait for
    /// no more than the copying of one area.
    fn fill(&self, blocks: Range<BlockNum>, bytes: &[u8], copied: Counter) -> Result<()> {
        let origin = self.block_size.start_of(blocks.start);
        for area in parts(blocks, |start| self.stripes.area_end(start)) {
            let filled = self.stripes.exclusive(&area, |held| {
                for run in self.map.runs(area.clone()) {
                    let (state, run) = run?;
                    if state == State::Base {
                        let part = self.bytes_of(&run).in_buffer(origin);
                        self.store_blocks::<COPY, _>(held, &run, &bytes[part])?;
                        self.counters.add(copied, run.end.0 - run.start.0);
                    }
                }
                Ok(())
            });
            self.give_back_if_failed(self.bytes_of(&area), filled)?;
        }
        Ok(())
    }

    /// Prefetches `len` bytes at `offset`: with `copy`, saves them in the overlay
    /// (cow-on-cache); else, or where they can't be saved, asks the base to, for those
    /// that are still there.
    pub fn cache(&self, base: &impl Base, offset: u64, len: u64, copy: bool) -> Result<()> {
        let range = ByteRange::checked(offset, len, self.size)?;
        for run in self.map.runs(self.block_size.touched_by(range)) {
            let (state, blocks) = run?;
            if state != State::Base {
                continue;
            }
            let bytes = self.bytes_of(&blocks).clamp_to(range);
            log::trace!("cache {bytes:?}, copy={copy}");
            if copy {
                match self.copy_from_base(base, blocks) {
                    Ok(()) => continue,
                    Err(e) => self.note_not_saved(Operation::CowOnCache, &e),
                }
            }
            base.cache(bytes)?;
        }
        Ok(())
    }

    fn copy_from_base(&self, base: &impl Base, blocks: Range<BlockNum>) -> Result<()> {
        let step = (CACHE_CHUNK / self.block_size.bytes()).max(1);
        let chunk_end = |start: BlockNum| BlockNum(start.0 + step);
        let first = blocks.start..blocks.end.min(chunk_end(blocks.start));
        let mut bytes = buffer(self.bytes_of(&first).len())?;
        for chunk in parts(blocks, chunk_end) {
            if !self.has_room_for_copy(&chunk) {
                return Err(Error::over_limit("no more is copied"));
            }
            let part = self.bytes_of(&chunk);
            let bytes = &mut bytes[part.in_buffer(part.start)];
            base.read(bytes, part.start)?;
            self.fill(chunk, bytes, Counter::CopiedOnCache)?;
        }
        Ok(())
    }

    /// Changes the states of `blocks` by `set`, one of those of the block map.
    #[inline(always)]
    fn publish(
        &self,
        blocks: &Range<BlockNum>,
        set: impl Fn(&BlockMap, &Range<BlockNum>) -> Result<bool>,
    ) -> Result<()> {
        self.store.publish(blocks, |part| set(&self.map, part))
    }

    /// Makes what was written before safe from power loss, where the store keeps it.
    pub fn flush(&self) -> Result<()> {
        if let Some(why) = self.untold.get() {
            return Err(Error::new(
                libc::EIO,
                format!("what was written may be lost, since a later write failed: {why}"),
            ));
        }
        self.store.flush(&|word| self.map.word(word))
    }

    /// To be called with what came of a request that changes `range`, no stripe held. If
    /// it has failed, the store may have taken some bytes of the blocks that it touches.
    /// Those of blocks that are not *data* nobody can read: their space is given back.
    #[inline(always)]
    fn give_back_if_failed(&self, range: ByteRange, done: Result<()>) -> Result<()> {
        // Over the limit it has taken nothing.
        if done.as_ref().is_err_and(|e| !e.is_over_limit()) {
            self.give_back_unused(range);
        }
        done
    }

    /// Has given back what the store has of the blocks of `range` that are not *data*. No
    /// stripe is held.
    #[cold]
    fn give_back_unused(&self, range: ByteRange) {
        // A read-modify-write stores all of its block.
        let blocks = self.block_size.touched_by(range);
        self.pending.insert(self.bytes_of(&blocks));
        self.give_back_later();
    }

    fn bytes_of(&self, blocks: &Range<BlockNum>) -> ByteRange {
        self.block_size.bytes_of(blocks, self.size)
    }
}

/// What the base has in `whole`.
fn read_whole(base: &impl Base, whole: ByteRange) -> Result<Vec<u8>> {
    let mut bytes = buffer(whole.len())?;
    base.read(&mut bytes, whole.start)?;
    Ok(bytes)
}

// By value and out of line: a record that nobody sees must not make the request
// keep in memory what it could have in registers.

#[cold]
#[inline(never)]
fn trace_read(part: ByteRange, state: State) {
    log::trace!("read {part:?}: {state:?}");
}
