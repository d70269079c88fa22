//! A set of groups that only grows, and that is looked at without a lock.

use std::sync::OnceLock;

use crate::buffer::list;
use crate::error::Result;
use crate::sync::{AtomicU64, Ordering};

/// Groups that are looked at together, as the bits of a word.
pub const GROUPS_PER_WORD: u64 = 64;

/// Words that get their memory together. It makes the list of chunks short also for the
/// largest disk (half a MiB), and a chunk small beside what a disk takes that needs more
/// than one (at 4K blocks it is for 4 TiB).
const WORDS_PER_CHUNK: u64 = 8192;

/// A bit for each group. Only chunks in which there is a group take memory.
pub struct GroupSet {
    words: u64,
    chunks: Vec<OnceLock<Vec<AtomicU64>>>,
}

impl GroupSet {
    /// An empty set for the groups with numbers below `groups`.
    pub fn new(groups: u64) -> Self {
        let words = groups.div_ceil(GROUPS_PER_WORD);
        let chunks = words.div_ceil(WORDS_PER_CHUNK);
        let set = GroupSet {
            words,
            chunks: (0..chunks).map(|_| OnceLock::new()).collect(),
        };
        // The model checker does not see what a cell of the standard library puts in order.
        for chunk in (0..chunks).filter(|_| cfg!(loom)) {
            set.grow(chunk * WORDS_PER_CHUNK).expect("memory");
        }
        set
    }

    /// Which of 64 groups are in the set: bit *i* is group 64 * `word` + *i*.
    ///
    /// Acquire: what was done before a bit was set comes before what follows a look at it.
    pub fn word(&self, word: u64) -> u64 {
        match self.chunk(word).get() {
            Some(chunk) => chunk[(word % WORDS_PER_CHUNK) as usize].load(Ordering::Acquire),
            None => 0,
        }
    }

    /// Adds the groups whose bits are in `bits`. ENOMEM if the set can't grow.
    pub fn insert(&self, word: u64, bits: u64) -> Result<()> {
        let chunk = self.chunk(word);
        let words = match chunk.get() {
            Some(words) => words,
            None => self.grow(word)?,
        };
        words[(word % WORDS_PER_CHUNK) as usize].fetch_or(bits, Ordering::Release);
        Ok(())
    }

    /// How many groups are in the set.
    pub fn len(&self) -> u64 {
        let words = self.chunks.iter().filter_map(OnceLock::get).flatten();
        words
            .map(|word| u64::from(word.load(Ordering::Acquire).count_ones()))
            .sum()
    }

    /// The chunk that has `word`, made if nobody else was faster.
    #[cold]
    fn grow(&self, word: u64) -> Result<&Vec<AtomicU64>> {
        let first = word / WORDS_PER_CHUNK * WORDS_PER_CHUNK;
        let len = WORDS_PER_CHUNK.min(self.words - first);
        let new = list((0..len).map(|_| AtomicU64::new(0)))?;
        Ok(self.chunk(word).get_or_init(|| new))
    }

    fn chunk(&self, word: u64) -> &OnceLock<Vec<AtomicU64>> {
        &self.chunks[(word / WORDS_PER_CHUNK) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_in_the_set_when_it_was_added_and_no_other_is() {
        let words = WORDS_PER_CHUNK + 3;
        let set = GroupSet::new(words * GROUPS_PER_WORD - 1);
        let places = [0, 1, WORDS_PER_CHUNK - 1, WORDS_PER_CHUNK, words - 1];
        for (number, word) in places.into_iter().enumerate() {
            assert_eq!(set.word(word), 0);
            set.insert(word, 1 << number).expect("memory");
            set.insert(word, 1 << 63).expect("memory");
            assert_eq!(set.word(word), (1 << number) | (1 << 63));
        }
        let others = (0..words).filter(|word| !places.contains(word));
        assert!(others.into_iter().all(|word| set.word(word) == 0));
        assert_eq!(set.len(), 2 * places.len() as u64);
    }

    #[test]
    fn threads_that_add_to_one_word_lose_nothing() {
        let set = GroupSet::new(GROUPS_PER_WORD);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let set = &set;
                scope.spawn(move || {
                    for bit in (thread..GROUPS_PER_WORD).step_by(4) {
                        set.insert(0, 1 << bit).expect("memory");
                        assert!((set.word(0) >> bit) & 1 != 0);
                    }
                });
            }
        });
        assert_eq!(set.word(0), u64::MAX);
    }
}
