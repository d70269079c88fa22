//! The striped lock: who may write to which part of the overlay at a time.
//!
//! The disk is cut into areas of 1 MiB (or of one block, where that is larger),
//! and area *n* belongs to stripe *n* mod 64. A block lies in one area, so one
//! stripe decides over it. Reads take no stripe at all; who takes one shared and
//! who exclusive is told where they are taken, in [`super`].
//!
//! # Lock order
//!
//! Stripes are the only locks of an overlay. Whoever needs several takes them in
//! ascending order of their index, all in one call of [`Stripes::shared`] or
//! [`Stripes::exclusive`], and makes no second call while holding what the first
//! returned. So no cycle of waiters can form. Nothing that can block on another
//! request (a call to the plugin above all) is done while one is held.

use std::ops::Range;
use std::sync::PoisonError;

use crate::block::{BlockNum, BlockSize};
use crate::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

const STRIPES: usize = if cfg!(loom) { 3 } else { 64 };
/// (The model checker's disk has four.)
const AREA: u64 = if cfg!(loom) { 1 << 14 } else { 1 << 20 };

/// A lock on a cache line of its own, so that takers of neighbouring stripes
/// don't slow each other down.
#[repr(align(64))]
struct Stripe(RwLock<()>);

/// See the module's documentation.
pub struct Stripes {
    stripes: [Stripe; STRIPES],
    area_shift: u32,
}

/// Held stripes; they are released when this is dropped.
#[must_use]
pub enum Held<G> {
    /// Nearly every request lies within one area, and must not pay for the others.
    One {
        _guard: G,
    },
    Several {
        _guards: Vec<G>,
    },
}

impl Stripes {
    pub fn new(block_size: BlockSize) -> Self {
        Stripes {
            stripes: std::array::from_fn(|_| Stripe(RwLock::new(()))),
            area_shift: (AREA / block_size.bytes()).max(1).trailing_zeros(),
        }
    }

    /// Takes the stripes of `blocks` together with others that take them shared.
    #[inline]
    pub fn shared(&self, blocks: &Range<BlockNum>) -> Held<RwLockReadGuard<'_, ()>> {
        // A poisoned stripe is as good as any: what it guards are words that
        // change in one atomic operation each, and a file.
        self.hold(blocks, |stripe| {
            stripe.0.read().unwrap_or_else(PoisonError::into_inner)
        })
    }

    /// Takes the stripes of `blocks` alone.
    pub fn exclusive(&self, blocks: &Range<BlockNum>) -> Held<RwLockWriteGuard<'_, ()>> {
        self.hold(blocks, |stripe| {
            stripe.0.write().unwrap_or_else(PoisonError::into_inner)
        })
    }

    #[inline]
    fn hold<'a, G>(
        &'a self,
        blocks: &Range<BlockNum>,
        mut take: impl FnMut(&'a Stripe) -> G,
    ) -> Held<G> {
        let first = blocks.start.0 >> self.area_shift;
        let last = (blocks.end.0.max(blocks.start.0 + 1) - 1) >> self.area_shift;
        if first == last {
            return Held::One {
                _guard: take(&self.stripes[index(first)]),
            };
        }
        Held::Several {
            _guards: self.hold_several(first, last, take),
        }
    }

    /// The stripes of the areas from `first` to `last`.
    #[inline(never)]
    fn hold_several<'a, G>(
        &'a self,
        first: u64,
        last: u64,
        mut take: impl FnMut(&'a Stripe) -> G,
    ) -> Vec<G> {
        let mut guards = Vec::with_capacity(STRIPES);
        if last - first >= STRIPES as u64 - 1 {
            guards.extend(self.stripes.iter().map(take));
        } else {
            let (first, last) = (index(first), index(last));
            if first <= last {
                guards.extend(self.stripes[first..=last].iter().map(take));
            } else {
                // The range wraps around the end of the array; the stripes at the
                // array's start have the lower indices, so they come first.
                guards.extend(self.stripes[..=last].iter().map(&mut take));
                guards.extend(self.stripes[first..].iter().map(take));
            }
        }
        guards
    }

    /// The end of the area that holds `block`: whoever can do with one stripe at
    /// a time cuts its range here.
    pub fn area_end(&self, block: BlockNum) -> BlockNum {
        BlockNum(((block.0 >> self.area_shift) + 1) << self.area_shift)
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
            .filter(|i| stripes.stripes[*i].0.try_write().is_err())
            .collect()
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
            let held = stripes.exclusive(&range);
            assert_eq!(taken(&stripes), expected, "{range:?}");
            drop(held);
            assert_eq!(taken(&stripes), []);
        }
    }

    #[test]
    fn stripes_are_taken_in_ascending_order() {
        let stripes = stripes();
        for range in [areas(60..70), areas(3..9), areas(0..200)] {
            let mut order = Vec::new();
            let _held = stripes.hold(&range, |stripe| {
                order.push(std::ptr::from_ref(stripe) as usize);
            });
            assert!(order.is_sorted(), "{range:?}");
        }
    }

    #[test]
    fn shared_takers_do_not_wait_for_each_other() {
        let stripes = stripes();
        let _one = stripes.shared(&areas(0..3));
        let _other = stripes.shared(&areas(2..5));
        assert!(stripes.stripes[2].0.try_write().is_err());
    }

    #[test]
    fn a_block_larger_than_an_area_has_a_stripe_of_its_own() {
        let stripes = Stripes::new(BlockSize::new(1 << 31).expect("a block size"));
        let _held = stripes.shared(&(BlockNum(1)..BlockNum(2)));
        assert_eq!(taken(&stripes), [1]);
        assert_eq!(stripes.area_end(BlockNum(1)), BlockNum(2));
    }
}
