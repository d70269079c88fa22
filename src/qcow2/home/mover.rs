//! Moves data from where it lies to where it belongs, round by round.

use super::super::file::ImageFile;
use super::super::layout::{COPIED, ENTRY_LEN, Entry, GuestCluster, Layout};
use super::hosts::HostCluster;
use super::io::Io;
use super::plan::{Move, Plan};
use super::{Cluster, Progress, home_of};
use crate::error::Result;

/// How much is copied at once, so that progress can be told.
const MAX_COPY: u64 = 8 << 20;

/// See the module's documentation.
pub struct Mover<'a, F> {
    pub io: Io<'a, F>,
    pub layout: Layout,
    /// The offset of each L2 table.
    pub l2: &'a [u64],
    /// The first scratch cluster.
    pub scratch: HostCluster,
    pub progress: Progress,
    pub tell: &'a mut dyn FnMut(Progress),
}

/// Bytes to be copied in one piece.
#[derive(Clone, Copy)]
struct Piece {
    from: u64,
    to: u64,
    len: u64,
}

impl<F: ImageFile> Mover<'_, F> {
    /// Carries out the plan. All of it is on the disk when this returns.
    pub fn run(&mut self, away: &[Cluster], plan: &Plan) -> Result<()> {
        for round in 1..=plan.rounds {
            let moves = || {
                let steps = away.iter().zip(&plan.steps);
                steps.filter_map(|(cluster, step)| Some((cluster, step.in_round(round)?)))
            };
            self.copy(moves())?;
            self.io.sync()?;
            let entries = moves().map(|(cluster, to)| self.entry(cluster, to));
            write_entries(self.io, self.layout, self.l2, entries)?;
            self.io.sync()?;
        }
        Ok(())
    }

    fn place(&self, cluster: &Cluster, to: Move) -> (HostCluster, HostCluster) {
        let scratch = |number: u32| HostCluster(self.scratch.0 + u64::from(number));
        let home = home_of(self.layout, cluster.guest);
        match to {
            Move::ToScratch(number) => (cluster.host, scratch(number)),
            Move::Home => (cluster.host, home),
            Move::HomeFromScratch(number) => (scratch(number), home),
        }
    }

    fn entry(&self, cluster: &Cluster, to: Move) -> (GuestCluster, Entry) {
        let (_, to) = self.place(cluster, to);
        let entry = Entry {
            descriptor: COPIED | (to.0 * self.layout.cluster_size()),
            bitmap: cluster.bitmap,
        };
        (cluster.guest, entry)
    }

    /// Copies the blocks of data, neighbours in one piece.
    fn copy<'c>(&mut self, moves: impl Iterator<Item = (&'c Cluster, Move)>) -> Result<()> {
        let (cluster_size, block) = (self.layout.cluster_size(), self.layout.block_size().bytes());
        let mut pending = Piece {
            from: 0,
            to: 0,
            len: 0,
        };
        for (cluster, to) in moves {
            let (from, place) = self.place(cluster, to);
            for (first, blocks) in runs(cluster.bitmap as u32) {
                let piece = Piece {
                    from: from.0 * cluster_size + first * block,
                    to: place.0 * cluster_size + first * block,
                    len: blocks * block,
                };
                let follows = pending.from + pending.len == piece.from
                    && pending.to + pending.len == piece.to;
                if follows && pending.len < MAX_COPY {
                    pending.len += piece.len;
                } else {
                    self.copy_piece(pending)?;
                    pending = piece;
                }
            }
            // (Most of them: the last ones may wait for a neighbour.)
            if !matches!(to, Move::ToScratch(_)) {
                self.progress.clusters += 1;
            }
        }
        self.copy_piece(pending)
    }

    fn copy_piece(&mut self, piece: Piece) -> Result<()> {
        if piece.len > 0 {
            self.io.copy(piece.from, piece.to, piece.len)?;
            self.progress.bytes += piece.len;
            (self.tell)(self.progress);
        }
        Ok(())
    }
}

/// Writes L2 entries, which are in the order of the disk: neighbours in one piece.
pub fn write_entries<F: ImageFile>(
    io: Io<'_, F>,
    layout: Layout,
    l2: &[u64],
    entries: impl Iterator<Item = (GuestCluster, Entry)>,
) -> Result<()> {
    let cluster_size = layout.cluster_size();
    let per_table = cluster_size / ENTRY_LEN;
    let (mut bytes, mut start) = (Vec::new(), 0);
    for (guest, entry) in entries {
        let table = l2[(guest.0 / per_table) as usize];
        let at = table + guest.0 % per_table * ENTRY_LEN;
        let follows = at == start + bytes.len() as u64;
        if !bytes.is_empty() && (!follows || bytes.len() as u64 >= cluster_size) {
            io.write(&bytes, start)?;
            bytes.clear();
        }
        if bytes.is_empty() {
            start = at;
        }
        bytes.extend(entry.to_bytes());
    }
    if bytes.is_empty() {
        return Ok(());
    }
    io.write(&bytes, start)
}

/// The runs of bits that are set: the number of the first, and how many there are.
pub fn runs(bits: u32) -> impl Iterator<Item = (u64, u64)> {
    let mut rest = u64::from(bits);
    let mut at = 0;
    std::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let first = at + u64::from(rest.trailing_zeros());
        rest >>= rest.trailing_zeros();
        let len = u64::from(rest.trailing_ones());
        rest >>= len;
        at = first + len;
        Some((first, len))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits_are_found() {
        let found = |bits| runs(bits).collect::<Vec<_>>();
        assert_eq!(found(0), []);
        assert_eq!(found(u32::MAX), [(0, 32)]);
        assert_eq!(found(0b1011_0001), [(0, 1), (4, 2), (7, 1)]);
        assert_eq!(found(1 << 31), [(31, 1)]);
        assert_eq!(found(1 | (1 << 31)), [(0, 1), (31, 1)]);
    }
}
