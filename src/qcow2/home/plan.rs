//! In which order clusters can go home: a list in, rounds out. Nothing is read or written
//! here.
//!
//! In a round, clusters are copied to places that are free at its start, and their old places
//! are free at its end. Where the home of one is taken by another, that one has to go
//! in an earlier round. So the clusters make chains. A guest that writes its disk from the
//! start to the end makes one that has all clusters, and as many rounds, with their syncs,
//! would take for ever: one cluster in [`PIECE`] goes to a *scratch* cluster in the
//! first round, so that all pieces of a chain can move side by side. In the same way
//! one of a chain that is a ring makes room for the others.

use std::iter;

use super::Cluster;
use super::hosts::HostCluster;
use crate::buffer::list;
use crate::error::Result;

/// One cluster in so many of a chain is copied twice. More would be copied where there are
/// fewer, and there would be more syncs where there are more.
const PIECE: usize = 16;

/// When a cluster moves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Step {
    /// The round in which it goes home; from 1 on.
    home: u32,
    /// The number of its scratch cluster, to which it goes in the first round.
    scratch: Option<u32>,
}

/// Where a cluster goes from and to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    ToScratch(u32),
    Home,
    HomeFromScratch(u32),
}

impl Step {
    pub fn in_round(self, round: u32) -> Option<Move> {
        match self.scratch {
            Some(scratch) if round == 1 => Some(Move::ToScratch(scratch)),
            Some(scratch) if round == self.home => Some(Move::HomeFromScratch(scratch)),
            None if round == self.home => Some(Move::Home),
            _ => None,
        }
    }

    /// Whether another cluster was where this one belongs.
    pub fn had_to_wait(self) -> bool {
        self.home > 1
    }
}

/// See the module's documentation.
pub struct Plan {
    /// For each of the clusters.
    pub steps: Vec<Step>,
    pub rounds: u32,
    /// How many scratch clusters are needed.
    pub scratch: u32,
}

impl Plan {
    /// For `clusters`, in the order of the disk, none of which is at home. `first` is the home
    /// of the disk's first.
    pub fn new(clusters: &[Cluster], first: HostCluster) -> Result<Self> {
        // Who waits for the place of `i`.
        let next = |i: usize| {
            let waiting = clusters[i].host.0.checked_sub(first.0)?;
            clusters
                .binary_search_by_key(&waiting, |cluster| cluster.guest.0)
                .ok()
        };
        let mut waits = list(iter::repeat_n(false, clusters.len()))?;
        for i in 0..clusters.len() {
            if let Some(waiting) = next(i) {
                waits[waiting] = true;
            }
        }
        let mut plan = Plan {
            steps: list(iter::repeat_n(Step::default(), clusters.len()))?,
            rounds: 0,
            scratch: 0,
        };
        for (i, waits) in waits.iter().enumerate() {
            if !waits {
                plan.add_chain(i, next);
            }
        }
        for i in 0..clusters.len() {
            if plan.steps[i].home == 0 {
                plan.add_ring(i, next);
            }
        }
        plan.rounds = plan.steps.iter().map(|step| step.home).max().unwrap_or(0);
        Ok(plan)
    }

    /// From `first` on, whose home is free.
    fn add_chain(&mut self, first: usize, next: impl Fn(usize) -> Option<usize>) {
        self.add(first, 0, 0, next);
    }

    /// `first` gives its place up, and the others are a chain, which ends with it.
    fn add_ring(&mut self, first: usize, next: impl Fn(usize) -> Option<usize>) {
        self.steps[first].scratch = Some(self.new_scratch());
        let second = next(first).expect("all in a ring are waited for");
        let freed = self.add(second, 1, 1, |i| next(i).filter(|next| *next != first));
        self.steps[first].home = freed + 1;
    }

    /// Adds a chain from `first` on, which is the one of number `number` in it, and whose
    /// home is free after round `freed`. After which round the place of the last one is free.
    fn add(
        &mut self,
        first: usize,
        number: usize,
        mut freed: u32,
        next: impl Fn(usize) -> Option<usize>,
    ) -> u32 {
        let chain = iter::successors(Some((number, first)), |(number, i)| {
            Some((number + 1, next(*i)?))
        });
        for (number, i) in chain {
            let is_cut = number % PIECE == PIECE - 1;
            let scratch = is_cut.then(|| self.new_scratch());
            // One that goes to scratch does nothing else in that round.
            let home = freed.max(u32::from(is_cut)) + 1;
            self.steps[i] = Step { home, scratch };
            freed = if is_cut { 1 } else { home };
        }
        freed
    }

    fn new_scratch(&mut self) -> u32 {
        self.scratch += 1;
        self.scratch - 1
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::qcow2::layout::GuestCluster;

    const FIRST: u64 = 10;
    const SCRATCH: u64 = 1 << 40;

    fn clusters(places: &[(u64, u64)]) -> Vec<Cluster> {
        let mut clusters: Vec<_> = places
            .iter()
            .filter(|(guest, host)| *host != FIRST + guest)
            .map(|(guest, host)| Cluster {
                guest: GuestCluster(*guest),
                host: HostCluster(*host),
                bitmap: 1,
            })
            .collect();
        clusters.sort_by_key(|cluster| cluster.guest);
        clusters
    }

    /// Does what is planned, and looks that nothing is written over.
    fn carry_out(clusters: &[Cluster]) -> (Plan, usize) {
        let plan = Plan::new(clusters, HostCluster(FIRST)).expect("memory");
        let mut places: BTreeMap<u64, u64> =
            clusters.iter().map(|c| (c.host.0, c.guest.0)).collect();
        let mut copies = 0;
        for round in 1..=plan.rounds {
            let mut moved = Vec::new();
            let at_start = places.clone();
            for (cluster, step) in clusters.iter().zip(&plan.steps) {
                let home = FIRST + cluster.guest.0;
                let scratch = |number: u32| SCRATCH + u64::from(number);
                let (from, to) = match step.in_round(round) {
                    None => continue,
                    Some(Move::ToScratch(number)) => (cluster.host.0, scratch(number)),
                    Some(Move::Home) => (cluster.host.0, home),
                    Some(Move::HomeFromScratch(number)) => (scratch(number), home),
                };
                assert!(!at_start.contains_key(&to), "{to} is taken in {round}");
                assert_eq!(at_start.get(&from), Some(&cluster.guest.0));
                moved.push((from, to, cluster.guest.0));
                copies += 1;
            }
            assert!(!moved.is_empty(), "nothing to do in {round}");
            for (from, _, _) in &moved {
                places.remove(from);
            }
            for (_, to, guest) in moved {
                assert_eq!(places.insert(to, guest), None, "two in one place");
            }
        }
        assert_eq!(places.len(), clusters.len());
        assert!(places.iter().all(|(host, guest)| *host == FIRST + guest));
        (plan, copies)
    }

    fn chain(len: u64) -> Vec<Cluster> {
        clusters(&(0..len).map(|n| (n + 1, FIRST + n)).collect::<Vec<_>>())
    }

    fn ring(len: u64) -> Vec<Cluster> {
        let places = (0..len).map(|n| (n, FIRST + (n + 1) % len));
        clusters(&places.collect::<Vec<_>>())
    }

    #[test]
    fn a_chain_takes_few_rounds_and_few_more_copies() {
        for len in [0, 1, 2, 15, 16, 17, 31, 32, 33, 1000, 10_000] {
            let (plan, copies) = carry_out(&chain(len));
            assert_eq!(plan.scratch as u64, len / PIECE as u64, "{len}");
            assert_eq!(copies as u64, len + u64::from(plan.scratch), "{len}");
            assert!(plan.rounds as usize <= PIECE + 1, "{len}: {}", plan.rounds);
        }
    }

    #[test]
    fn a_ring_takes_at_least_one_scratch_cluster() {
        for len in [2, 3, 15, 16, 17, 18, 33, 1000] {
            let (plan, copies) = carry_out(&ring(len));
            assert!(u64::from(plan.scratch) <= 1 + len / PIECE as u64, "{len}");
            assert!(plan.scratch > 0);
            assert_eq!(copies as u64, len + u64::from(plan.scratch));
            assert!(plan.rounds as usize <= PIECE + 2, "{len}: {}", plan.rounds);
        }
    }

    #[test]
    fn clusters_in_nobodys_way_go_in_one_round() {
        // Before the disk's first cluster, and beyond its last.
        let scattered: Vec<_> = (0..FIRST)
            .map(|n| (2 * n, n))
            .chain((0..100).map(|n| (2 * n + 1, 5000 + n)))
            .collect();
        let (plan, _) = carry_out(&clusters(&scattered));
        assert_eq!((plan.rounds, plan.scratch), (1, 0));
        assert!(!plan.steps.iter().any(|step| step.had_to_wait()));
    }

    proptest! {
        #[test]
        fn every_cluster_gets_home(
            hosts in prop::sample::subsequence((0..400u64).collect::<Vec<_>>(), 0..200)
                .prop_shuffle(),
            guests in prop::sample::subsequence((0..390u64).collect::<Vec<_>>(), 200),
        ) {
            let places: Vec<_> = guests.into_iter().zip(hosts).collect();
            // Who is at home keeps its place, and nobody else may be there.
            let clusters = clusters(&places);
            let (plan, copies) = carry_out(&clusters);
            prop_assert!(plan.rounds as usize <= PIECE + 2);
            prop_assert_eq!(copies, clusters.len() + plan.scratch as usize);
        }
    }
}
