//! The striped lock: who may change which part of the overlay at a time; and the order
//! of changes that are stored later than they came.
//!
//! The disk is cut into areas of 1 MiB (or of one block, where that is larger),
//! and area *n* belongs to stripe *n* mod 64. A block lies in one area, so one
//! stripe decides over it. Reads take no stripe at all; who takes one shared and
//! who exclusive is told where they are taken, in [`super`].
//!
//! # Lock order
//!
//! Whoever needs several stripes takes them in ascending order of their index, all in
//! one call of [`Stripes::shared`] or [`Stripes::exclusive`], and makes no second call
//! while holding what the first took. So no cycle of waiters can form. Nothing that can
//! block on another request (a call to the plugin above all) is done while one is held.
//! The list of deferred changes in a stripe is an inner lock: it is held for moments,
//! and nothing is taken under it.
//!
//! # The order of changes
//!
//! *Changes of the same bytes take effect in the order in which they came*: the order in
//! which they first held the stripe. Most changes are stored under that hold, and the
//! file system has them in that order. A change that is stored later (it has to read the
//! base first, or to wait for space, or goes by steps) would land over newer ones. So it
//! is *deferred*:
//!
//! 1. Under its first hold it is entered in the list of the stripe ([`Held::defer`]).
//! 2. Every change that was stored tells so to the older entries, under the hold under
//!    which it was stored ([`Held::supersede`]). All entries are older than a change that
//!    was not deferred; for one that was, those are older that stand before it.
//! 3. When the deferred change is stored, it leaves those bytes out ([`Held::newer`]).
//!
//! A change that holds the stripe at the time at which another enters itself may miss the
//! entry, and so may one that came and went during the hold in which the other was tried
//! first and found no space. The two came at the same time, and either order is right. A
//! change that takes the stripe after the other has let it go sees the entry.
//!
//! Only what was stored counts. A change that failed has told nobody, and the older one
//! is stored as a whole.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::PoisonError;

use super::ranges::Ranges;
use crate::block::{BlockNum, BlockSize, ByteRange};
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering, RwLock, locked};

const STRIPES: usize = if cfg!(loom) { 3 } else { 64 };
/// Bytes of the disk that one hold of one stripe is about at most.
/// (The model checker's disk has four such areas.)
pub const AREA: u64 = if cfg!(loom) { 1 << 14 } else { 1 << 20 };

/// On a cache line of its own, so that takers of neighbouring stripes don't slow each
/// other down.
#[repr(align(64))]
struct Stripe {
    lock: RwLock<()>,
    /// How many are in `deferred`: nearly always none, which a request can see without
    /// taking that lock.
    deferred_count: AtomicU64,
    /// In the order in which they came.
    deferred: Mutex<Vec<Deferred>>,
}

/// A deferred change, as a stripe knows it.
struct Deferred {
    ticket: u64,
    bytes: ByteRange,
    /// What newer changes have stored of these bytes.
    newer: Ranges,
}

/// See the module's documentation.
pub struct Stripes {
    stripes: [Stripe; STRIPES],
    area_shift: u32,
    next_ticket: AtomicU64,
}

/// The areas from the first to the last.
#[derive(Clone, Copy)]
struct Areas {
    first: u64,
    last: u64,
}

/// How stripes are held: together with others.
pub enum Shared {}
/// How stripes are held: alone.
pub enum Exclusive {}

/// The stripes of some areas are held, as long as this can be had. Who needs them held
/// takes this as a parameter.
pub struct Held<'a, How> {
    stripes: &'a Stripes,
    areas: Areas,
    how: PhantomData<How>,
}

/// A change's place in the order, until this is dropped.
pub struct Deferral<'a> {
    stripes: &'a Stripes,
    areas: Areas,
    ticket: u64,
}

impl Stripes {
    pub fn new(block_size: BlockSize) -> Self {
        Stripes {
            stripes: std::array::from_fn(|_| Stripe {
                lock: RwLock::new(()),
                deferred_count: AtomicU64::new(0),
                deferred: Mutex::new(Vec::new()),
            }),
            area_shift: (AREA / block_size.bytes()).max(1).trailing_zeros(),
            next_ticket: AtomicU64::new(0),
        }
    }

    /// Runs `work` with the stripes of `blocks` held together with others that hold
    /// them shared.
    #[inline]
    pub fn shared<'a, R>(
        &'a self,
        blocks: &Range<BlockNum>,
        work: impl FnOnce(&Held<'a, Shared>) -> R,
    ) -> R {
        // A poisoned stripe is as good as any: what it guards are words that
        // change in one atomic operation each, and a file.
        let take = |stripe: &'a Stripe| stripe.lock.read().unwrap_or_else(PoisonError::into_inner);
        self.hold(blocks, take, work)
    }

    /// Runs `work` with the stripes of `blocks` held alone.
    pub fn exclusive<'a, R>(
        &'a self,
        blocks: &Range<BlockNum>,
        work: impl FnOnce(&Held<'a, Exclusive>) -> R,
    ) -> R {
        let take = |stripe: &'a Stripe| stripe.lock.write().unwrap_or_else(PoisonError::into_inner);
        self.hold(blocks, take, work)
    }

    #[inline]
    fn hold<'a, Guard, How, R>(
        &'a self,
        blocks: &Range<BlockNum>,
        mut take: impl FnMut(&'a Stripe) -> Guard,
        work: impl FnOnce(&Held<'a, How>) -> R,
    ) -> R {
        let first = blocks.start.0 >> self.area_shift;
        let last = (blocks.end.0.max(blocks.start.0 + 1) - 1) >> self.area_shift;
        let held = Held {
            stripes: self,
            areas: Areas { first, last },
            how: PhantomData,
        };
        // Nearly every request lies within one area, and must not pay for the others.
        let (mut _one, mut _several) = (None, None);
        if first == last {
            _one = Some(take(self.stripe(first)));
        } else {
            _several = Some(self.hold_several(held.areas, take));
        }
        work(&held)
    }

    #[inline(never)]
    fn hold_several<'a, Guard>(
        &'a self,
        areas: Areas,
        take: impl FnMut(&'a Stripe) -> Guard,
    ) -> [Option<Guard>; STRIPES] {
        let mut guards = std::array::from_fn(|_| None);
        for (guard, taken) in guards.iter_mut().zip(self.of_areas(areas).map(take)) {
            *guard = Some(taken);
        }
        guards
    }

    /// The stripes of some areas, each once, in ascending order of their index.
    fn of_areas(&self, areas: Areas) -> impl Iterator<Item = &Stripe> {
        let Areas { first, last } = areas;
        let all = self.stripes.len();
        let (low, high) = if last - first >= STRIPES as u64 - 1 {
            (0..all, 0..0)
        } else if index(first) <= index(last) {
            (index(first)..index(last) + 1, 0..0)
        } else {
            // The range wraps around the end of the array; the stripes at the
            // array's start have the lower indices, so they come first.
            (0..index(last) + 1, index(first)..all)
        };
        self.stripes[low].iter().chain(&self.stripes[high])
    }

    fn stripe(&self, area: u64) -> &Stripe {
        &self.stripes[index(area)]
    }

    /// The end of the area that holds `block`: whoever can do with one stripe at
    /// a time cuts its range here.
    pub fn area_end(&self, block: BlockNum) -> BlockNum {
        BlockNum(((block.0 >> self.area_shift) + 1) << self.area_shift)
    }
}

impl Stripe {
    fn deferred(&self) -> MutexGuard<'_, Vec<Deferred>> {
        locked(&self.deferred)
    }
}

impl<'a, How> Held<'a, How> {
    /// Takes a place in the order for a change of `bytes`, which lie in the areas that
    /// are held, that is stored later.
    pub fn defer(&self, bytes: ByteRange) -> Deferral<'a> {
        // Only the entries of one change have one ticket: no order is needed.
        let ticket = self.stripes.next_ticket.fetch_add(1, Ordering::Relaxed);
        for stripe in self.stripes.of_areas(self.areas) {
            let mut deferred = stripe.deferred();
            deferred.push(Deferred {
                ticket,
                bytes,
                newer: Ranges::default(),
            });
            // Who takes the stripe after us sees this: the lock orders it.
            stripe
                .deferred_count
                .store(deferred.len() as u64, Ordering::Relaxed);
        }
        Deferral {
            stripes: self.stripes,
            areas: self.areas,
            ticket,
        }
    }

    /// Tells older deferred changes that `bytes` were stored, by the deferred change
    /// `by` or by one that was not deferred.
    #[inline]
    pub fn supersede(&self, bytes: ByteRange, by: Option<&Deferral<'_>>) {
        if self.areas.first == self.areas.last {
            self.stripes.stripe(self.areas.first).supersede(bytes, by);
        } else {
            for stripe in self.stripes.of_areas(self.areas) {
                stripe.supersede(bytes, by);
            }
        }
    }

    /// What newer changes have stored of `bytes` since `deferral` was made.
    pub fn newer(&self, deferral: &Deferral<'_>, bytes: ByteRange) -> Ranges {
        let mut newer = Ranges::default();
        for stripe in self.stripes.of_areas(self.areas) {
            let deferred = stripe.deferred();
            let of_ours = |entry: &&Deferred| entry.ticket == deferral.ticket;
            for entry in deferred.iter().filter(of_ours) {
                entry
                    .newer
                    .within(bytes)
                    .for_each(|part| newer.insert(part));
            }
        }
        newer
    }

    /// For assertions: whether all of `blocks` lie in areas that are held.
    pub fn covers(&self, blocks: &Range<BlockNum>) -> bool {
        let area = |block: u64| block >> self.stripes.area_shift;
        self.areas.first <= area(blocks.start.0) && area(blocks.end.0 - 1) <= self.areas.last
    }
}

impl Stripe {
    #[inline]
    fn supersede(&self, bytes: ByteRange, by: Option<&Deferral<'_>>) {
        if self.deferred_count.load(Ordering::Relaxed) != 0 {
            self.supersede_deferred(bytes, by);
        }
    }

    #[cold]
    fn supersede_deferred(&self, bytes: ByteRange, by: Option<&Deferral<'_>>) {
        let mut deferred = self.deferred();
        let is_older = |entry: &&mut Deferred| by.is_none_or(|by| entry.ticket != by.ticket);
        for entry in deferred.iter_mut().take_while(is_older) {
            entry.newer.insert(bytes.clamp_to(entry.bytes));
        }
    }
}

impl Drop for Deferral<'_> {
    fn drop(&mut self) {
        for stripe in self.stripes.of_areas(self.areas) {
            let mut deferred = stripe.deferred();
            deferred.retain(|entry| entry.ticket != self.ticket);
            stripe
                .deferred_count
                .store(deferred.len() as u64, Ordering::Relaxed);
        }
    }
}

fn index(area: u64) -> usize {
    (area % STRIPES as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stripes() -> Stripes {
        Stripes::new(BlockSize::new(4096).expect("a block size"))
    }

    /// Blocks of whole areas, at 256 blocks of 4K an area.
    fn areas(areas: Range<u64>) -> Range<BlockNum> {
        BlockNum(areas.start * 256)..BlockNum(areas.end * 256)
    }

    fn taken(stripes: &Stripes) -> Vec<usize> {
        (0..STRIPES)
            .filter(|i| stripes.stripes[*i].lock.try_write().is_err())
            .collect()
    }

    fn bytes(start: u64, end: u64) -> ByteRange {
        ByteRange { start, end }
    }

    #[test]
    fn a_range_takes_the_stripes_of_its_areas_and_no_others() {
        let stripes = stripes();
        for (range, expected) in [
            (areas(0..1), vec![0]),
            (areas(3..5), vec![3, 4]),
            (BlockNum(255)..BlockNum(257), vec![0, 1]),
            (areas(62..66), vec![0, 1, 62, 63]),
            (areas(64 * 7 + 1..64 * 7 + 3), vec![1, 2]),
            (areas(5..69), (0..64).collect()),
            (areas(0..1_000_000), (0..64).collect()),
        ] {
            stripes.exclusive(&range, |held| {
                assert_eq!(taken(&stripes), expected, "{range:?}");
                assert!(held.covers(&range));
            });
            assert_eq!(taken(&stripes), [0; 0]);
        }
    }

    #[test]
    fn stripes_are_taken_in_ascending_order() {
        let stripes = stripes();
        for range in [areas(60..70), areas(3..9), areas(0..200)] {
            let mut order = Vec::new();
            let take = |stripe: &Stripe| order.push(std::ptr::from_ref(stripe) as usize);
            stripes.hold(&range, take, |_: &Held<'_, Shared>| ());
            assert!(order.is_sorted(), "{range:?}");
            assert!(!order.is_empty(), "{range:?}");
        }
    }

    #[test]
    fn shared_takers_do_not_wait_for_each_other() {
        let stripes = stripes();
        stripes.shared(&areas(0..3), |_| {
            stripes.shared(&areas(2..5), |_| {
                assert!(stripes.stripes[2].lock.try_write().is_err());
            });
        });
    }

    #[test]
    fn a_block_larger_than_an_area_has_a_stripe_of_its_own() {
        let stripes = Stripes::new(BlockSize::new(1 << 31).expect("a block size"));
        stripes.shared(&(BlockNum(1)..BlockNum(2)), |_| {
            assert_eq!(taken(&stripes), [1]);
        });
        assert_eq!(stripes.area_end(BlockNum(1)), BlockNum(2));
    }

    #[test]
    fn a_deferred_change_hears_of_newer_ones_only() {
        let stripes = stripes();
        let block = areas(0..1);
        let newer = |deferral: &Deferral<'_>| {
            stripes.exclusive(&block, |held| {
                let newer = held.newer(deferral, bytes(0, 100));
                newer.within(bytes(0, 100)).collect::<Vec<_>>()
            })
        };
        let store = |range, by: Option<&Deferral<'_>>| {
            stripes.shared(&block, |held| held.supersede(range, by));
        };
        store(bytes(0, 100), None);
        let first = stripes.shared(&block, |held| held.defer(bytes(10, 50)));
        let second = stripes.shared(&block, |held| held.defer(bytes(20, 60)));
        assert_eq!(newer(&first), []);
        store(bytes(0, 15), None);
        store(bytes(20, 60), Some(&second));
        store(bytes(10, 50), Some(&first));
        assert_eq!(newer(&first), [bytes(10, 15), bytes(20, 50)]);
        assert_eq!(newer(&second), []);
        drop((first, second));
        assert_eq!(stripes.stripes[0].deferred_count.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_change_of_several_areas_is_known_in_each() {
        let stripes = stripes();
        let wide = stripes.shared(&areas(2..5), |held| held.defer(bytes(2 << 20, 5 << 20)));
        for (area, known) in [(1, false), (2, true), (3, true), (4, true), (5, false)] {
            let at = bytes(area << 20, (area << 20) + 10);
            stripes.shared(&areas(area..area + 1), |held| {
                held.supersede(at, None);
                assert_eq!(!held.newer(&wide, at).is_empty(), known, "area {area}");
            });
        }
    }
}
