//! Where everything lies in the image, and what its numbers look like as bytes.
//!
//! The source of the format is the specification that comes with QEMU,
//! `docs/interop/qcow2.txt`; field names here are those of its header table. All
//! numbers are big-endian.
//!
//! # The layout
//!
//! With clusters of *C* bytes, 32 blocks each, and a disk of *n* clusters:
//!
//! | from | clusters | what |
//! |---|---|---|
//! | 0 | 1 | header, header extensions, backing file name |
//! | refcount table | as many as it needs | the offset of every refcount block |
//! | refcount blocks | one for *C* / 2 clusters of the file | 16 bits a cluster |
//! | L1 | as many as it needs | the offset of every L2 table |
//! | L2 | one for *C* / 16 clusters of the disk, and one at least | 16 bytes a cluster: [`Entry`] |
//! | D | *n* | the disk: guest offset *g* lies at D + *g* |
//!
//! All of it follows from the disk's size and the block size, and nothing of it
//! is ever allocated or moved. The tables of one kind lie one behind the other,
//! so an L2 entry, or a refcount, is found by multiplication alone.

use std::fmt;

use crate::block::BlockSize;
use crate::error::{Error, Result};

/// Subclusters, which are our blocks, in a cluster: fixed by the format.
pub const BLOCKS_PER_CLUSTER: u64 = 32;
/// The largest block: a cluster has at most 2 MiB.
const MAX_BLOCK: u64 = 64 << 10;
/// Bytes of a refcount: `refcount_order` 4.
pub const REFCOUNT_LEN: u64 = 2;
/// Bytes of an L2 entry in an image with extended L2 entries.
pub const ENTRY_LEN: u64 = 16;
/// Bytes of an entry of the L1 table and of the refcount table.
pub const POINTER_LEN: u64 = 8;
/// The unit of a disk's size in QEMU, which does not see what is beyond the last
/// whole one.
pub const SECTOR: u64 = 512;

/// OFLAG_COPIED: the refcount of what this points to is exactly 1.
pub const COPIED: u64 = 1 << 63;

/// What QEMU opens at most: 32 MiB of L1 table, 8 MiB of refcount table.
pub const MAX_L1_LEN: u64 = 32 << 20;
pub const MAX_REFCOUNT_TABLE_LEN: u64 = 8 << 20;

/// A cluster of the disk, counted from the disk's start. One word of the block
/// map, and one L2 entry, describe one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct GuestCluster(pub u64);

/// Offsets in the file, in bytes; see the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    block_size: BlockSize,
    disk_size: u64,
    pub refcount_table: u64,
    pub refcount_blocks: u64,
    pub l1: u64,
    pub l2: u64,
    pub data: u64,
    /// Where the last cluster of the disk ends: the file's length.
    pub end: u64,
}

impl Layout {
    /// The layout for a disk of `disk_size` bytes. EINVAL if the format can't hold
    /// it: a block size outside 512 to 64K, or a disk that needs larger tables
    /// than QEMU reads.
    pub fn new(disk_size: u64, block_size: BlockSize) -> Result<Self> {
        let block = block_size.bytes();
        if !(512..=MAX_BLOCK).contains(&block) {
            return Err(Error::new(
                libc::EINVAL,
                format!(
                    "cow-block-size={block} can't be used with cow-overlay: \
                     a qcow2 image has blocks of 512 to 64K"
                ),
            ));
        }
        let cluster = block * BLOCKS_PER_CLUSTER;
        let data_clusters = disk_size.div_ceil(cluster);
        // One at least: QEMU does not like an L1 table that is nowhere, and takes the
        // cluster of an empty one for leaked.
        let l2_tables = data_clusters.div_ceil(cluster / ENTRY_LEN).max(1);
        let l1_clusters = (l2_tables * POINTER_LEN).div_ceil(cluster);

        // Refcount blocks count themselves too, so their number is found step by step.
        let mut blocks = 1;
        let (table_clusters, end_cluster) = loop {
            let table_clusters = (blocks * POINTER_LEN).div_ceil(cluster);
            let end = 1 + table_clusters + blocks + l1_clusters + l2_tables + data_clusters;
            let needed = end.div_ceil(cluster / REFCOUNT_LEN);
            if needed <= blocks {
                break (table_clusters, end);
            }
            blocks = needed;
        };

        let end = end_cluster.checked_mul(cluster);
        let fits = l2_tables * POINTER_LEN <= MAX_L1_LEN
            && table_clusters * cluster <= MAX_REFCOUNT_TABLE_LEN
            && end.is_some_and(|end| i64::try_from(end).is_ok());
        let Some(end) = end.filter(|_| fits) else {
            let largest = BlockSize::new(MAX_BLOCK).expect("a power of two");
            let helps = block < MAX_BLOCK && Layout::new(disk_size, largest).is_ok();
            let hint = if helps {
                ": use a larger cow-block-size (at most 64K)"
            } else {
                ""
            };
            return Err(Error::new(
                libc::EINVAL,
                format!(
                    "a disk of {disk_size} bytes is too large for a qcow2 image with \
                     blocks of {block}{hint}"
                ),
            ));
        };
        let refcount_table = cluster;
        let refcount_blocks = refcount_table + table_clusters * cluster;
        let l1 = refcount_blocks + blocks * cluster;
        let l2 = l1 + l1_clusters * cluster;
        Ok(Layout {
            block_size,
            disk_size,
            refcount_table,
            refcount_blocks,
            l1,
            l2,
            data: l2 + l2_tables * cluster,
            end,
        })
    }

    pub fn block_size(self) -> BlockSize {
        self.block_size
    }

    /// The disk's exact size in bytes.
    pub fn disk_size(self) -> u64 {
        self.disk_size
    }

    /// The disk's size as QEMU sees it.
    pub fn virtual_size(self) -> u64 {
        self.disk_size.next_multiple_of(SECTOR)
    }

    pub fn cluster_size(self) -> u64 {
        self.block_size.bytes() * BLOCKS_PER_CLUSTER
    }

    /// How many clusters the disk has.
    pub fn guest_clusters(self) -> u64 {
        (self.end - self.data) / self.cluster_size()
    }

    /// How many clusters lie before the disk's first: all that is not the disk.
    pub fn metadata_clusters(self) -> u64 {
        self.data / self.cluster_size()
    }

    pub fn l2_tables(self) -> u64 {
        (self.data - self.l2) / self.cluster_size()
    }

    pub fn refcount_block_count(self) -> u64 {
        (self.l1 - self.refcount_blocks) / self.cluster_size()
    }

    /// Where the L2 entry of `cluster` lies.
    pub fn entry_at(self, cluster: GuestCluster) -> u64 {
        self.l2 + cluster.0 * ENTRY_LEN
    }

    /// Where the refcount of the host cluster that holds `cluster` lies.
    pub fn refcount_at(self, cluster: GuestCluster) -> u64 {
        self.refcount_blocks + (self.metadata_clusters() + cluster.0) * REFCOUNT_LEN
    }

    /// The descriptor of an L2 entry whose cluster has data.
    pub fn descriptor(self, cluster: GuestCluster) -> u64 {
        COPIED | (self.data + cluster.0 * self.cluster_size())
    }

    /// The L1 table: a pointer to each L2 table.
    pub fn l1_entries(self) -> impl Iterator<Item = u64> {
        (0..self.l2_tables()).map(move |n| COPIED | (self.l2 + n * self.cluster_size()))
    }

    /// The refcount table: a pointer to each refcount block.
    pub fn refcount_table_entries(self) -> impl Iterator<Item = u64> {
        (0..self.refcount_block_count())
            .map(move |n| self.refcount_blocks + n * self.cluster_size())
    }

    /// The tables of an image in which nothing was written yet, each with its offset. What
    /// lies between them is zero.
    pub fn new_tables(self) -> [(u64, Vec<u8>); 3] {
        let be = |numbers: &mut dyn Iterator<Item = u64>| -> Vec<u8> {
            // Not by bytes, which takes four times as long: for 1P these are 9 MiB.
            let mut bytes = Vec::new();
            for number in numbers {
                bytes.extend_from_slice(&number.to_be_bytes());
            }
            bytes
        };
        let ones = 1u16.to_be_bytes().repeat(self.metadata_clusters() as usize);
        [
            (self.refcount_table, be(&mut self.refcount_table_entries())),
            (self.refcount_blocks, ones),
            (self.l1, be(&mut self.l1_entries())),
        ]
    }

    /// The bits of `cluster`'s word that stand for blocks of the disk, *data* and
    /// *zero*; those beyond the disk's end are always 0 in the file.
    pub fn valid_bits(self, cluster: GuestCluster) -> u64 {
        let first = cluster.0 * BLOCKS_PER_CLUSTER;
        let blocks = self.block_size.count(self.disk_size).0;
        let valid = blocks.saturating_sub(first).min(BLOCKS_PER_CLUSTER);
        let bits = (1u64 << valid) - 1;
        bits | (bits << BLOCKS_PER_CLUSTER)
    }

    /// The L2 entry of `cluster`, where the block map has `word` for it.
    pub fn entry(self, cluster: GuestCluster, word: u64) -> Entry {
        let bitmap = word & self.valid_bits(cluster);
        let has_data = has_data(bitmap);
        Entry {
            descriptor: if has_data {
                self.descriptor(cluster)
            } else {
                0
            },
            bitmap,
        }
    }
}

/// Whether a word of the block map has a block that is *data*.
pub fn has_data(word: u64) -> bool {
    word as u32 != 0
}

/// An extended L2 entry. The bitmap is a word of the block map: bits 0-31 say
/// that a subcluster is allocated, bits 32-63 that it reads as zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    pub descriptor: u64,
    pub bitmap: u64,
}

impl Entry {
    pub fn to_bytes(self) -> [u8; ENTRY_LEN as usize] {
        let mut bytes = [0; ENTRY_LEN as usize];
        bytes[..8].copy_from_slice(&self.descriptor.to_be_bytes());
        bytes[8..].copy_from_slice(&self.bitmap.to_be_bytes());
        bytes
    }

    pub fn from_bytes(bytes: &[u8; ENTRY_LEN as usize]) -> Self {
        Entry {
            descriptor: be_u64(bytes, 0),
            bitmap: be_u64(bytes, 8),
        }
    }
}

/// The big-endian number at `offset` of `bytes`, which are long enough.
pub fn be_u64(bytes: &[u8], offset: usize) -> u64 {
    u64::from_be_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}

/// As [`be_u64`].
pub fn be_u32(bytes: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
}

impl fmt::Display for GuestCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(disk_size: u64, block: u64) -> Result<Layout> {
        Layout::new(disk_size, BlockSize::new(block).expect("a block size"))
    }

    #[test]
    fn parts_follow_each_other_and_every_cluster_has_a_refcount() {
        for block in [512, 4096, 65536] {
            for size in [0, 1, 512, 65536, 1 << 30, (1 << 40) + 512, (1 << 44) - 1] {
                let layout = layout(size, block).expect("fits");
                let cluster = layout.cluster_size();
                let parts = [
                    layout.refcount_table,
                    layout.refcount_blocks,
                    layout.l1,
                    layout.l2,
                    layout.data,
                    layout.end,
                ];
                assert!(parts.is_sorted(), "{layout:?}");
                assert!(parts.iter().all(|part| part % cluster == 0), "{layout:?}");
                let counted = layout.refcount_block_count() * cluster / REFCOUNT_LEN;
                assert!(counted * cluster >= layout.end, "{layout:?}");
                let described = layout.l2_tables() * cluster / ENTRY_LEN;
                assert!(described >= layout.guest_clusters(), "{layout:?}");
                assert!(layout.guest_clusters() * cluster >= size);
            }
        }
    }

    #[test]
    fn a_1t_disk_at_4k_has_the_tables_that_it_should() {
        let layout = layout(1 << 40, 4096).expect("fits");
        assert_eq!(layout.cluster_size(), 128 << 10);
        assert_eq!(layout.guest_clusters(), 8 << 20);
        assert_eq!(layout.l2_tables(), 1024);
        assert_eq!(layout.refcount_block_count(), 129);
        assert_eq!(layout.data, (1 + 1 + 129 + 1 + 1024) * (128 << 10));
    }

    #[test]
    fn what_the_format_can_not_hold_is_refused() {
        for block in [131_072, 1 << 20, 1 << 31] {
            let refused = layout(1 << 20, block).expect_err("too large a block");
            assert!(refused.to_string().contains("512 to 64K"), "{refused}");
        }
        assert!(layout(64 << 40, 512).is_ok());
        assert!(layout(4 << 50, 4096).is_ok());
        // A larger block is named where it helps.
        for (size, block, helps) in [
            ((64 << 40) + 1, 512, true),
            ((4 << 50) + 1, 4096, true),
            (i64::MAX as u64, 4096, false),
            (i64::MAX as u64, 65536, false),
        ] {
            let refused = layout(size, block).expect_err("too large").to_string();
            assert!(refused.contains("too large"), "{refused}");
            assert_eq!(refused.contains("use a larger"), helps, "{refused}");
        }
    }

    #[test]
    fn an_entry_has_a_descriptor_if_it_has_data() {
        let layout = layout(1 << 30, 4096).expect("fits");
        let cluster = GuestCluster(3);
        let zeroes = layout.entry(cluster, 0xffff_ffff_0000_0000);
        assert_eq!(zeroes.descriptor, 0);
        let mixed = layout.entry(cluster, 0x0000_0002_0000_0001);
        assert_eq!(
            mixed.descriptor,
            (1 << 63) | (layout.data + 3 * layout.cluster_size())
        );
        assert_eq!(mixed.bitmap, 0x0000_0002_0000_0001);
        assert_eq!(Entry::from_bytes(&mixed.to_bytes()), mixed);
    }

    #[test]
    fn nothing_is_said_of_blocks_beyond_the_end() {
        let layout = layout(128 * 1024 + 5000, 4096).expect("fits");
        let all = 0xffff_ffff_0000_0000;
        assert_eq!(layout.entry(GuestCluster(0), all).bitmap, all);
        assert_eq!(layout.entry(GuestCluster(1), all).bitmap, 3 << 32);
        assert_eq!(layout.entry(GuestCluster(2), all).bitmap, 0);
    }
}
