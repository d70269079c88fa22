//! A leaf of the block map: the words of 2048 blocks. Its invariants are those of
//! [`super`].

use std::array;

use super::State;
use crate::sync::{AtomicU64, Ordering};

pub const BLOCKS_PER_WORD: u64 = 32;
/// (The model checker can't cope with many atomics, and needs no more than two of
/// anything to find a mistake.)
pub const WORDS_PER_LEAF: u64 = if cfg!(loom) { 2 } else { 64 };
pub const BLOCKS_PER_LEAF: u64 = BLOCKS_PER_WORD * WORDS_PER_LEAF;

/// A word in which every block is *zero*.
pub const ALL_ZERO: u64 = 0xffff_ffff_0000_0000;

/// See the module's documentation.
pub struct Leaf(pub [AtomicU64; WORDS_PER_LEAF as usize]);

/// The state of the block with number `bit` in a word.
fn state_in(word: u64, bit: u64) -> State {
    if (word >> bit) & 1 != 0 {
        State::Data
    } else if (word >> (bit + BLOCKS_PER_WORD)) & 1 != 0 {
        State::Zero
    } else {
        State::Base
    }
}

/// How many blocks of a word, from the one with number `bit` on, are in `state`.
fn same_from(word: u64, bit: u64, state: State) -> u64 {
    let (data, zero) = (word as u32, (word >> BLOCKS_PER_WORD) as u32);
    let same = match state {
        State::Base => !(data | zero),
        State::Data => data,
        State::Zero => zero,
    };
    u64::from((same >> bit).trailing_ones()).min(BLOCKS_PER_WORD - bit)
}

impl Leaf {
    pub fn new(word: u64) -> Self {
        Leaf(array::from_fn(|_| AtomicU64::new(word)))
    }

    pub fn word(&self, block: u64) -> &AtomicU64 {
        &self.0[(block / BLOCKS_PER_WORD % WORDS_PER_LEAF) as usize]
    }

    /// The state of block `at`, and the end of the run that starts there, at most `end`.
    pub fn run(&self, at: u64, end: u64) -> (State, u64) {
        let word = self.word(at).load(Ordering::Acquire);
        let bit = at % BLOCKS_PER_WORD;
        let state = state_in(word, bit);
        let mut at = at + same_from(word, bit, state);
        while at < end && at % BLOCKS_PER_WORD == 0 {
            let same = same_from(self.word(at).load(Ordering::Acquire), 0, state);
            at += same;
            if same == 0 {
                break;
            }
        }
        (state, at.min(end))
    }

    pub fn update(&self, mut at: u64, end: u64, f: impl Fn(u64, u64) -> u64) -> bool {
        let mut changed = false;
        while at < end {
            let count = (BLOCKS_PER_WORD - at % BLOCKS_PER_WORD).min(end - at);
            changed |= self.update_word(at, count, &f);
            at += count;
        }
        changed
    }

    /// The same for `count` blocks of one word, from block `at` on.
    pub fn update_word(&self, at: u64, count: u64, f: impl Fn(u64, u64) -> u64) -> bool {
        let mask = ((1 << count) - 1) << (at % BLOCKS_PER_WORD);
        let word = self.word(at);
        let mut old = word.load(Ordering::Relaxed);
        loop {
            let new = f(old, mask);
            // A sweep over blocks that are right already, the common case when a
            // disk is written twice, must not take the cache line from readers.
            if new == old {
                return false;
            }
            // Release: invariant 3.
            match word.compare_exchange_weak(old, new, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(present) => old = present,
            }
        }
    }
}
