//! Images as other programs leave them: where each thing lies is the test's choice.
//! Written from the specification (`docs/interop/qcow2.txt` of QEMU) and not with the
//! code under test, of which only the header's extensions and the home of each thing
//! are taken.

use std::collections::{BTreeMap, BTreeSet};

use nbdkit_cow_filter::qcow2::layout::Layout;

use super::content::{Content, SECTOR, Sector};
use super::disk::{layout, new_image};
use super::random::Random;

const COPIED: u64 = 1 << 63;
const DIRTY: u64 = 1 << 0;
const EXTENDED_L2: u64 = 1 << 4;
const LAZY_REFCOUNTS: u64 = 1 << 0;

/// A cluster of the disk.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cluster {
    /// As the L2 entry has it: *data* below, *zero* above.
    pub bitmap: u64,
    /// The number of the cluster of the file that it has.
    pub host: Option<u64>,
}

/// Places are numbers of clusters of the file.
#[derive(Debug, Clone)]
pub struct Foreign {
    pub size: u64,
    pub block: u64,
    pub refcount_order: u32,
    pub is_dirty: bool,
    pub has_lazy_refcounts: bool,
    pub autoclear_features: u64,
    pub refcount_table: u64,
    pub refcount_table_clusters: u64,
    /// By their numbers.
    pub refcount_blocks: BTreeMap<u64, u64>,
    pub l1: u64,
    pub l1_size: u64,
    /// By their numbers; the others are not there.
    pub l2: BTreeMap<u64, u64>,
    pub clusters: BTreeMap<u64, Cluster>,
    /// Clusters that are counted and not in use.
    pub leaks: BTreeSet<u64>,
    /// Refcounts that are wrong.
    pub miscounted: BTreeMap<u64, u64>,
    /// Clusters of the disk whose COPIED bit is missing.
    pub uncopied: BTreeSet<u64>,
    /// Clusters that hold bytes that nobody needs. So do the blocks without data of
    /// clusters with data.
    pub garbage: BTreeSet<u64>,
    /// It is so long at least.
    pub length: u64,
}

/// What the disk has in a block that is *data*: in each sector something else.
pub fn data(number: u64) -> Sector {
    let mut random = Random::new(number);
    let mut bytes = [0; SECTOR as usize];
    for piece in bytes.chunks_mut(8) {
        piece.copy_from_slice(&random.next().to_be_bytes());
    }
    bytes
}

impl Foreign {
    pub fn layout(&self) -> Layout {
        layout(self.size, self.block)
    }

    pub fn cluster_size(&self) -> u64 {
        32 * self.block
    }

    /// The number of the cluster at `offset` of the file.
    fn number(&self, offset: u64) -> u64 {
        offset / self.cluster_size()
    }

    pub fn home(&self, guest: u64) -> u64 {
        self.number(self.layout().data) + guest
    }

    pub fn guest_clusters(&self) -> u64 {
        self.layout().guest_clusters()
    }

    /// The first cluster behind all homes.
    pub fn end(&self) -> u64 {
        self.number(self.layout().end)
    }

    pub fn entries_per_table(&self) -> u64 {
        self.cluster_size() / 16
    }

    pub fn refcounts_per_block(&self) -> u64 {
        (8 * self.cluster_size()) >> self.refcount_order
    }

    /// One in which nothing was written yet, as the filter makes it.
    pub fn new(size: u64, block: u64) -> Self {
        let layout = layout(size, block);
        let number = |offset: u64| offset / layout.cluster_size();
        let following = |offset: u64, count: u64| (0..count).map(move |n| (n, number(offset) + n));
        Foreign {
            size,
            block,
            refcount_order: 4,
            is_dirty: false,
            has_lazy_refcounts: false,
            autoclear_features: 0,
            refcount_table: number(layout.refcount_table),
            refcount_table_clusters: number(layout.refcount_blocks - layout.refcount_table),
            refcount_blocks: following(layout.refcount_blocks, layout.refcount_block_count())
                .collect(),
            l1: number(layout.l1),
            l1_size: layout.l2_tables(),
            l2: following(layout.l2, layout.l2_tables()).collect(),
            clusters: BTreeMap::new(),
            leaks: BTreeSet::new(),
            miscounted: BTreeMap::new(),
            uncopied: BTreeSet::new(),
            garbage: BTreeSet::new(),
            length: layout.end,
        }
    }

    /// As `qemu-img commit` leaves it (QEMU 10): refcount table, one refcount block, L1
    /// table, without any L2 table, and the file ends there.
    pub fn emptied(size: u64, block: u64) -> Self {
        let mut image = Self::new(size, block);
        let l1_clusters = (8 * image.l1_size).div_ceil(image.cluster_size());
        image.refcount_table = 1;
        image.refcount_blocks = BTreeMap::from([(0, 1 + image.refcount_table_clusters)]);
        image.l1 = 2 + image.refcount_table_clusters;
        image.l2 = BTreeMap::new();
        image.length = (image.l1 + l1_clusters) * image.cluster_size();
        image
    }

    /// The clusters in use, in order.
    pub fn used(&self) -> Vec<u64> {
        let l1_clusters = (8 * self.l1_size).div_ceil(self.cluster_size());
        let table = self.refcount_table..self.refcount_table + self.refcount_table_clusters;
        let mut used: Vec<u64> = [0]
            .into_iter()
            .chain(table)
            .chain(self.refcount_blocks.values().copied())
            .chain(self.l1..self.l1 + l1_clusters)
            .chain(self.l2.values().copied())
            .chain(self.clusters.values().filter_map(|cluster| cluster.host))
            .collect();
        used.sort_unstable();
        let count = used.len();
        used.dedup();
        assert_eq!(used.len(), count, "nothing has two uses: {self:?}");
        used
    }

    /// Has a refcount block for each cluster that is in use or leaked. New ones are where
    /// QEMU puts them: in the first cluster that they count, if it is free.
    pub fn cover(&mut self) {
        loop {
            let used: BTreeSet<u64> = self.used().into_iter().chain(self.leaks.clone()).collect();
            let per_block = self.refcounts_per_block();
            let missing = used
                .iter()
                .map(|number| number / per_block)
                .find(|block| !self.refcount_blocks.contains_key(block));
            let Some(missing) = missing else { break };
            let mut place = missing * per_block;
            while used.contains(&place) {
                place += 1;
            }
            self.refcount_blocks.insert(missing, place);
        }
    }

    pub fn is_covered(&self, number: u64) -> bool {
        let block = number / self.refcounts_per_block();
        self.refcount_blocks.contains_key(&block)
    }

    /// The lowest free cluster, which is the one that QEMU takes.
    pub fn free(&self) -> u64 {
        let used: BTreeSet<u64> = self.used().into_iter().chain(self.leaks.clone()).collect();
        let mut free = 0;
        while used.contains(&free) {
            free += 1;
        }
        free
    }

    /// What QEMU does for a write to blocks of a cluster.
    pub fn write(&mut self, guest: u64, blocks: u32) {
        self.need_table(guest);
        let mut cluster = self.clusters.get(&guest).copied().unwrap_or_default();
        if cluster.host.is_none() {
            cluster.host = Some(self.free());
        }
        let (data, zero) = (cluster.bitmap as u32, (cluster.bitmap >> 32) as u32);
        cluster.bitmap = u64::from(data | blocks) | (u64::from(zero & !blocks) << 32);
        self.clusters.insert(guest, cluster);
        self.cover();
    }

    fn need_table(&mut self, guest: u64) {
        let table = guest / self.entries_per_table();
        if !self.l2.contains_key(&table) {
            let free = self.free();
            self.l2.insert(table, free);
            self.cover();
        }
    }

    /// What QEMU does for zeroes over a whole cluster: it keeps the cluster of the file,
    /// or not.
    pub fn zero(&mut self, guest: u64, keeps: bool) {
        self.need_table(guest);
        let cluster = self.clusters.entry(guest).or_default();
        cluster.bitmap = u64::from(u32::MAX) << 32;
        if !keeps {
            self.garbage.extend(cluster.host.take());
        }
    }

    pub fn content(&self) -> Content {
        let cluster_size = self.cluster_size();
        let mut content = Content::default();
        content.write(&new_image(self.size, self.block).bytes(0..cluster_size), 0);
        content.size = self.length.max(cluster_size);
        for number in &self.garbage {
            for at in (number * cluster_size..(number + 1) * cluster_size).step_by(512) {
                content.write(&data(!at), at);
            }
        }
        self.write_header(&mut content);
        self.write_refcounts(&mut content);
        self.write_tables(&mut content);
        for (guest, cluster) in &self.clusters {
            if let Some(host) = cluster.host {
                self.write_cluster(&mut content, *guest, host, cluster.bitmap as u32);
            }
        }
        content
    }

    fn write_header(&self, content: &mut Content) {
        let mut put = |at: u64, bytes: &[u8]| content.write(bytes, at);
        let cluster_size = self.cluster_size();
        put(36, &(self.l1_size as u32).to_be_bytes());
        put(40, &(self.l1 * cluster_size).to_be_bytes());
        put(48, &(self.refcount_table * cluster_size).to_be_bytes());
        put(56, &(self.refcount_table_clusters as u32).to_be_bytes());
        let incompatible = EXTENDED_L2 | if self.is_dirty { DIRTY } else { 0 };
        put(72, &incompatible.to_be_bytes());
        let compatible = if self.has_lazy_refcounts {
            LAZY_REFCOUNTS
        } else {
            0
        };
        put(80, &compatible.to_be_bytes());
        put(88, &self.autoclear_features.to_be_bytes());
        put(96, &self.refcount_order.to_be_bytes());
    }

    fn write_refcounts(&self, content: &mut Content) {
        let cluster_size = self.cluster_size();
        let empty = vec![0; cluster_size as usize];
        let table = self.refcount_table * cluster_size;
        for n in 0..self.refcount_table_clusters {
            content.write(&empty, table + n * cluster_size);
        }
        let mut blocks: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        for (n, block) in &self.refcount_blocks {
            let entry = (block * cluster_size).to_be_bytes();
            assert!(8 * n < self.refcount_table_clusters * cluster_size);
            content.write(&entry, table + 8 * n);
            blocks.insert(*n, empty.clone());
        }
        let ones = self.used().into_iter().chain(self.leaks.iter().copied());
        let mut counts: BTreeMap<u64, u64> = ones.map(|number| (number, 1)).collect();
        counts.extend(&self.miscounted);
        let per_block = self.refcounts_per_block();
        for (number, count) in counts {
            let block = blocks.get_mut(&(number / per_block));
            let block = block.unwrap_or_else(|| panic!("cluster {number} is not covered"));
            let index = (number % per_block) as usize;
            match self.refcount_order {
                // The first is in the lowest bits.
                0..3 => {
                    let bits = index << self.refcount_order;
                    block[bits / 8] |= (count as u8) << (bits % 8);
                }
                order => {
                    let len = 1 << (order - 3);
                    let bytes = &count.to_be_bytes()[8 - len..];
                    block[index * len..(index + 1) * len].copy_from_slice(bytes);
                }
            }
        }
        for (n, bytes) in blocks {
            content.write(&bytes, self.refcount_blocks[&n] * cluster_size);
        }
    }

    fn write_tables(&self, content: &mut Content) {
        let cluster_size = self.cluster_size();
        let empty = vec![0; cluster_size as usize];
        let l1 = self.l1 * cluster_size;
        for n in 0..(8 * self.l1_size).div_ceil(cluster_size) {
            content.write(&empty, l1 + n * cluster_size);
        }
        for (n, table) in &self.l2 {
            let entry = COPIED | (table * cluster_size);
            content.write(&entry.to_be_bytes(), l1 + 8 * n);
            content.write(&empty, table * cluster_size);
        }
        for (guest, cluster) in &self.clusters {
            let copied = if self.uncopied.contains(guest) {
                0
            } else {
                COPIED
            };
            let descriptor = cluster
                .host
                .map_or(0, |host| copied | (host * cluster_size));
            let table = self.l2[&(guest / self.entries_per_table())] * cluster_size;
            let at = table + 16 * (guest % self.entries_per_table());
            content.write(&descriptor.to_be_bytes(), at);
            content.write(&cluster.bitmap.to_be_bytes(), at + 8);
        }
    }

    fn write_cluster(&self, content: &mut Content, guest: u64, host: u64, blocks: u32) {
        let (start, of_disk) = (host * self.cluster_size(), guest * self.cluster_size());
        if blocks == 0 {
            // It had data once.
            content.size = content.size.max(start + self.cluster_size());
        }
        let last_block = blocks.checked_ilog2();
        for at in (0..self.cluster_size()).step_by(SECTOR as usize) {
            let block = at / self.block;
            // QEMU writes no further than the guest does.
            if last_block.is_none_or(|last| block > u64::from(last)) {
                break;
            }
            let number = (of_disk + at) / SECTOR;
            if number * SECTOR >= self.size {
                break;
            }
            let bytes = match (blocks >> block) & 1 {
                0 => data(!number),
                _ => data(number),
            };
            content.write(&bytes, start + at);
        }
    }
}
