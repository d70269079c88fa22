//! The block map: which state each block of the disk is in.
//!
//! # States
//!
//! | `stored` bit | `zero` bit | state | a read gets |
//! |---|---|---|---|
//! | 0 | 0 | [`State::Base`] | the bytes of the base |
//! | 1 | 0 | [`State::Data`] | the bytes of the overlay file |
//! | 0 | 1 | [`State::Zero`] | zeroes; nothing is stored |
//! | 1 | 1 | [`State::Zero`] | zeroes; the space was not given back yet |
//!
//! One 64-bit word holds 32 blocks, bits 0-31 `stored` and bits 32-63 `zero`. Without the
//! `stored` bits of *zero* blocks it is the subcluster bitmap of a qcow2 extended L2 entry
//! ([`BlockMap::word`]).
//!
//! # Invariants
//!
//! 1. Both bits of a block change in one atomic operation, so that nobody sees
//!    a state in between.
//! 2. A block never goes back to *base*.
//! 3. Whoever makes a block *data* has put all its bytes into the file before
//!    (the bits are stored with *release*, and read with *acquire*). The map can't
//!    check that: it is the duty of the overlay.
//! 4. Memory that a reader can reach stays until the map is dropped. That is
//!    what lets reads go without a lock and without reference counts: a slot of
//!    the tree goes from *nothing* to *zeroed* to *a node*, never back, and a
//!    node that was linked in is never unlinked.
//!
//! # Shape
//!
//! A radix tree: leaves of 64 words (2048 blocks; 8 MiB of disk at 4K blocks),
//! and as many levels of 512-slot nodes as the disk's size asks for. A part of
//! the disk that nobody wrote to has no leaf, and one that was zeroed as a whole
//! has the mark [`ZEROED`] in place of a leaf. So the memory taken follows what
//! was written, an untouched 7 EiB disk takes one node, and zeroing takes
//! neither a word per block nor time per block.

mod leaf;

use std::alloc::{self, Layout};
use std::array;
use std::ops::Range;
use std::ptr;

use crate::block::BlockNum;
use crate::error::{Error, Result};
use crate::sync::{AtomicPtr, Ordering};
use leaf::{ALL_ZERO, BLOCKS_PER_LEAF, BLOCKS_PER_WORD, Leaf, WORDS_PER_LEAF, shown};

/// Where the bytes of a block are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// In the base: nobody wrote to the block.
    Base,
    /// In the overlay file.
    Data,
    /// Nowhere: the block reads as zeroes.
    Zero,
}

const SLOTS_SHIFT: u32 = if cfg!(loom) { 1 } else { 9 };
const SLOTS: usize = 1 << SLOTS_SHIFT;

/// 8 EiB in the smallest blocks; no disk is larger. With five levels of nodes the
/// tree spans 2^56 blocks, so no shift of a block number overflows.
const MAX_BLOCKS: u64 = 1 << (63 - 9);

/// A slot points to another node, to a leaf on the lowest level, or nowhere.
struct Node([AtomicPtr<u8>; SLOTS]);

/// Stands in a slot for a leaf whose every block is *zero*. No allocation has
/// this address, because those are aligned.
const ZEROED: *mut u8 = ptr::without_provenance_mut(1);

/// What a slot of the lowest level holds.
enum Slot<'a> {
    /// Every block is *base*.
    Untouched,
    /// Every block is *zero*.
    Zeroed,
    Leaf(&'a Leaf),
}

/// See the module's documentation.
pub struct BlockMap {
    /// A slot like any other, on top of `levels` levels of nodes.
    root: AtomicPtr<u8>,
    levels: u32,
    blocks: u64,
}

impl BlockMap {
    /// A map of `blocks` blocks, all of them *base*; at most 2^54.
    pub fn new(blocks: BlockNum) -> Self {
        assert!(blocks.0 <= MAX_BLOCKS, "{blocks:?} is larger than any disk");
        let leaves = blocks.0.div_ceil(BLOCKS_PER_LEAF);
        let mut levels = 0;
        while leaves > 1 << (levels * SLOTS_SHIFT) {
            levels += 1;
        }
        BlockMap {
            root: AtomicPtr::new(ptr::null_mut()),
            levels,
            blocks: blocks.0,
        }
    }

    /// Whether every block is *base*.
    pub fn is_untouched(&self) -> bool {
        self.root.load(Ordering::Acquire).is_null()
    }

    /// The state of `block`. EINVAL if there is no such block.
    pub fn state(&self, block: BlockNum) -> Result<State> {
        self.check(&(block..block.next()))?;
        Ok(self.run_in_slot(block.0, block.0 + 1).0)
    }

    /// The longest run of blocks that starts at the first of `blocks`, ends no
    /// later than it does, and is in one state: that state, and the run's end.
    /// EINVAL if `blocks` is empty or reaches past the last block.
    ///
    /// Each word is looked at once, at some time during the call: blocks that
    /// others change meanwhile may be seen before or after the change.
    pub fn run(&self, blocks: &Range<BlockNum>) -> Result<(State, BlockNum)> {
        self.check(blocks)?;
        let (state, mut at) = self.run_in_slot(blocks.start.0, blocks.end.0);
        // A run that fills its slot may go on in the next.
        while at < blocks.end.0 && self.starts_slot(at) {
            let (next_state, end) = self.run_in_slot(at, blocks.end.0);
            if next_state != state {
                break;
            }
            at = end;
        }
        Ok((state, BlockNum(at)))
    }

    /// The state of block `at`, and the end of the run that starts there, at most
    /// `end` and within what one slot is in charge of.
    fn run_in_slot(&self, at: u64, end: u64) -> (State, u64) {
        let (slot, slot_end) = self.lookup(at);
        let end = end.min(slot_end);
        match slot {
            Slot::Untouched => (State::Base, end),
            Slot::Zeroed => (State::Zero, end),
            Slot::Leaf(leaf) => leaf.run(at, end),
        }
    }

    /// Whether a leaf, or a part of the tree that has none, may begin at block `at`.
    fn starts_slot(&self, at: u64) -> bool {
        at % BLOCKS_PER_LEAF == 0
    }

    /// The runs of `blocks`, one after the other: see [`BlockMap::run`].
    pub fn runs(
        &self,
        blocks: Range<BlockNum>,
    ) -> impl Iterator<Item = Result<(State, Range<BlockNum>)>> + '_ {
        let mut rest = blocks;
        std::iter::from_fn(move || {
            if rest.start >= rest.end {
                return None;
            }
            Some(self.run(&rest).map(|(state, end)| {
                let run = rest.start..end;
                rest.start = end;
                (state, run)
            }))
        })
    }

    /// Makes `blocks` *data*, and tells whether that changed anything. Their bytes
    /// are in the file: invariant 3.
    /// ENOMEM if the map can't grow; some of the blocks may be *data* by then.
    pub fn set_data(&self, blocks: &Range<BlockNum>) -> Result<bool> {
        self.change(blocks, None, |word, mask| {
            (word | mask) & !(mask << BLOCKS_PER_WORD)
        })
    }

    /// Makes `blocks` *zero*, whatever they were: those of them that were *data* are still
    /// stored, until [`BlockMap::set_given_back`]. The rest as for [`BlockMap::set_data`].
    pub fn set_zero(&self, blocks: &Range<BlockNum>) -> Result<bool> {
        self.change(blocks, Some(ZEROED), |word, mask| {
            word | (mask << BLOCKS_PER_WORD)
        })
    }

    /// Makes those of `blocks` that are *base* into *zero*. The rest as for
    /// [`BlockMap::set_data`].
    pub fn set_zero_unless_data(&self, blocks: &Range<BlockNum>) -> Result<bool> {
        self.change(blocks, Some(ZEROED), |word, mask| {
            word | ((mask & !word) << BLOCKS_PER_WORD)
        })
    }

    /// Those of `blocks` that are *zero* are not stored any more. Returns how many were.
    pub fn set_given_back(&self, blocks: &Range<BlockNum>) -> Result<u64> {
        let mut given_back = 0;
        self.for_each_leaf(blocks, |leaf, at, end| {
            leaf.update(
                at,
                end,
                |word, mask| word & !(mask & (word >> BLOCKS_PER_WORD)),
                |old, new| given_back += u64::from((old ^ new).count_ones()),
            );
        })?;
        Ok(given_back)
    }

    /// How many of `blocks` are stored, be they *data* or *zero*.
    pub fn stored(&self, blocks: &Range<BlockNum>) -> Result<u64> {
        let mut stored = 0;
        self.for_each_leaf(blocks, |leaf, at, end| stored += leaf.usage(at, end).0)?;
        Ok(stored)
    }

    /// The word that has the states of 32 blocks from `32 * index` on. Blocks that
    /// the disk does not have may be in any state.
    pub fn word(&self, index: u64) -> u64 {
        let block = index * BLOCKS_PER_WORD;
        match self.lookup(block).0 {
            Slot::Untouched => 0,
            Slot::Zeroed => ALL_ZERO,
            Slot::Leaf(leaf) => shown(leaf.word(block).load(Ordering::Acquire)),
        }
    }

    /// Fills a map to which nothing was written yet: `words` are those from number
    /// `first` on, which begins a leaf. ENOMEM if the map can't grow.
    pub fn load(&self, first: u64, words: &[u64]) -> Result<()> {
        debug_assert_eq!(first % WORDS_PER_LEAF, 0);
        let leaves = words.chunks(WORDS_PER_LEAF as usize);
        for (first, words) in (first..).step_by(WORDS_PER_LEAF as usize).zip(leaves) {
            if words.iter().all(|word| *word == 0) {
                continue;
            }
            let first = first * BLOCKS_PER_WORD;
            let slot = self.leaf_slot(first)?;
            let is_zeroed =
                words.len() as u64 == WORDS_PER_LEAF && words.iter().all(|word| *word == ALL_ZERO);
            if is_zeroed && mark_slot(slot, ZEROED).is_some() {
                continue;
            }
            let leaf = leaf_of(slot)?;
            for (place, word) in leaf.0.iter().zip(words) {
                place.store(*word, Ordering::Release);
            }
        }
        Ok(())
    }

    fn check(&self, blocks: &Range<BlockNum>) -> Result<()> {
        if blocks.start < blocks.end && blocks.end.0 <= self.blocks {
            return Ok(());
        }
        Err(Error::new(
            libc::EINVAL,
            format!(
                "blocks {} to {} are not within the {} blocks of the disk",
                blocks.start.0, blocks.end.0, self.blocks
            ),
        ))
    }

    /// The slot that is in charge of `block`, and the first block after those
    /// that the slot is in charge of (a missing node is in charge of much).
    fn lookup(&self, block: u64) -> (Slot<'_>, u64) {
        let mut slot = &self.root;
        let mut shift = self.levels * SLOTS_SHIFT;
        loop {
            let target = slot.load(Ordering::Acquire);
            if target.is_null() || shift == 0 {
                // At most 2^56: see MAX_BLOCKS.
                let shift = shift + BLOCKS_PER_LEAF.trailing_zeros();
                let end = ((block >> shift) + 1) << shift;
                let found = if target.is_null() {
                    Slot::Untouched
                } else if target == ZEROED {
                    Slot::Zeroed
                } else {
                    // SAFETY: on the lowest level a slot that is neither null nor
                    // ZEROED points to a leaf that `grow` made; it lives as long
                    // as the map (invariant 4), which `self` borrows.
                    Slot::Leaf(unsafe { &*target.cast::<Leaf>() })
                };
                return (found, end);
            }
            shift -= SLOTS_SHIFT;
            // SAFETY: above the lowest level a slot that is not null points to a
            // node that `grow` made; it lives as long as the map (invariant 4).
            let node = unsafe { &*target.cast::<Node>() };
            slot = &node.0[slot_index(block, shift)];
        }
    }

    /// Applies `f` to every word that has blocks of `blocks`, as [`Leaf::update`] does, and
    /// tells whether anything changed. A leaf that lies in `blocks` as a whole and does not
    /// exist yet becomes `whole_leaf` instead, where that is given.
    fn change(
        &self,
        blocks: &Range<BlockNum>,
        whole_leaf: Option<*mut u8>,
        f: impl Fn(u64, u64) -> u64,
    ) -> Result<bool> {
        self.check(blocks)?;
        let mut changed = false;
        let (mut at, end) = (blocks.start.0, blocks.end.0);
        // Most requests are a block or a few.
        if at / BLOCKS_PER_WORD == (end - 1) / BLOCKS_PER_WORD {
            let leaf = leaf_of(self.leaf_slot(at)?)?;
            leaf.update_word(at, end - at, &f, |_, _| changed = true);
            return Ok(changed);
        }
        while at < end {
            let slot = self.leaf_slot(at)?;
            let leaf_end = (at / BLOCKS_PER_LEAF + 1) * BLOCKS_PER_LEAF;
            let limit = end.min(leaf_end);
            let is_whole = at % BLOCKS_PER_LEAF == 0 && (limit == leaf_end || limit == self.blocks);
            let marked = match whole_leaf {
                Some(mark) if is_whole => mark_slot(slot, mark),
                _ => None,
            };
            match marked {
                Some(marked) => changed |= marked,
                None => leaf_of(slot)?.update(at, limit, &f, |_, _| changed = true),
            }
            at = limit;
        }
        Ok(changed)
    }

    /// Calls `f` with each leaf that has blocks of `blocks`, and which: from the one to
    /// before the other.
    fn for_each_leaf(
        &self,
        blocks: &Range<BlockNum>,
        mut f: impl FnMut(&Leaf, u64, u64),
    ) -> Result<()> {
        self.check(blocks)?;
        let mut at = blocks.start.0;
        while at < blocks.end.0 {
            let (slot, slot_end) = self.lookup(at);
            let end = blocks.end.0.min(slot_end);
            if let Slot::Leaf(leaf) = slot {
                f(leaf, at, end);
            }
            at = end;
        }
        Ok(())
    }

    /// The slot of the lowest level for `block`; nodes on the way there are made.
    fn leaf_slot(&self, block: u64) -> Result<&AtomicPtr<u8>> {
        let mut slot = &self.root;
        let mut shift = self.levels * SLOTS_SHIFT;
        while shift > 0 {
            let mut target = slot.load(Ordering::Acquire);
            if target.is_null() {
                target = grow(slot, target, Node::new)?;
            }
            shift -= SLOTS_SHIFT;
            // SAFETY: as in `lookup`.
            let node = unsafe { &*target.cast::<Node>() };
            slot = &node.0[slot_index(block, shift)];
        }
        Ok(slot)
    }
}

fn slot_index(block: u64, shift: u32) -> usize {
    ((block / BLOCKS_PER_LEAF) >> shift) as usize % SLOTS
}

/// Puts `mark` into a slot that has no leaf, and tells whether that changed it;
/// `None` if it has one.
fn mark_slot(slot: &AtomicPtr<u8>, mark: *mut u8) -> Option<bool> {
    match slot.compare_exchange(ptr::null_mut(), mark, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => Some(true),
        Err(present) => (present == mark).then_some(false),
    }
}

/// The leaf in `slot`, made if there is none yet: of *zero* blocks in place of
/// the mark [`ZEROED`], else of *base* blocks.
fn leaf_of(slot: &AtomicPtr<u8>) -> Result<&Leaf> {
    let mut target = slot.load(Ordering::Acquire);
    while target.is_null() || target == ZEROED {
        target = grow_leaf(slot, target)?;
    }
    // SAFETY: as in `lookup`.
    Ok(unsafe { &*target.cast::<Leaf>() })
}

#[cold]
fn grow_leaf(slot: &AtomicPtr<u8>, old: *mut u8) -> Result<*mut u8> {
    let word = if old.is_null() { 0 } else { ALL_ZERO };
    grow(slot, old, || Leaf::new(word))
}

/// Puts what `make` makes into `slot` in place of `old`. Returns what the slot
/// holds then: if somebody else was faster, that is theirs.
fn grow<T>(slot: &AtomicPtr<u8>, old: *mut u8, make: impl FnOnce() -> T) -> Result<*mut u8> {
    // Not `Box::new`, which ends the process where there is no memory.
    // SAFETY: neither a leaf nor a node has size zero.
    let new = unsafe { alloc::alloc(Layout::new::<T>()) }.cast::<T>();
    if new.is_null() {
        return Err(Error::no_memory("no memory for the block map"));
    }
    // SAFETY: allocated with the layout of `T`, and nobody else has seen it.
    unsafe { new.write(make()) };
    match slot.compare_exchange(old, new.cast(), Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => Ok(new.cast()),
        Err(present) => {
            // SAFETY: allocated and written above, and never shared.
            drop(unsafe { Box::from_raw(new) });
            Ok(present)
        }
    }
}

impl Node {
    fn new() -> Self {
        Node(array::from_fn(|_| AtomicPtr::new(ptr::null_mut())))
    }
}

impl Drop for BlockMap {
    fn drop(&mut self) {
        free(self.root.load(Ordering::Acquire), self.levels);
    }
}

/// Frees what a slot points to, `levels` levels of nodes and the leaves below.
fn free(target: *mut u8, levels: u32) {
    if target.is_null() || target == ZEROED {
        return;
    }
    if levels == 0 {
        // SAFETY: a leaf that `grow` made; the map is being dropped, so nobody
        // else can reach it.
        drop(unsafe { Box::from_raw(target.cast::<Leaf>()) });
        return;
    }
    // SAFETY: as for the leaf, a node.
    let node = unsafe { Box::from_raw(target.cast::<Node>()) };
    for slot in &node.0 {
        free(slot.load(Ordering::Acquire), levels - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::{Duration, Instant};

    fn range(blocks: Range<u64>) -> Range<BlockNum> {
        BlockNum(blocks.start)..BlockNum(blocks.end)
    }

    fn map(blocks: u64) -> BlockMap {
        BlockMap::new(BlockNum(blocks))
    }

    fn runs(map: &BlockMap, blocks: Range<u64>) -> Vec<(State, Range<u64>)> {
        map.runs(range(blocks))
            .map(|run| run.expect("in range"))
            .map(|(state, blocks)| (state, blocks.start.0..blocks.end.0))
            .collect()
    }

    #[test]
    fn out_of_range_is_an_error() {
        let map = map(100);
        for (start, end) in [
            (0, 101),
            (100, 101),
            (5, 5),
            (7, 6),
            (u64::MAX - 1, u64::MAX),
        ] {
            let bad = BlockNum(start)..BlockNum(end);
            for result in [
                map.run(&bad).map(|_| ()),
                map.set_data(&bad).map(drop),
                map.set_zero(&bad).map(drop),
                map.set_zero_unless_data(&bad).map(drop),
            ] {
                assert_eq!(result.expect_err("out of range").errno(), libc::EINVAL);
            }
        }
        assert!(map.state(BlockNum(99)).is_ok());
        assert!(map.state(BlockNum(100)).is_err());
        assert!(BlockMap::new(BlockNum(0)).state(BlockNum(0)).is_err());
    }

    #[test]
    fn an_untouched_disk_of_any_size_is_one_run() {
        for blocks in [1, 31, 2048, 2049, 1 << 28, 1 << 54, (1 << 54) - 1] {
            let map = map(blocks);
            assert_eq!(runs(&map, 0..blocks), [(State::Base, 0..blocks)]);
        }
    }

    #[test]
    fn the_far_end_of_the_largest_disk_can_be_written() {
        let last = (1 << 54) - 1;
        let map = map(1 << 54);
        map.set_data(&range(last..last + 1)).expect("in range");
        assert_eq!(
            runs(&map, 0..1 << 54),
            [(State::Base, 0..last), (State::Data, last..last + 1)]
        );
    }

    #[test]
    fn zeroing_makes_no_leaf_and_data_in_it_makes_one() {
        let map = map(10 * BLOCKS_PER_LEAF + 7);
        let all = 0..10 * BLOCKS_PER_LEAF + 7;
        map.set_zero(&range(all.clone())).expect("in range");
        assert!(matches!(map.lookup(0).0, Slot::Zeroed));
        assert!(matches!(map.lookup(all.end - 1).0, Slot::Zeroed));
        assert_eq!(runs(&map, all.clone()), [(State::Zero, all.clone())]);
        map.set_data(&range(5000..5001)).expect("in range");
        assert_eq!(
            runs(&map, all.clone()),
            [
                (State::Zero, 0..5000),
                (State::Data, 5000..5001),
                (State::Zero, 5001..all.end)
            ]
        );
        map.set_zero_unless_data(&range(0..all.end))
            .expect("in range");
        assert_eq!(map.state(BlockNum(5000)).expect("in range"), State::Data);
        map.set_zero(&range(0..all.end)).expect("in range");
        assert_eq!(runs(&map, all.clone()), [(State::Zero, all)]);
    }

    #[test]
    fn threads_that_set_neighbouring_blocks_lose_none() {
        let map = map(4 * BLOCKS_PER_LEAF);
        let threads = 4;
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let map = &map;
                scope.spawn(move || {
                    for block in (thread..4 * BLOCKS_PER_LEAF).step_by(threads as usize) {
                        let block = range(block..block + 1);
                        match thread % 2 {
                            0 => map.set_data(&block),
                            _ => map.set_zero(&block),
                        }
                        .expect("in range");
                    }
                });
            }
        });
        for block in 0..4 * BLOCKS_PER_LEAF {
            let expected = [State::Data, State::Zero][block as usize % 2];
            assert_eq!(map.state(BlockNum(block)).expect("in range"), expected);
        }
    }

    /// The threads have each some blocks of one word, and time to meet in it on one core
    /// as well.
    #[test]
    fn threads_that_change_one_word_again_and_again_lose_nothing() {
        const THREADS: u64 = 4;
        const TIME: Duration = Duration::from_millis(500);
        let map = map(BLOCKS_PER_WORD);
        let start = Instant::now();
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let map = &map;
                let blocks = move || {
                    (thread..BLOCKS_PER_WORD)
                        .step_by(THREADS as usize)
                        .map(BlockNum)
                };
                scope.spawn(move || {
                    let states = [State::Data, State::Zero].into_iter().cycle();
                    for state in states.take_while(|_| start.elapsed() < TIME) {
                        for block in blocks() {
                            let block = block..block.next();
                            match state {
                                State::Data => map.set_data(&block),
                                _ => map.set_zero(&block),
                            }
                            .expect("in range");
                        }
                        // Not after each: what was lost by then, the thread itself might
                        // not see yet.
                        for block in blocks() {
                            assert_eq!(map.state(block).expect("in range"), state);
                        }
                    }
                });
            }
        });
    }

    proptest! {
        #[test]
        fn a_map_equals_a_plain_vector_of_states(
            blocks in 1u64..9000,
            operations in prop::collection::vec((0..4, any::<u64>(), any::<u64>()), 0..40),
            asked in (any::<u64>(), any::<u64>()),
        ) {
            let map = map(blocks);
            let within = |(a, b): (u64, u64)| {
                let (a, b) = (a % blocks, b % blocks);
                a.min(b)..a.max(b) + 1
            };
            let indices = |blocks: &Range<u64>| blocks.start as usize..blocks.end as usize;
            let mut model = vec![State::Base; blocks as usize];
            let mut stored = vec![false; blocks as usize];
            for (operation, a, b) in operations {
                let touched = within((a, b));
                let states = &mut model[indices(&touched)];
                let stored = &mut stored[indices(&touched)];
                match operation {
                    0 => {
                        map.set_data(&range(touched)).expect("in range");
                        states.fill(State::Data);
                        stored.fill(true);
                    }
                    1 => {
                        map.set_zero(&range(touched)).expect("in range");
                        states.fill(State::Zero);
                    }
                    2 => {
                        map.set_zero_unless_data(&range(touched)).expect("in range");
                        for state in states.iter_mut().filter(|state| **state == State::Base) {
                            *state = State::Zero;
                        }
                    }
                    _ => {
                        let mut given_back = 0;
                        for (state, stored) in states.iter().zip(stored) {
                            if *state == State::Zero && *stored {
                                *stored = false;
                                given_back += 1;
                            }
                        }
                        prop_assert_eq!(map.set_given_back(&range(touched)).expect("in range"), given_back);
                    }
                }
            }
            let asked = within(asked);
            let expected = stored[indices(&asked)].iter().filter(|stored| **stored).count();
            prop_assert_eq!(map.stored(&range(asked)).expect("in range"), expected as u64);
            for index in 0..blocks.div_ceil(BLOCKS_PER_WORD) {
                let word = map.word(index);
                for (bit, state) in (0..BLOCKS_PER_WORD).zip(&model[(index * BLOCKS_PER_WORD) as usize..]) {
                    let bits = (word >> bit) & (1 | 1 << BLOCKS_PER_WORD);
                    let expected = match state {
                        State::Base => 0,
                        State::Data => 1,
                        State::Zero => 1 << BLOCKS_PER_WORD,
                    };
                    prop_assert_eq!(bits, expected);
                }
            }
            let mut at = 0;
            for (state, run) in runs(&map, 0..blocks) {
                prop_assert_eq!(run.start, at);
                prop_assert!(run.end > at);
                prop_assert!(model[at as usize..run.end as usize].iter().all(|s| *s == state));
                if run.end < blocks {
                    prop_assert_ne!(model[run.end as usize], state, "a run ended too soon");
                }
                at = run.end;
            }
            prop_assert_eq!(at, blocks);
        }
    }
}
