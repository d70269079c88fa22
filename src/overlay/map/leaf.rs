//! A leaf of the block map: the words of 2048 blocks. Its invariants are those of
//! [`super`].

use std::array;
use std::ptr;

use super::State;
use crate::sync::{AtomicPtr, AtomicU64, Ordering};

pub const BLOCKS_PER_WORD: u64 = 32;
/// (The model checker can't cope with many atomics, and needs no more than two of
/// anything to find a mistake.)
pub const WORDS_PER_LEAF: u64 = if cfg!(loom) { 2 } else { 64 };
pub const BLOCKS_PER_LEAF: u64 = BLOCKS_PER_WORD * WORDS_PER_LEAF;

/// A word in which every block is *zero*.
pub const ALL_ZERO: u64 = 0xffff_ffff_0000_0000;

/// See the module's documentation.
pub struct Leaf {
    words: [AtomicU64; WORDS_PER_LEAF as usize],
    /// While it is not in use: the next one that is not.
    pub next: AtomicPtr<u8>,
}

/// The `stored` and `zero` bits of the block with number 0 in a word.
const STORED: u64 = 1;
const ZERO: u64 = 1 << BLOCKS_PER_WORD;

/// The state of the block with number `bit` in a word.
fn state_in(word: u64, bit: u64) -> State {
    match (word >> bit) & (STORED | ZERO) {
        0 => State::Base,
        STORED => State::Data,
        _ => State::Zero,
    }
}

/// A word with the `stored` bits of the *data* blocks only: those of zeroed blocks whose
/// space was not given back yet are of no interest to a reader.
pub fn shown(word: u64) -> u64 {
    word & !(word >> BLOCKS_PER_WORD)
}

/// How many blocks of a word, from the one with number `bit` on, are in `state`.
fn same_from(word: u64, bit: u64, state: State) -> u64 {
    let (stored, zero) = (word as u32, (word >> BLOCKS_PER_WORD) as u32);
    let same = match state {
        State::Base => !(stored | zero),
        State::Data => stored & !zero,
        State::Zero => zero,
    };
    u64::from((same >> bit).trailing_ones()).min(BLOCKS_PER_WORD - bit)
}

impl Leaf {
    /// With every block *zero*, or *base*.
    pub fn new(is_zeroed: bool) -> Self {
        Leaf {
            words: array::from_fn(|_| AtomicU64::new(Self::word_of(is_zeroed))),
            next: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// Makes it what [`Leaf::new`] makes.
    pub fn renew(&self, is_zeroed: bool) {
        for word in &self.words {
            word.store(Self::word_of(is_zeroed), Ordering::Relaxed);
        }
    }

    fn word_of(is_zeroed: bool) -> u64 {
        if is_zeroed { ALL_ZERO } else { 0 }
    }

    /// Makes its words the given ones, as far as those go.
    pub fn fill(&self, words: &[u64]) {
        for (place, word) in self.words.iter().zip(words) {
            place.store(*word, Ordering::Release);
        }
    }

    /// Whether all blocks from `start` to `end`, where the leaf or the disk ends, are *zero*
    /// and not stored. `start` is the leaf's first.
    pub fn is_zeroed(&self, start: u64, end: u64) -> bool {
        let whole = ((end - start) / BLOCKS_PER_WORD) as usize;
        let rest = (end - start) % BLOCKS_PER_WORD;
        // Blocks that the disk does not have may be in any state.
        let of_rest = ((1 << rest) - 1) * (STORED | ZERO);
        let is_zero =
            |word: &AtomicU64, bits| word.load(Ordering::Acquire) & bits == ALL_ZERO & bits;
        let (words, others) = self.words.split_at(whole);
        words.iter().all(|word| is_zero(word, u64::MAX))
            && (rest == 0 || is_zero(&others[0], of_rest))
    }

    pub fn word(&self, block: u64) -> &AtomicU64 {
        &self.words[(block / BLOCKS_PER_WORD % WORDS_PER_LEAF) as usize]
    }

    pub fn state(&self, block: u64) -> State {
        let word = self.word(block).load(Ordering::Acquire);
        state_in(word, block % BLOCKS_PER_WORD)
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

    /// How many blocks from `at` to `end` are stored, and how many of them are *zero*.
    pub fn usage(&self, mut at: u64, end: u64) -> (u64, u64) {
        let (mut stored, mut unused) = (0, 0);
        while at < end {
            let count = (BLOCKS_PER_WORD - at % BLOCKS_PER_WORD).min(end - at);
            let word = self.word(at).load(Ordering::Acquire);
            let of_range = word & (((1 << count) - 1) << (at % BLOCKS_PER_WORD));
            stored += u64::from(of_range.count_ones());
            unused += u64::from((of_range & (word >> BLOCKS_PER_WORD)).count_ones());
            at += count;
        }
        (stored, unused)
    }

    /// The first block from `at` to `end` that is stored.
    pub fn first_stored(&self, mut at: u64, end: u64) -> Option<u64> {
        while at < end {
            let stored = self.word(at).load(Ordering::Acquire) as u32 >> (at % BLOCKS_PER_WORD);
            if stored != 0 {
                let first = at + u64::from(stored.trailing_zeros());
                return (first < end).then_some(first);
            }
            at = (at / BLOCKS_PER_WORD + 1) * BLOCKS_PER_WORD;
        }
        None
    }

    /// Makes `f(word, mask)` of every word that has blocks from `at` to `end`, where
    /// `mask` has their `stored` bits. `seen` gets those that have changed, before and
    /// after.
    pub fn update(
        &self,
        mut at: u64,
        end: u64,
        f: impl Fn(u64, u64) -> u64,
        mut seen: impl FnMut(u64, u64),
    ) {
        while at < end {
            let count = (BLOCKS_PER_WORD - at % BLOCKS_PER_WORD).min(end - at);
            self.update_word(at, count, &f, &mut seen);
            at += count;
        }
    }

    /// The same for `count` blocks of one word, from block `at` on.
    pub fn update_word(
        &self,
        at: u64,
        count: u64,
        f: impl Fn(u64, u64) -> u64,
        mut seen: impl FnMut(u64, u64),
    ) {
        let mask = ((1 << count) - 1) << (at % BLOCKS_PER_WORD);
        let word = self.word(at);
        let mut old = word.load(Ordering::Relaxed);
        loop {
            let new = f(old, mask);
            // A sweep over blocks that are right already, the common case when a
            // disk is written twice, must not take the cache line from readers.
            if new == old {
                return;
            }
            // Release: invariant 3.
            match word.compare_exchange_weak(old, new, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return seen(old, new),
                Err(present) => old = present,
            }
        }
    }
}
