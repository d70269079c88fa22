//! Reading an image in which QEMU may have put everything elsewhere. Nothing is changed.
//!
//! Nothing in the file is trusted. Each cluster of the file may be used once: as a table, or for
//! a cluster of the disk. (Without internal snapshots nothing is shared.) So the
//! number of tables, and with it the time and the memory that this takes, is bounded by the
//! length of the file, and by what is stored in it.

use super::super::file::ImageFile;
use super::super::header::{Foreign, NEW_IMAGE, Tables};
use super::super::layout::{
    BLOCKS_PER_CLUSTER, COPIED, ENTRY_LEN, Entry, GuestCluster, Layout, MAX_L1_LEN,
    MAX_REFCOUNT_TABLE_LEN, POINTER_LEN, be_u64, has_data,
};
use super::hosts::{HostCluster, HostSet};
use super::io::{Io, Source};
use super::{Cluster, home_of};
use crate::buffer::{buffer, list, push};
use crate::error::{Error, Result};

/// The offset in a pointer of the L1 table and in a descriptor of an L2 table; and in one of the
/// refcount table.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const REFCOUNT_OFFSET: u64 = 0xffff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

const MENDS: &str = "run qemu-img check -r all";

/// What is in an image.
pub struct Findings {
    pub layout: Layout,
    pub foreign: Foreign,
    /// The length of the file.
    pub len: u64,
    /// The offset of each L2 table; 0 where there is none, or nothing is in it.
    pub l2: Vec<u64>,
    /// The tables lie where this filter has them.
    pub is_home: bool,
    /// `qemu-img commit` may have emptied it: the file is shorter, or the L1 table lies
    /// elsewhere and the L2 tables do too. (If QEMU moves the L1 table because it has become
    /// larger, the L2 tables stay; if it copies an L2 table because of a snapshot, the L1 table
    /// stays.) Then its base has what was in it.
    pub may_have_been_emptied: bool,
    /// The L1 table lies at home, but some of it has to be written: the COPIED bit of a
    /// pointer, or zeroes behind the last.
    pub is_l1_stale: bool,
    /// Clusters whose data lies elsewhere.
    pub away: Vec<Cluster>,
    /// Clusters whose entry has to change, and whose data has not: it leads to a cluster of the
    /// file though there is no data, or lacks the COPIED bit.
    pub amended: Vec<Cluster>,
    /// Clusters of the file to which something leads.
    pub used: HostSet,
    /// Those of them that have tables.
    pub tables: HostSet,
    /// Those whose refcount is not 0. (If it is neither 0 nor 1, it has to be written:
    /// what is used is not in here then.)
    pub counted: HostSet,
}

/// Reads the image. EINVAL, with a sentence that says what to do, if this filter can't go on
/// with it.
pub fn read<F: ImageFile>(io: Io<'_, F>) -> Result<Findings> {
    let len = io.size()?;
    let mut bytes = buffer(len.min(16 << 10))?;
    io.read(&mut bytes, 0)?;
    let foreign = Foreign::from_bytes(&bytes).map_err(|e| io.name.refused(e))?;
    let layout = foreign.header.layout;
    let mut reader = Reader {
        io,
        source: Source::new(io, len),
        found: Findings {
            layout,
            is_home: foreign.tables == Tables::at_home(layout),
            foreign,
            len,
            l2: Vec::new(),
            may_have_been_emptied: len < layout.end,
            is_l1_stale: false,
            away: Vec::new(),
            amended: Vec::new(),
            used: HostSet::default(),
            tables: HostSet::default(),
            counted: HostSet::default(),
        },
    };
    reader.use_for_table(0, "header")?;
    let refcount_blocks = reader.refcount_table()?;
    reader.l1_table()?;
    reader.l2_tables()?;
    reader.refcounts(&refcount_blocks)?;
    Ok(reader.found)
}

struct Reader<'a, F> {
    io: Io<'a, F>,
    source: Source<'a, F>,
    found: Findings,
}

impl<F: ImageFile> Reader<'_, F> {
    fn cluster_size(&self) -> u64 {
        self.found.layout.cluster_size()
    }

    fn refused(&self, what: impl std::fmt::Display) -> Error {
        self.io.name.refused(what)
    }

    /// The cluster at `at` is used for `what`, and for nothing else.
    fn use_cluster(&mut self, at: u64, what: impl std::fmt::Display) -> Result<()> {
        let size = self.cluster_size();
        if at % size != 0 {
            return Err(self.refused(format!(
                "its {what} is said to lie at {at:#x}, where no cluster begins: {MENDS}"
            )));
        }
        if at >= self.found.len {
            return Err(self.refused(format!(
                "its {what} is said to lie at {at:#x}, but the file ends before, \
                 after {} bytes: it was truncated",
                self.found.len
            )));
        }
        if !self.found.used.insert(HostCluster(at / size)) {
            return Err(self.refused(format!(
                "its {what} is said to lie at {at:#x}, where something else lies too: {MENDS}"
            )));
        }
        Ok(())
    }

    fn use_for_table(&mut self, at: u64, what: impl std::fmt::Display) -> Result<()> {
        self.use_cluster(at, what)?;
        let cluster = HostCluster(at / self.cluster_size());
        self.found.tables.insert(cluster);
        Ok(())
    }

    /// A table of pointers. Its clusters are used for it.
    fn pointers(&mut self, what: &str, at: u64, len: u64, max: u64) -> Result<Vec<u64>> {
        if len == 0 || len > max {
            return Err(self.refused(format!(
                "its {what} is said to have {len} bytes, but can have {max} at most: {MENDS}"
            )));
        }
        let mut clusters = (0..len).step_by(self.cluster_size() as usize);
        clusters.try_for_each(|from| match at.checked_add(from) {
            Some(at) => self.use_for_table(at, what),
            None => Err(self.refused(format!("its {what} is said to lie at {at:#x}"))),
        })?;
        let mut bytes = buffer(len)?;
        if !self.source.read(&mut bytes, at)? {
            bytes.fill(0);
        }
        list(bytes.chunks_exact(8).map(|pointer| be_u64(pointer, 0)))
    }

    /// The offsets of the refcount blocks; 0: there is none.
    fn refcount_table(&mut self) -> Result<Vec<u64>> {
        let tables = self.found.foreign.tables;
        let len = tables.refcount_table_clusters * self.cluster_size();
        let at = tables.refcount_table;
        let blocks = self.pointers("refcount table", at, len, MAX_REFCOUNT_TABLE_LEN)?;
        for (i, block) in blocks.iter().enumerate() {
            if block & !REFCOUNT_OFFSET != 0 {
                return Err(self.refused(format!(
                    "entry {i} of its refcount table is {block:#x}: {MENDS}"
                )));
            }
            if *block != 0 {
                self.use_for_table(*block, format_args!("refcount block {i}"))?;
            }
        }
        let home = self.found.layout.refcount_table_entries();
        self.found.is_home &= blocks.iter().copied().eq(padded(home, blocks.len()));
        Ok(blocks)
    }

    fn l1_table(&mut self) -> Result<()> {
        let (tables, layout) = (self.found.foreign.tables, self.found.layout);
        let len = tables.l1_size * POINTER_LEN;
        let mut l1 = self.pointers("L1 table", tables.l1, len, MAX_L1_LEN)?;
        let needed = layout.l2_tables() as usize;
        if l1.len() < needed || l1[needed..].iter().any(|pointer| *pointer != 0) {
            return Err(self.refused(format!(
                "its L1 table (of {} entries) is not that of a disk of this size, \
                 which has {needed}: {MENDS}",
                l1.len()
            )));
        }
        l1.truncate(needed);
        for (i, pointer) in l1.iter_mut().enumerate() {
            if *pointer & !(OFFSET | COPIED) != 0 {
                return Err(self.refused(format!(
                    "entry {i} of its L1 table is {pointer:#x}: {MENDS}"
                )));
            }
            if *pointer == COPIED {
                let what = format!("entry {i} of its L1 table is {pointer:#x}, and leads nowhere");
                return Err(self.refused(what));
            }
            self.found.is_l1_stale |= *pointer != 0 && *pointer & COPIED == 0;
            *pointer &= OFFSET;
            if *pointer != 0 {
                self.use_for_table(*pointer, format_args!("L2 table {i}"))?;
            }
        }
        let home = layout.l1_entries().map(|pointer| pointer & OFFSET);
        let are_l2_tables_home = l1.iter().copied().eq(home);
        self.found.may_have_been_emptied |= tables.l1 != layout.l1 && !are_l2_tables_home;
        self.found.is_home &= are_l2_tables_home;
        self.found.l2 = l1;
        if self.found.is_home {
            let end = tables.l1 + len;
            let mut rest = buffer(layout.l2 - end)?;
            self.found.is_l1_stale |= self.source.read(&mut rest, end)?;
        }
        Ok(())
    }

    fn l2_tables(&mut self) -> Result<()> {
        let mut table = buffer(self.cluster_size())?;
        let entries = self.cluster_size() / ENTRY_LEN;
        for i in 0..self.found.l2.len() {
            let at = self.found.l2[i];
            if at == 0 || !self.source.read(&mut table, at)? {
                self.found.l2[i] = 0;
                continue;
            }
            for (number, bytes) in table.chunks_exact(ENTRY_LEN as usize).enumerate() {
                let entry = Entry::from_bytes(bytes.try_into().expect("sixteen bytes"));
                if entry != Entry::default() {
                    let cluster = GuestCluster(i as u64 * entries + number as u64);
                    self.entry(cluster, entry, at + number as u64 * ENTRY_LEN)?;
                }
            }
        }
        Ok(())
    }

    fn entry(&mut self, guest: GuestCluster, entry: Entry, at: u64) -> Result<()> {
        let layout = self.found.layout;
        let Entry { descriptor, bitmap } = entry;
        let refused = |this: &Self, what: &str| {
            Err(this.refused(format!(
                "the L2 entry of cluster {guest} of the disk (at {at:#x}) {what}: \
                 it is {descriptor:#x} with the bitmap {bitmap:#x}"
            )))
        };
        if descriptor & COMPRESSED != 0 {
            return Err(self.refused(format!("it has compressed clusters: {NEW_IMAGE}")));
        }
        if guest.0 >= layout.guest_clusters() {
            return refused(self, "lies beyond the disk's end");
        }
        if descriptor & !(OFFSET | COPIED) != 0 {
            return refused(self, "has bits that mean nothing");
        }
        let (data, zero) = (bitmap as u32, (bitmap >> BLOCKS_PER_CLUSTER) as u32);
        let host_at = descriptor & OFFSET;
        if data & zero != 0 || (host_at == 0 && data != 0) {
            return refused(self, "contradicts itself");
        }
        if descriptor == 0 {
            return Ok(());
        }
        if host_at == 0 {
            return refused(self, "has bits that mean nothing");
        }
        self.use_cluster(host_at, format_args!("cluster {guest} of the disk"))?;
        let cluster = Cluster {
            guest,
            host: HostCluster(host_at / layout.cluster_size()),
            bitmap: bitmap & layout.valid_bits(guest),
        };
        let last_block = u64::from((cluster.bitmap as u32).checked_ilog2().unwrap_or(0));
        let last_at = host_at + last_block * layout.block_size().bytes();
        if last_at >= self.found.len {
            let what = "leads beyond the end of the file, which was truncated";
            return refused(self, what);
        }
        let is_home = cluster.host == home_of(layout, guest);
        if has_data(cluster.bitmap) && !is_home {
            return push(&mut self.found.away, cluster);
        }
        if entry != layout.entry(guest, bitmap) {
            push(&mut self.found.amended, cluster)?;
        }
        Ok(())
    }

    /// Compares the refcounts with what is used.
    fn refcounts(&mut self, blocks: &[u64]) -> Result<()> {
        let mut bytes = buffer(self.cluster_size())?;
        let order = self.found.foreign.tables.refcount_order;
        let per_block = (self.cluster_size() * 8) >> order;
        for (block, at) in (0..).zip(blocks) {
            if *at == 0 || !self.source.read(&mut bytes, *at)? {
                continue;
            }
            for (number, refcount) in refcounts_in(&bytes, order) {
                self.refcount(HostCluster(block * per_block + number), refcount)?;
            }
        }
        let found = &self.found;
        let missing = found.used.without(&found.counted).next();
        let missing = missing.filter(|_| !found.foreign.is_dirty);
        missing.map_or(Ok(()), |cluster| Err(self.wrong_refcount(cluster, 0)))
    }

    fn refcount(&mut self, cluster: HostCluster, refcount: u64) -> Result<()> {
        let is_used = self.found.used.contains(cluster);
        // An unused one is a leak, whatever its refcount.
        if refcount > 1 && is_used && !self.found.foreign.is_dirty {
            return Err(self.wrong_refcount(cluster, refcount));
        }
        if refcount == 1 || !is_used {
            self.found.counted.insert(cluster);
        }
        Ok(())
    }

    fn wrong_refcount(&self, cluster: HostCluster, refcount: u64) -> Error {
        self.refused(format!(
            "the refcount of the cluster at {:#x} is {refcount}, and something leads there: \
             {MENDS}",
            cluster.0.saturating_mul(self.cluster_size())
        ))
    }
}

/// `numbers`, and zeroes after them, as many as `len`.
fn padded(numbers: impl Iterator<Item = u64>, len: usize) -> impl Iterator<Item = u64> {
    numbers.chain(std::iter::repeat(0)).take(len)
}

/// The refcounts in a block that are not 0, with their numbers.
fn refcounts_in(bytes: &[u8], order: u32) -> impl Iterator<Item = (u64, u64)> {
    let len = (bytes.len() as u64 * 8) >> order;
    let refcount = move |number: u64| {
        if order < 3 {
            // The first has the lowest bits of a byte.
            let bit = number << order;
            let mask = (1 << (1 << order)) - 1;
            return u64::from(bytes[(bit / 8) as usize] >> (bit % 8)) & mask;
        }
        let len = 1 << (order - 3);
        let bytes = &bytes[number as usize * len..][..len];
        bytes
            .iter()
            .fold(0, |found, byte| (found << 8) | u64::from(*byte))
    };
    let all = (0..len).map(move |number| (number, refcount(number)));
    all.filter(|(_, refcount)| *refcount != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_are_read() {
        let bytes = [0b1000_0110, 0, 0, 1, 0, 0, 0, 0x80];
        let read = |order| refcounts_in(&bytes, order).collect::<Vec<_>>();
        assert_eq!(read(0), [(1, 1), (2, 1), (7, 1), (24, 1), (63, 1)]);
        assert_eq!(read(1), [(0, 2), (1, 1), (3, 2), (12, 1), (31, 2)]);
        assert_eq!(read(2), [(0, 6), (1, 8), (6, 1), (15, 8)]);
        assert_eq!(read(3), [(0, 0x86), (3, 1), (7, 0x80)]);
        assert_eq!(read(4), [(0, 0x8600), (1, 1), (3, 0x80)]);
        assert_eq!(read(5), [(0, 0x8600_0001), (1, 0x80)]);
        assert_eq!(read(6), [(0, 0x8600_0001_0000_0080)]);
    }
}
