//! Giving space back, without anybody waiting for it.
//!
//! A discard publishes *zero*, which is a change of memory only, and is answered. The
//! space that the blocks take in the store is punched out later, from a set of byte
//! ranges ([`Pending`]). The set says where there may be something to punch. What is
//! punched is decided by the block map, at the time: for each piece of at most 1 MiB, which
//! lies in one area, its stripe is taken exclusively, and only what is not *data* is punched. So a write
//! that comes between the discard and the punching is safe: either it has published
//! *data* before the piece is looked at, or it waits for the stripe and stores its bytes
//! after the hole was made. Bytes of blocks that are not *data* are never read, and who
//! makes such a block *data* stores all of it.
//!
//! Pieces are small because a file system holds its lock on the file while it punches:
//! all writers of the file wait for one piece. How long a piece takes depends on the file
//! system and on how much of the piece is stored in how many extents (on ext4 without a
//! journal, mounted with `discard`, 2 ms for each extent were seen). So pieces begin
//! small, and grow as long as they take no time.
//!
//! What a failed request has left behind is given back in the same way.
//!
//! Where even a hole needs space (on XFS) punching can find none. It is tried again when
//! something else was given back, and by the next request that gives something back or
//! finds no space.
//!
//! # Who does it
//!
//! One thread for all overlays of a filter ([`Reclaim::run`]). Where there is none, the
//! request that made the work does it before it is answered. A request that finds the
//! store full punches all that is left at once, of all overlays, because they share a
//! file system, and tries again.
//!
//! # Locks
//!
//! `punching` is taken before any stripe, and is held while a piece is punched: who finds
//! the set empty under it knows that nothing is under way. No stripe is held when it is
//! taken. The locks of the sets are inner ones, held for moments; that of what is to be
//! tried again is taken before the other. Those of [`Reclaim`] are outside of all of them,
//! and are not held while anything is punched.

use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::ranges::Ranges;
use super::stripes::{AREA, Exclusive, Held};
use super::{Overlay, State, Store};
use crate::block::{BlockNum, ByteRange};
use crate::counters::{Counter, Operation};
use crate::error::Error;
use crate::error_log;
use crate::sync::{AtomicBool, AtomicU64, Condvar, Mutex, Ordering, locked};

/// The unit in which nearly every file system gives space back, in bytes.
const FILE_SYSTEM_BLOCK: u64 = 4096;

/// Where an overlay may have space that nobody needs.
#[derive(Default)]
pub struct Pending {
    ranges: Mutex<Ranges>,
    /// What could not be punched because even that needs space (as XFS does).
    without_room: Mutex<Ranges>,
    punching: Mutex<PieceLength>,
    /// Something could not be punched, for another reason.
    has_failed: AtomicBool,
}

/// How much is punched under one hold, in bytes: a power of two.
struct PieceLength(u64);

impl Default for PieceLength {
    fn default() -> Self {
        PieceLength(Self::MIN)
    }
}

impl PieceLength {
    /// The smallest. (Time must not make a difference in the model checker.)
    const MIN: u64 = if cfg!(loom) { AREA } else { 64 << 10 };
    /// A piece that takes longer than this is too long to wait for.
    const LONG: Duration = Duration::from_millis(10);
    const SHORT: Duration = Duration::from_millis(2);

    /// Where the piece that begins at `start` ends.
    fn end_of(&self, start: u64) -> u64 {
        (start / self.0 + 1).saturating_mul(self.0)
    }

    fn adapt(&mut self, took: Duration) {
        if took > Self::LONG {
            self.0 = (self.0 / 2).max(Self::MIN);
        } else if took < Self::SHORT {
            self.0 = (self.0 * 2).min(AREA);
        }
    }
}

impl Pending {
    pub fn insert(&self, range: ByteRange) {
        locked(&self.ranges).insert(range);
    }

    /// Has another try at what could not be punched for want of space.
    fn retry(&self) {
        let mut without_room = locked(&self.without_room);
        let mut ranges = locked(&self.ranges);
        while let Some(range) = without_room.pop_first() {
            ranges.insert(range);
        }
    }

    fn is_empty(&self) -> bool {
        locked(&self.ranges).is_empty()
    }

    /// Whether anything in `range` is still to be given back, or can't be.
    fn has_any_of(&self, range: ByteRange) -> bool {
        self.has_failed.load(Ordering::Relaxed)
            || locked(&self.without_room).meets(range)
            || locked(&self.ranges).meets(range)
    }
}

/// An overlay, whatever its store is.
trait GivesBack: Send + Sync {
    /// As [`Overlay::give_back`], until `is_stopped`.
    fn give_back_until(&self, is_stopped: &dyn Fn() -> bool);
}

/// What the overlays of a filter have in common.
#[derive(Default)]
pub struct Reclaim {
    overlays: Mutex<Vec<Weak<dyn GivesBack>>>,
    thread: Mutex<Thread>,
    wanted: Condvar,
    /// In how many pieces something has been punched so far.
    pieces: AtomicU64,
}

#[derive(Default)]
struct Thread {
    is_running: bool,
    is_wanted: bool,
    is_stopped: bool,
}

impl Reclaim {
    /// Gives back what is pending, now and later, until [`Reclaim::stop`] is called. For
    /// a thread of its own.
    pub fn run(&self) {
        let _running = Running::new(self);
        while self.wait() {
            self.give_back_all(|| locked(&self.thread).is_stopped);
        }
    }

    /// Ends the thread, after the piece that it has in hand. What is left stays pending.
    pub fn stop(&self) {
        locked(&self.thread).is_stopped = true;
        self.wanted.notify_all();
    }

    /// Waits until there is something to do. False: the thread is to end.
    fn wait(&self) -> bool {
        let mut thread = locked(&self.thread);
        while !thread.is_wanted && !thread.is_stopped {
            thread = self
                .wanted
                .wait(thread)
                .unwrap_or_else(PoisonError::into_inner);
        }
        thread.is_wanted = false;
        !thread.is_stopped
    }

    /// Wakes the thread. False: there is none.
    fn wake(&self) -> bool {
        let mut thread = locked(&self.thread);
        thread.is_wanted = true;
        self.wanted.notify_all();
        thread.is_running
    }

    /// Gives back what is pending of all overlays.
    fn give_back_all(&self, is_stopped: impl Fn() -> bool) {
        let overlays = locked(&self.overlays).clone();
        for overlay in overlays.iter().filter_map(Weak::upgrade) {
            // All space of one that nobody uses any more comes back when it is dropped.
            overlay.give_back_until(&|| is_stopped() || Arc::strong_count(&overlay) == 1);
        }
    }

    /// Moves on with each piece in which something was punched.
    #[inline]
    pub fn progress(&self) -> u64 {
        self.pieces.load(Ordering::Relaxed)
    }
}

/// The thread is there, until this is dropped.
struct Running<'a>(&'a Reclaim);

impl<'a> Running<'a> {
    fn new(reclaim: &'a Reclaim) -> Self {
        locked(&reclaim.thread).is_running = true;
        Running(reclaim)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        locked(&self.0.thread).is_running = false;
    }
}

impl<S: Store> Overlay<S> {
    /// Gives back all that is pending, and waits for what others are giving back.
    pub fn give_back(&self) {
        self.give_back_until(&|| false);
    }

    /// The same for one piece. False: there is none left.
    fn give_back_piece(&self) -> bool {
        let mut length = locked(&self.pending.punching);
        let Some(mut range) = locked(&self.pending.ranges).pop_first() else {
            return false;
        };
        if self.has_orphans {
            // The range may be all of a large disk of which little is stored.
            let stored = self.store.next_stored(range.start).unwrap_or(range.start);
            let hole = ByteRange {
                end: stored.clamp(range.start, range.end),
                ..range
            };
            // Zeroes that keep their space look like a hole.
            let taken = self.first_taken(&self.block_size.touched_by(hole));
            let taken = taken.map(|block| self.block_size.start_of(block).max(range.start));
            range.start = taken.unwrap_or(hole.end);
        }
        let piece = ByteRange {
            end: range.end.min(length.end_of(range.start)),
            ..range
        };
        self.pending.insert(ByteRange {
            start: piece.end,
            ..range
        });
        if !piece.is_empty() && self.punch_unused(piece, &mut length) {
            self.shrink_map(piece);
            self.reclaim.pieces.fetch_add(1, Ordering::Relaxed);
            self.pending.retry();
        }
        true
    }

    /// Punches out what is not *data* in `piece`, which lies within one area, and tells
    /// whether there was anything.
    fn punch_unused(&self, piece: ByteRange, length: &mut PieceLength) -> bool {
        // Smaller blocks share a block of the file system, which is given back as a whole.
        let piece = ByteRange {
            start: piece.start / FILE_SYSTEM_BLOCK * FILE_SYSTEM_BLOCK,
            end: piece.end.next_multiple_of(FILE_SYSTEM_BLOCK).min(self.size),
        };
        let blocks = self.block_size.touched_by(piece);
        self.stripes.exclusive(&blocks, |held| {
            let mut data = Ranges::default();
            for run in self.map.runs(blocks.clone()) {
                match run {
                    Ok((State::Data, run)) => data.insert(self.bytes_of(&run)),
                    Ok(_) => {}
                    // What is not known to be unused is kept.
                    Err(_) => return false,
                }
            }
            let begun = Instant::now();
            let mut has_punched = false;
            for unused in data.gaps(piece) {
                match self.store.punch(unused) {
                    Ok(true) => {
                        has_punched = true;
                        self.note_given_back(held, unused);
                    }
                    Ok(false) => {}
                    Err(e) => self.note_not_punched(unused, &e),
                }
            }
            length.adapt(begun.elapsed());
            has_punched
        })
    }

    /// `unused`, in which nothing is *data*, was punched out. The blocks that lie in it as a
    /// whole are not stored any more. A large block, of which it is a part, is not once
    /// nothing of it is pending. What a discard makes pending is a whole block, under the
    /// hold, so a part that was stored again meanwhile is.
    fn note_given_back(&self, held: &Held<'_, Exclusive>, unused: ByteRange) {
        let blocks = self.block_size.touched_by(unused);
        debug_assert!(held.covers(&blocks));
        let is_given_back = |block: BlockNum| {
            let whole = self.bytes_of(&(block..block.next()));
            whole.clamp_to(unused) == whole || !self.pending.has_any_of(whole)
        };
        let mut given_back = blocks.clone();
        if !is_given_back(given_back.start) {
            given_back.start = given_back.start.next();
        }
        if given_back.start < given_back.end && !is_given_back(BlockNum(given_back.end.0 - 1)) {
            given_back.end.0 -= 1;
        }
        if given_back.start < given_back.end {
            // It does not grow the map, and the blocks are those of the disk.
            let stored = self.map.set_given_back(&given_back).unwrap_or_default();
            self.counters
                .add(Counter::GivenBackBytes, stored * self.block_size.bytes());
            if let Some(limit) = &self.limit {
                limit.note_given_back(&given_back, stored);
            }
        }
    }

    /// That something can't be punched loses nothing but the space, since what is not
    /// *data* is not read. For want of space it is tried again later. Otherwise it is told,
    /// and not tried again, which could go on for ever.
    fn note_not_punched(&self, unused: ByteRange, error: &Error) {
        if error.is_full() {
            log::debug!("tried again later: {error}");
            locked(&self.pending.without_room).insert(unused);
            return;
        }
        self.note_untold(error);
        self.pending.has_failed.store(true, Ordering::Relaxed);
        let kind = self.counters.failed(Operation::GiveBack, error);
        error_log::warn(kind, || {
            format!("space that is not needed any more can't be given back: {error}")
        });
    }

    /// Has given back what is pending: by the thread, or here and now if there is none.
    /// No stripe is held.
    pub(super) fn give_back_later(&self) {
        self.pending.retry();
        if !self.pending.is_empty() && !self.reclaim.wake() {
            self.give_back();
        }
    }

    /// Makes what room there is to be had. No stripe is held.
    pub(super) fn make_room(&self) {
        self.give_back();
        self.reclaim.give_back_all(|| false);
    }
}

impl<S: Store + 'static> Overlay<S> {
    /// This overlay as one of those of a filter.
    pub fn join(mut self, reclaim: &Arc<Reclaim>) -> Arc<Self> {
        self.reclaim = Arc::clone(reclaim);
        let overlay = Arc::new(self);
        let weak: Weak<Self> = Arc::downgrade(&overlay);
        let mut overlays = locked(&reclaim.overlays);
        overlays.retain(|other| other.strong_count() > 0);
        overlays.push(weak);
        drop(overlays);
        overlay
    }
}

impl<S: Store> GivesBack for Overlay<S> {
    fn give_back_until(&self, is_stopped: &dyn Fn() -> bool) {
        self.pending.retry();
        while !is_stopped() && self.give_back_piece() {}
    }
}
