//! Sets of clusters of the file.

use std::collections::BTreeMap;
use std::ops::Range;

/// A cluster of the file, counted from the file's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostCluster(pub u64);

/// Clusters of the file. It takes memory for what is in it: 64 neighbours share a word.
#[derive(Debug, Clone, Default)]
pub struct HostSet {
    words: BTreeMap<u64, u64>,
}

impl HostSet {
    /// `false`: it was in the set.
    pub fn insert(&mut self, cluster: HostCluster) -> bool {
        let word = self.words.entry(cluster.0 / 64).or_default();
        let bit = 1 << (cluster.0 % 64);
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }

    pub fn insert_all(&mut self, clusters: impl IntoIterator<Item = HostCluster>) {
        for cluster in clusters {
            self.insert(cluster);
        }
    }

    pub fn remove(&mut self, cluster: HostCluster) {
        if let Some(word) = self.words.get_mut(&(cluster.0 / 64)) {
            *word &= !(1 << (cluster.0 % 64));
        }
    }

    pub fn contains(&self, cluster: HostCluster) -> bool {
        let word = self.words.get(&(cluster.0 / 64));
        word.is_some_and(|word| word & (1 << (cluster.0 % 64)) != 0)
    }

    pub fn last(&self) -> Option<HostCluster> {
        let mut words = self.words.iter().filter(|(_, word)| **word != 0);
        let (key, word) = words.next_back()?;
        Some(HostCluster(key * 64 + u64::from(word.ilog2())))
    }

    /// In ascending order.
    pub fn iter(&self) -> impl Iterator<Item = HostCluster> {
        self.without(HostSet::none())
    }

    /// Those that are not in `other`, in ascending order.
    pub fn without<'a>(&'a self, other: &'a HostSet) -> impl Iterator<Item = HostCluster> + 'a {
        self.words.iter().flat_map(|(key, word)| {
            let other = other.words.get(key).copied().unwrap_or(0);
            bits(word & !other).map(move |bit| HostCluster(key * 64 + bit))
        })
    }

    /// Those of `clusters`, as ranges of neighbours.
    pub fn ranges_in(
        &self,
        clusters: Range<HostCluster>,
    ) -> impl Iterator<Item = Range<HostCluster>> {
        let keys = clusters.start.0 / 64..clusters.end.0.div_ceil(64);
        let words = self.words.range(keys);
        let all = words.flat_map(|(key, word)| bits(*word).map(move |bit| key * 64 + bit));
        ranges(all.map(HostCluster).filter(move |c| clusters.contains(c)))
    }

    fn none() -> &'static HostSet {
        static NONE: HostSet = HostSet {
            words: BTreeMap::new(),
        };
        &NONE
    }
}

/// The numbers of the bits that are set.
fn bits(mut word: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        word &= word.wrapping_sub(1);
        (bit < 64).then_some(u64::from(bit))
    })
}

/// `clusters`, which are in ascending order, as ranges of neighbours.
pub fn ranges(
    clusters: impl Iterator<Item = HostCluster>,
) -> impl Iterator<Item = Range<HostCluster>> {
    let mut clusters = clusters.peekable();
    std::iter::from_fn(move || {
        let start = clusters.next()?;
        let mut end = HostCluster(start.0 + 1);
        while clusters.next_if_eq(&end).is_some() {
            end.0 += 1;
        }
        Some(start..end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(clusters: &[u64]) -> HostSet {
        let mut set = HostSet::default();
        set.insert_all(clusters.iter().copied().map(HostCluster));
        set
    }

    fn numbers(clusters: impl Iterator<Item = HostCluster>) -> Vec<u64> {
        clusters.map(|cluster| cluster.0).collect()
    }

    #[test]
    fn what_is_in_a_set_is_found_in_order() {
        let mut clusters = set(&[63, 64, 0, 1 << 60]);
        assert!(!clusters.insert(HostCluster(64)));
        assert!(clusters.insert(HostCluster(65)));
        clusters.remove(HostCluster(0));
        clusters.remove(HostCluster(7000));
        assert!(clusters.contains(HostCluster(63)) && !clusters.contains(HostCluster(0)));
        assert_eq!(numbers(clusters.iter()), [63, 64, 65, 1 << 60]);
        assert_eq!(clusters.last(), Some(HostCluster(1 << 60)));
        clusters.remove(HostCluster(1 << 60));
        assert_eq!(clusters.last(), Some(HostCluster(65)));
        clusters.insert(HostCluster(1 << 60));
        let other = set(&[64, 66]);
        assert_eq!(numbers(clusters.without(&other)), [63, 65, 1 << 60]);
    }

    #[test]
    fn neighbours_make_a_range() {
        let clusters = set(&[1, 2, 3, 63, 64, 65, 127, 128, 200]);
        let between = |start, end| -> Vec<_> {
            let found = clusters.ranges_in(HostCluster(start)..HostCluster(end));
            found.map(|range| (range.start.0, range.end.0)).collect()
        };
        let all = [(1, 4), (63, 66), (127, 129), (200, 201)];
        assert_eq!(between(0, 1000), all);
        assert_eq!(between(2, 64), [(2, 4), (63, 64)]);
        assert_eq!(between(4, 63), []);
    }
}
