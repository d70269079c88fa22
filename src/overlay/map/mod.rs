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
//! 4. Memory that a reader can reach stays until the map is dropped, and serves for
//!    nothing but the map. That is what lets reads go without a lock and without
//!    reference counts: see `tree`.
//!
//! # Shape
//!
//! A radix tree: leaves of 64 words (2048 blocks; 8 MiB of disk at 4K blocks),
//! and as many levels of 512-slot nodes as the disk's size asks for. A part of
//! the disk that nobody wrote to has no leaf. One that was zeroed as a whole
//! has a mark in the place of what would be in charge of it, on the highest level on which
//! nothing else is. A leaf or a node in which all has become zeroes, and nothing is stored,
//! gives way to such a mark ([`BlockMap::prune`]). So the memory taken follows what
//! is stored, an untouched or zeroed 7 EiB disk takes nothing, and zeroing takes
//! neither a word per block nor time per block.

mod leaf;
mod tree;

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use super::budget::{Account, Share};
use crate::block::BlockNum;
use crate::error::{Error, Result};
use crate::sync::Ordering;
use leaf::{ALL_ZERO, BLOCKS_PER_LEAF, BLOCKS_PER_WORD, Leaf, WORDS_PER_LEAF, shown};
use tree::{Found, Tree};

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

/// 8 EiB in the smallest blocks; no disk is larger. With five levels of nodes the
/// tree spans 2^56 blocks, so no shift of a block number overflows.
const MAX_BLOCKS: u64 = 1 << (63 - 9);

/// See the module's documentation.
pub struct BlockMap {
    tree: Tree,
    blocks: u64,
}

/// What a map has in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// How many blocks are *data*.
    pub data: u64,
    /// How many blocks are *zero* and stored: their space is to be given back.
    pub unused: u64,
    /// How many bytes of memory the map takes.
    pub memory: u64,
}

impl BlockMap {
    /// A map of `blocks` blocks, all of them *base*; at most 2^54.
    pub fn new(blocks: BlockNum) -> Self {
        assert!(blocks.0 <= MAX_BLOCKS, "{blocks:?} is larger than any disk");
        BlockMap {
            tree: Tree::new(blocks.0),
            blocks: blocks.0,
        }
    }

    /// Whether every block is *base*.
    pub fn is_untouched(&self) -> bool {
        self.tree.is_untouched()
    }

    /// The state of `block`. EINVAL if there is no such block.
    pub fn state(&self, block: BlockNum) -> Result<State> {
        self.check(&(block..block.next()))?;
        Ok(self.state_of(block.0))
    }

    #[inline(always)]
    fn state_of(&self, block: u64) -> State {
        self.tree.look(|tree| match tree.lookup(block).0 {
            Found::Untouched => State::Base,
            Found::Zeroed => State::Zero,
            Found::Leaf(leaf) => leaf.state(block),
        })
    }

    /// The longest run of blocks that starts at the first of `blocks`, ends no
    /// later than it does, and is in one state: that state, and the run's end.
    /// EINVAL if `blocks` is empty or reaches past the last block.
    ///
    /// Each word is looked at once, at some time during the call: blocks that
    /// others change meanwhile may be seen before or after the change.
    #[inline(always)]
    pub fn run(&self, blocks: &Range<BlockNum>) -> Result<(State, BlockNum)> {
        self.check(blocks)?;
        // Most requests are about one block.
        if blocks.start.next() == blocks.end {
            return Ok((self.state_of(blocks.start.0), blocks.end));
        }
        Ok(self.run_of_many(blocks))
    }

    #[inline(never)]
    fn run_of_many(&self, blocks: &Range<BlockNum>) -> (State, BlockNum) {
        let (state, mut at) = self.run_in_slot(blocks.start.0, blocks.end.0);
        // A run that fills its slot may go on in the next.
        while at < blocks.end.0 && self.starts_slot(at) {
            let (next_state, end) = self.run_in_slot(at, blocks.end.0);
            if next_state != state {
                break;
            }
            at = end;
        }
        (state, BlockNum(at))
    }

    /// The state of block `at`, and the end of the run that starts there, at most
    /// `end` and within what one slot of the tree is in charge of.
    fn run_in_slot(&self, at: u64, end: u64) -> (State, u64) {
        self.tree.look(|tree| {
            let (found, slot_end) = tree.lookup(at);
            let end = end.min(slot_end);
            match found {
                Found::Untouched => (State::Base, end),
                Found::Zeroed => (State::Zero, end),
                Found::Leaf(leaf) => leaf.run(at, end),
            }
        })
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
    /// are in the file: invariant 3. Who changes blocks holds their stripes.
    /// ENOMEM if the map can't grow; some of the blocks may be *data* by then.
    pub fn set_data(&self, blocks: &Range<BlockNum>) -> Result<bool> {
        let mut changed = false;
        self.make_data(blocks, |_, _| changed = true)?;
        Ok(changed)
    }

    /// The same, and adds to `stored` how many of them were not stored before.
    pub fn set_data_counting(&self, blocks: &Range<BlockNum>, stored: &Cell<u64>) -> Result<bool> {
        let mut changed = false;
        self.make_data(blocks, |old, new| {
            changed = true;
            let newly = (new & !old) as u32;
            stored.set(stored.get() + u64::from(newly.count_ones()));
        })?;
        Ok(changed)
    }

    /// `seen` is that of [`Leaf::update`].
    #[inline(always)]
    fn make_data(&self, blocks: &Range<BlockNum>, mut seen: impl FnMut(u64, u64)) -> Result<()> {
        self.check(blocks)?;
        let f = |word: u64, mask: u64| (word | mask) & !(mask << BLOCKS_PER_WORD);
        let (mut at, end) = (blocks.start.0, blocks.end.0);
        // Most requests are a block or a few.
        if at / BLOCKS_PER_WORD == (end - 1) / BLOCKS_PER_WORD {
            let leaf = self.tree.leaf(at, Share::All)?;
            leaf.update_word(at, end - at, f, seen);
            return Ok(());
        }
        while at < end {
            let limit = end.min((at / BLOCKS_PER_LEAF + 1) * BLOCKS_PER_LEAF);
            let leaf = self.tree.leaf(at, Share::All)?;
            leaf.update(at, limit, f, &mut seen);
            at = limit;
        }
        Ok(())
    }

    /// Makes `blocks` *zero*, whatever they were: those of them that were *data* are still
    /// stored, until [`BlockMap::set_given_back`]. The rest as for [`BlockMap::set_data`].
    pub fn set_zero(&self, blocks: &Range<BlockNum>) -> Result<bool> {
        self.zero(blocks, |word, mask| word | (mask << BLOCKS_PER_WORD))
    }

    /// Makes those of `blocks` that are *base* into *zero*. The rest as for
    /// [`BlockMap::set_data`].
    pub fn set_zero_unless_data(&self, blocks: &Range<BlockNum>) -> Result<bool> {
        self.zero(blocks, |word, mask| {
            word | ((mask & !word) << BLOCKS_PER_WORD)
        })
    }

    /// Makes `blocks` zeroes: by `f` where there are words, as [`Leaf::update`] has it.
    fn zero(&self, blocks: &Range<BlockNum>, f: impl Fn(u64, u64) -> u64) -> Result<bool> {
        self.check(blocks)?;
        let mut changed = false;
        let mut at = blocks.start.0;
        while at < blocks.end.0 {
            let (marked, leaf, end) = self.tree.zero(at, blocks.end.0, true, Share::All)?;
            changed |= marked;
            if let Some(leaf) = leaf {
                leaf.update(at, end, &f, |_, _| changed = true);
            }
            at = end;
        }
        Ok(changed)
    }

    /// How much memory a leaf takes: the least that it takes to have a block stored.
    pub const LEAF_LEN: u64 = size_of::<Leaf>() as u64;

    /// Has the memory of all that is made from now on charged to `account`.
    pub fn limit(&mut self, account: &Arc<Account>) {
        self.tree.limit(account);
    }

    /// Makes all that is needed for `blocks` to become *data*. As long as their stripes are
    /// held it stays.
    pub fn grow_for_data(&self, blocks: &Range<BlockNum>, share: Share) -> Result<()> {
        self.check(blocks)?;
        let mut at = blocks.start.0;
        while at < blocks.end.0 {
            self.tree.leaf(at, share)?;
            at = (at / BLOCKS_PER_LEAF + 1) * BLOCKS_PER_LEAF;
        }
        Ok(())
    }

    /// The same for `blocks` to become *zero*.
    pub fn grow_for_zero(&self, blocks: &Range<BlockNum>, share: Share) -> Result<()> {
        self.check(blocks)?;
        let mut at = blocks.start.0;
        while at < blocks.end.0 {
            (_, _, at) = self.tree.zero(at, blocks.end.0, false, share)?;
        }
        Ok(())
    }

    /// How much memory `blocks` need to become *data*, at most.
    pub fn memory_for(&self, blocks: &Range<BlockNum>) -> u64 {
        self.tree.memory_for(&(blocks.start.0..blocks.end.0))
    }

    /// The end of the part of the disk that `block` is in and that has no leaf; or of its
    /// leaf.
    pub fn part_end(&self, block: BlockNum) -> BlockNum {
        BlockNum(self.tree.look(|tree| tree.lookup(block.0).1))
    }

    /// The blocks that share a leaf or a node of the tree with `block`, if all of them are
    /// *zero* and none is stored: then [`BlockMap::prune`] can do something for them.
    pub fn zeroed_around(&self, block: BlockNum) -> Option<Range<BlockNum>> {
        let blocks = self.tree.zeroed_around(block.0)?;
        Some(BlockNum(blocks.start)..BlockNum(blocks.end))
    }

    /// Gives up leaves and nodes that have nothing but blocks of `blocks`, all of them
    /// *zero* and not stored. The stripes of `blocks` are held exclusively.
    pub fn prune(&self, blocks: &Range<BlockNum>) {
        self.tree.prune(&(blocks.start.0..blocks.end.0));
    }

    /// What is in the map now. Takes time for each leaf.
    pub fn usage(&self) -> Usage {
        let mut usage = Usage {
            memory: self.tree.memory(),
            ..Usage::default()
        };
        let mut at = 0;
        while at < self.blocks {
            let (stored, unused, end) = self.tree.look(|tree| {
                let (found, end) = tree.lookup(at);
                let end = end.min(self.blocks);
                match found {
                    Found::Leaf(leaf) => {
                        let (stored, unused) = leaf.usage(at, end);
                        (stored, unused, end)
                    }
                    Found::Untouched | Found::Zeroed => (0, 0, end),
                }
            });
            usage.data += stored - unused;
            usage.unused += unused;
            at = end;
        }
        usage
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

    /// The first of `blocks` that is stored.
    pub fn first_stored(&self, blocks: &Range<BlockNum>) -> Option<BlockNum> {
        let mut at = blocks.start.0;
        while at < blocks.end.0 {
            let (stored, end) = self.tree.look(|tree| {
                let (found, part_end) = tree.lookup(at);
                let end = part_end.min(blocks.end.0);
                match found {
                    Found::Leaf(leaf) => (leaf.first_stored(at, end), end),
                    Found::Untouched | Found::Zeroed => (None, end),
                }
            });
            if stored.is_some() {
                return stored.map(BlockNum);
            }
            at = end;
        }
        None
    }

    /// The word that has the states of 32 blocks from `32 * index` on. Blocks that
    /// the disk does not have may be in any state.
    pub fn word(&self, index: u64) -> u64 {
        let block = index * BLOCKS_PER_WORD;
        self.tree.look(|tree| match tree.lookup(block).0 {
            Found::Untouched => 0,
            Found::Zeroed => ALL_ZERO,
            Found::Leaf(leaf) => shown(leaf.word(block).load(Ordering::Acquire)),
        })
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
            let is_zeroed =
                words.len() as u64 == WORDS_PER_LEAF && words.iter().all(|word| *word == ALL_ZERO);
            if is_zeroed {
                self.tree
                    .zero(first, first + BLOCKS_PER_LEAF, true, Share::All)?;
            } else {
                self.tree.leaf(first, Share::All)?.fill(words);
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

    /// Calls `f` with each leaf that has blocks of `blocks`, and which: from the one to
    /// before the other. The stripes of `blocks` are held.
    fn for_each_leaf(
        &self,
        blocks: &Range<BlockNum>,
        mut f: impl FnMut(&Leaf, u64, u64),
    ) -> Result<()> {
        self.check(blocks)?;
        let mut at = blocks.start.0;
        while at < blocks.end.0 {
            let (found, part_end) = self.tree.lookup(at);
            let end = blocks.end.0.min(part_end);
            if let Found::Leaf(leaf) = found {
                f(leaf, at, end);
            }
            at = end;
        }
        Ok(())
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
        assert!(matches!(map.tree.lookup(0).0, Found::Zeroed));
        assert!(matches!(map.tree.lookup(all.end - 1).0, Found::Zeroed));
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
    fn a_last_leaf_that_is_not_whole_gives_way_to_a_mark_as_any() {
        for blocks in [
            3 * BLOCKS_PER_LEAF + 7,
            3 * BLOCKS_PER_LEAF + BLOCKS_PER_WORD,
        ] {
            let map = map(blocks);
            let all = range(0..blocks);
            // A leaf of zeroes, and one that begins as one of the base.
            for is_zeroed in [false, true] {
                if is_zeroed {
                    map.set_zero(&all).expect("in range");
                }
                map.set_data(&range(blocks - 1..blocks)).expect("in range");
                map.set_zero(&all).expect("in range");
                map.set_given_back(&all).expect("in range");
                map.prune(&all);
                assert!(map.part_end(BlockNum(0)).0 >= blocks, "{blocks} blocks");
            }
        }
    }

    /// As [`Overlay::shrink_map`](crate::overlay::Overlay) does it.
    fn shrink(map: &BlockMap, block: u64) {
        while let Some(blocks) = map.zeroed_around(BlockNum(block)) {
            map.prune(&blocks);
        }
    }

    #[test]
    fn zeroing_the_largest_disk_takes_no_memory() {
        let all = 0..1 << 54;
        let map = map(all.end);
        map.set_zero(&range(all.clone())).expect("in range");
        assert_eq!(map.usage(), Usage::default());
        assert_eq!(runs(&map, all.clone()), [(State::Zero, all.clone())]);
        // A part of what is zeroed already takes none either.
        map.set_zero(&range(77..78)).expect("in range");
        map.set_zero_unless_data(&range(5000..all.end - 1))
            .expect("in range");
        assert_eq!(map.usage(), Usage::default());
        let last = all.end - 1;
        map.set_data(&range(last..all.end)).expect("in range");
        assert_eq!(
            runs(&map, all.clone()),
            [(State::Zero, 0..last), (State::Data, last..all.end)]
        );
    }

    #[test]
    fn what_is_zeroed_piece_by_piece_takes_no_memory_in_the_end() {
        // Two nodes above nodes, the last leaf not whole.
        let leaves = if cfg!(miri) { 3 } else { 600 * 512 + 3 };
        let all = 0..leaves * BLOCKS_PER_LEAF + 7;
        let map = map(all.end);
        for leaf in (0..all.end).step_by(BLOCKS_PER_LEAF as usize) {
            let end = (leaf + BLOCKS_PER_LEAF).min(all.end);
            for (start, end) in [(leaf, leaf + 5), (leaf + 5, end)] {
                map.set_zero(&range(start..end)).expect("in range");
                shrink(&map, start);
            }
        }
        assert!(matches!(map.tree.lookup(5).0, Found::Zeroed));
        assert!(map.part_end(BlockNum(0)).0 >= all.end, "the whole tree");
        // One leaf, and nodes on two levels while the first one fills.
        let memory = map.usage().memory;
        assert!(memory < 4 * 5000, "{memory} bytes");
    }

    #[test]
    fn a_part_gives_its_leaf_back_when_nothing_of_it_is_stored_any_more() {
        // Miri takes its time.
        let leaves = if cfg!(miri) { 5 } else { 1000 };
        let map = map(leaves * BLOCKS_PER_LEAF);
        let mut most = 0;
        for leaf in 0..leaves {
            let blocks = range(leaf * BLOCKS_PER_LEAF..(leaf + 1) * BLOCKS_PER_LEAF);
            let block = blocks.start.0 + 5;
            map.set_data(&range(block..block + 1)).expect("in range");
            map.set_zero(&blocks).expect("in range");
            map.prune(&blocks);
            shrink(&map, block);
            let usage = map.usage();
            assert_eq!((usage.data, usage.unused), (0, 1), "it is stored still");
            assert_eq!(map.set_given_back(&blocks).expect("in range"), 1);
            shrink(&map, block);
            assert!(matches!(map.tree.lookup(block).0, Found::Zeroed));
            most = most.max(map.usage().memory);
        }
        assert!(most < 4 * 5000, "{most} bytes");
        let all = range(0..leaves * BLOCKS_PER_LEAF);
        assert_eq!(map.run(&all).expect("in range"), (State::Zero, all.end));
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
            operations in prop::collection::vec((0..6, any::<u64>(), any::<u64>()), 0..40),
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
                    // No hold is needed where nobody else is.
                    4 => map.prune(&range(touched)),
                    5 => shrink(&map, a % blocks),
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
                    let bits = (word >> bit) & (1 | (1 << BLOCKS_PER_WORD));
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
