//! What an overlay charges to the limit of all overlays (`cow-limit`, [`super::budget`]), and
//! when. Without a limit nothing of this is done.
//!
//! Charged are whole blocks that are *stored*, as the block map says it: also the last one
//! of the disk, and also those that are *zero* and wait to be punched out. Charged is the
//! memory of the block map, when it is allocated, and, by the store, what its tables take.
//! So is the overlay itself, with its first change: one that nobody has changed goes with
//! its last client, and one that was lasts, also if all of it is zeroes.
//!
//! # In which order
//!
//! A change that makes blocks *data*, under its hold of their stripes,
//!
//! 1. makes the leaves of the map: what it needs of memory is settled at once, and with the
//!    first change what the overlay itself takes;
//! 2. has the store take space for its tables, which settles that too;
//! 3. charges the blocks that are not stored yet;
//! 4. writes, publishes, and settles what has become stored by that.
//!
//! So it has nothing in flight while it may have to wait for room, and waits for nothing
//! while it has: publishing does not grow the map any more, because nobody unlinks a leaf
//! without a hold of all its blocks. Where it is refused no block has changed.
//!
//! Two changes of the same block under shared holds have it both in flight. The word of
//! the map tells which of them has made it stored; the other gives its charge back. Where
//! there is room for one only, the other waits, is refused, and looks again what it needs.
//!
//! # Orphans
//!
//! A change that fails in the store may have stored bytes of blocks that the map does not
//! know as stored. They are *orphans*, and stay charged until they are punched out, or
//! become stored after all. `orphans` is locked while blocks become stored, so that a block
//! is never both.
//!
//! # Room
//!
//! A request that is refused has everything punched out that waits for it, in all
//! overlays, and tries again: as one that finds the file system full, but as often as
//! something was given back since (see `change`). Else one of many who write and trim would
//! be refused when another has taken what was given back.
//!
//! # Locks
//!
//! Stripes, `orphans`, then those of the store while it publishes, of `pending` or of the
//! budget.
//!
//! First changes, of all overlays, come one after the other: [`Limit::begin_change`] has a lock
//! of the budget. Else two of them could each take what an overlay takes by itself, and
//! neither would have room for its blocks. Who has that lock holds stripes, and may wait for
//! room. Nobody who wants it has anything in flight, because it is the first thing that a
//! change asks for.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use super::budget::{Account, Charge, Share};
use super::map::BlockMap;
use super::store::Purpose;
use super::stripes::Held;
use super::{Overlay, Store};
use crate::block::{BlockNum, BlockSize};
use crate::error::Result;
use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering, locked};

/// What an overlay takes beside its blocks and its map, with the name of its export, in
/// bytes: never less than what it is, and a number that can be told.
pub const OVERLAY_LEN: u64 = 16 << 10;

/// The longest name of an export, of the NBD protocol.
const MAX_NAME: usize = 4096;

/// See the module's documentation.
pub struct Limit {
    account: Arc<Account>,
    block_size: BlockSize,
    /// The overlay itself is charged.
    is_charged: AtomicBool,
    /// Numbers of blocks that are charged, and are not stored as the map says it.
    orphans: Mutex<BTreeSet<u64>>,
}

impl Limit {
    fn bytes(&self, blocks: u64) -> u64 {
        blocks * self.block_size.bytes()
    }

    /// To be called before a change that needs `more` beside the overlay itself. Charges that,
    /// if this is the first change, and keeps other first changes out until what it returns
    /// is dropped. ENOSPC if not both fit.
    pub fn begin_change(
        &self,
        more: impl FnOnce() -> u64,
        share: Share,
    ) -> Result<Option<MutexGuard<'_, ()>>> {
        if self.is_charged.load(Ordering::Acquire) {
            return Ok(None);
        }
        let first = self.account.budget().first_change();
        // Another one may have been first.
        if !self.is_charged.load(Ordering::Acquire) {
            // The rest is charged again when it is known exactly.
            let charge = self.account.charge(OVERLAY_LEN + more(), share)?;
            charge.settle(OVERLAY_LEN);
            self.is_charged.store(true, Ordering::Release);
        }
        Ok(Some(first))
    }

    /// What [`Limit::begin_change`] would charge.
    fn uncharged_overlay(&self) -> u64 {
        match self.is_charged.load(Ordering::Acquire) {
            true => 0,
            false => OVERLAY_LEN,
        }
    }

    /// How many of `blocks` have to be charged before they become *data*.
    fn uncharged(&self, map: &BlockMap, blocks: &Range<BlockNum>) -> Result<u64> {
        let orphans = locked(&self.orphans);
        let orphaned = orphans.range(blocks.start.0..blocks.end.0).count() as u64;
        Ok(blocks.end.0 - blocks.start.0 - map.stored(blocks)? - orphaned)
    }

    /// `blocks` were punched out; as the map says it, `stored` of them were stored.
    pub fn note_given_back(&self, blocks: &Range<BlockNum>, stored: u64) {
        let mut orphans = locked(&self.orphans);
        let orphaned = take(&mut orphans, blocks, |_| true);
        self.account.give_back(self.bytes(stored + orphaned));
    }

    /// The first of `blocks` that is an orphan.
    fn first_orphan(&self, blocks: &Range<BlockNum>) -> Option<BlockNum> {
        let orphans = locked(&self.orphans);
        let first = orphans.range(blocks.start.0..blocks.end.0).next();
        first.copied().map(BlockNum)
    }
}

/// Takes those of `blocks` out of the set that `is_taken` wants, and tells how many.
fn take(
    set: &mut BTreeSet<u64>,
    blocks: &Range<BlockNum>,
    is_taken: impl Fn(BlockNum) -> bool,
) -> u64 {
    let inside = set.range(blocks.start.0..blocks.end.0).copied();
    let taken: Vec<u64> = inside.filter(|block| is_taken(BlockNum(*block))).collect();
    for block in &taken {
        set.remove(block);
    }
    taken.len() as u64
}

impl<S: Store> Overlay<S> {
    /// This overlay, with what it has taken and will take charged to `account`, if there is
    /// one.
    pub fn limited(mut self, account: Option<Arc<Account>>) -> Self {
        let Some(account) = account else {
            return self;
        };
        const { assert!(size_of::<Self>() + MAX_NAME <= OVERLAY_LEN as usize) };
        let usage = self.map.usage();
        let stored = self.block_size.bytes() * (usage.data + usage.unused);
        let is_changed = stored + usage.memory > 0;
        if is_changed {
            account.take_all_the_same(OVERLAY_LEN + stored + usage.memory);
        }
        self.map.limit(&account);
        self.limit = Some(Limit {
            account,
            block_size: self.block_size,
            is_charged: AtomicBool::new(is_changed),
            orphans: Mutex::default(),
        });
        self
    }

    /// Makes `blocks` *data*, as [`Overlay::make_data`] does.
    #[inline(never)]
    pub(super) fn make_data_within<How>(
        &self,
        limit: &Limit,
        held: &Held<'_, How>,
        blocks: &Range<BlockNum>,
        purpose: Purpose,
        put: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let share = purpose.share();
        // A change that is going to be refused should not take memory.
        let bytes = limit.bytes(blocks.end.0 - blocks.start.0);
        let first = limit.begin_change(|| bytes + self.map.memory_for(blocks), share)?;
        let budget = limit.account.budget();
        self.ask_for_room(limit, blocks, |bytes| budget.expect_fits(bytes, share))?;
        self.map.grow_for_data(blocks, share)?;
        self.reserve_for_data(held, blocks, purpose)?;
        if self.map.stored(blocks)? == blocks.end.0 - blocks.start.0 {
            put()?;
            return self.publish(blocks, BlockMap::set_data);
        }
        let charge = self.charge(limit, blocks, share)?;
        drop(first);
        let done = put().and_then(|()| self.publish_charged(limit, blocks, &charge));
        if done.is_err() {
            self.keep_orphans(limit, blocks, &charge)?;
        }
        done
    }

    /// Charges what is to become stored of `blocks`.
    fn charge<'a>(
        &self,
        limit: &'a Limit,
        blocks: &Range<BlockNum>,
        share: Share,
    ) -> Result<Charge<'a>> {
        self.ask_for_room(limit, blocks, |bytes| limit.account.charge(bytes, share))
    }

    /// Has `ask` ask for room for what is to become stored of `blocks`.
    fn ask_for_room<R>(
        &self,
        limit: &Limit,
        blocks: &Range<BlockNum>,
        ask: impl Fn(u64) -> Result<R>,
    ) -> Result<R> {
        let mut uncharged = limit.uncharged(&self.map, blocks)?;
        loop {
            let refused = match ask(limit.bytes(uncharged)) {
                Err(refused) => refused,
                granted => return granted,
            };
            // What has no room any more may be just these blocks, stored by another.
            let left = limit.uncharged(&self.map, blocks)?;
            if left == uncharged {
                return Err(refused);
            }
            uncharged = left;
        }
    }

    /// A change of `blocks` has failed, for which `charge` was made: what is not stored may
    /// have left bytes.
    fn keep_orphans(
        &self,
        limit: &Limit,
        blocks: &Range<BlockNum>,
        charge: &Charge<'_>,
    ) -> Result<()> {
        let mut orphans = locked(&limit.orphans);
        // First, so that who finds no room for what is settled has it given back.
        self.pending.insert(self.bytes_of(blocks));
        for block in (blocks.start.0..blocks.end.0).map(BlockNum) {
            let is_stored = self.map.stored(&(block..block.next()))? != 0;
            if !is_stored && orphans.insert(block.0) {
                charge.settle(limit.bytes(1));
            }
        }
        Ok(())
    }

    fn publish_charged(
        &self,
        limit: &Limit,
        blocks: &Range<BlockNum>,
        charge: &Charge<'_>,
    ) -> Result<()> {
        let mut orphans = locked(&limit.orphans);
        let stored = Cell::new(0);
        let published = self.publish(blocks, |map, part| map.set_data_counting(part, &stored));
        let is_stored = |block: BlockNum| {
            let stored = self.map.stored(&(block..block.next()));
            stored.is_ok_and(|stored| stored != 0)
        };
        let charged_before = take(&mut orphans, blocks, is_stored);
        charge.settle(limit.bytes(stored.get() - charged_before));
        published
    }

    /// Moves on when something that was charged is given back.
    pub(super) fn given_back(&self) -> u64 {
        let limit = self.limit.as_ref();
        limit.map_or(0, |limit| limit.account.budget().given_back())
    }

    /// The first of `blocks` that is known to take space in the store.
    pub(super) fn first_taken(&self, blocks: &Range<BlockNum>) -> Option<BlockNum> {
        let limit = self.limit.as_ref();
        let orphan = limit.and_then(|limit| limit.first_orphan(blocks));
        let stored = self.map.first_stored(blocks);
        stored.into_iter().chain(orphan).min()
    }

    /// Whether there is room for a copy of what the base has in `blocks`. Looked at before
    /// it is read, and again when it is stored.
    pub(super) fn has_room_for_copy(&self, blocks: &Range<BlockNum>) -> bool {
        let Some(limit) = &self.limit else {
            return true;
        };
        let bytes = limit.bytes(blocks.end.0 - blocks.start.0) + limit.uncharged_overlay();
        let budget = limit.account.budget();
        budget.has_room(bytes + self.map.memory_for(blocks), Share::Half)
    }
}
