//! A reader of qcow2 images that shares nothing with the filter's: it follows the
//! pointers of the file, as the specification (QEMU's `docs/interop/qcow2.txt`)
//! says, and knows of no fixed places. It panics where an image breaks the
//! specification, since the filter must not have accepted it.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::memory::Sparse;

/// Bits 9 to 55 of a pointer.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const DIRTY: u64 = 1 << 0;
const EXTENDED_L2: u64 = 1 << 4;
const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Bitmaps, and a data file that can be read by itself.
const KNOWN_AUTOCLEAR: u64 = 3;

/// Where the bytes of a subcluster are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// In the backing file.
    Base,
    Zero,
    /// From this offset of the file on.
    Data(u64),
}

pub struct Qcow2<'a> {
    file: &'a Sparse,
    cluster: u64,
    /// The disk's size.
    pub size: u64,
    l1: Range<u64>,
    refcount_table: Range<u64>,
    refcount_order: u32,
    /// As the filter leaves it: all tables are there, all bits are right, no data lies
    /// beyond the file's end.
    is_ours: bool,
    /// Refcounts may be wrong.
    is_dirty: bool,
}

fn u32_at(file: &Sparse, at: u64) -> u32 {
    u32::from_be_bytes(file.bytes(at))
}

fn u64_at(file: &Sparse, at: u64) -> u64 {
    u64::from_be_bytes(file.bytes(at))
}

impl<'a> Qcow2<'a> {
    /// An image as the filter leaves it.
    pub fn open(file: &'a Sparse) -> Self {
        let image = Self::open_foreign(file);
        assert_eq!(
            [u64_at(file, 72), u64_at(file, 80), u64_at(file, 88)],
            [EXTENDED_L2, 0, 0],
            "extended L2 entries, nothing else"
        );
        assert_eq!(image.refcount_order, 4, "refcounts of 16 bits");
        Qcow2 {
            is_ours: true,
            ..image
        }
    }

    /// An image as QEMU may leave it.
    pub fn open_foreign(file: &'a Sparse) -> Self {
        assert_eq!(file.bytes(0), *b"QFI\xfb", "magic");
        assert_eq!(u32_at(file, 4), 3, "version");
        assert_eq!(u32_at(file, 32), 0, "encryption");
        assert_eq!(u32_at(file, 60), 0, "snapshots");
        let features = u64_at(file, 72);
        assert_eq!(features & !DIRTY, EXTENDED_L2, "incompatible features");
        assert_eq!(u64_at(file, 80) & !LAZY_REFCOUNTS, 0, "compatible features");
        assert_eq!(u64_at(file, 88) & KNOWN_AUTOCLEAR, 0, "autoclear features");
        let refcount_order = u32_at(file, 96);
        assert!(refcount_order <= 6, "{refcount_order}");
        let cluster = 1 << u32_at(file, 20);
        let (l1, l1_size) = (u64_at(file, 40), u64::from(u32_at(file, 36)));
        let refcount_table = u64_at(file, 48);
        let refcount_table_len = u64::from(u32_at(file, 56)) * cluster;
        Qcow2 {
            file,
            cluster,
            size: u64_at(file, 24),
            l1: l1..l1 + 8 * l1_size,
            refcount_table: refcount_table..refcount_table + refcount_table_len,
            refcount_order,
            is_ours: false,
            is_dirty: features & DIRTY != 0,
        }
    }

    /// Where L2 table `number` is.
    fn l2_table(&self, number: u64) -> Option<u64> {
        let at = self.l1.start + 8 * number;
        assert!(self.l1.contains(&at), "L2 table {number} is missing");
        let pointer = u64_at(self.file, at);
        if pointer == 0 && !self.is_ours {
            return None;
        }
        Some(self.pointer(pointer, COPIED))
    }

    /// Where all of them are, with their numbers.
    fn l2_tables(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        (0..(self.l1.end - self.l1.start) / 8)
            .filter_map(|number| Some((number, self.l2_table(number)?)))
    }

    /// The bytes of the backing file's name.
    pub fn backing(&self) -> Vec<u8> {
        let mut name = vec![0; u32_at(self.file, 16) as usize];
        self.file.read(&mut name, u64_at(self.file, 8));
        name
    }

    /// The offset in a pointer that has `flags` and no other bits.
    fn pointer(&self, pointer: u64, flags: u64) -> u64 {
        let at = pointer & OFFSET;
        let found = pointer & !OFFSET;
        let is_right = found == flags || (found == 0 && !self.is_ours);
        assert!(is_right, "reserved bits in {pointer:#x}");
        assert_eq!(at % self.cluster, 0, "{pointer:#x} is not aligned");
        // What lies beyond the end is zeroes.
        let len = if self.is_ours { self.cluster } else { 1 };
        assert!(
            at != 0 && at + len <= self.file.len,
            "{pointer:#x} leads nowhere"
        );
        at
    }

    pub fn block(&self) -> u64 {
        self.cluster / 32
    }

    fn entries_per_table(&self) -> u64 {
        self.cluster / 16
    }

    /// What is said of the subcluster that holds the guest's byte at `offset`.
    pub fn lookup(&self, offset: u64) -> Found {
        let cluster = offset / self.cluster;
        let (table, index) = (
            cluster / self.entries_per_table(),
            cluster % self.entries_per_table(),
        );
        let Some(table) = self.l2_table(table) else {
            return Found::Base;
        };
        let entry = table + 16 * index;
        let (descriptor, bitmap) = (u64_at(self.file, entry), u64_at(self.file, entry + 8));
        let subcluster = offset % self.cluster / self.block();
        match (
            (bitmap >> subcluster) & 1,
            (bitmap >> (32 + subcluster)) & 1,
        ) {
            (0, 0) => Found::Base,
            (0, _) => Found::Zero,
            (_, 0) => Found::Data(self.pointer(descriptor, COPIED) + subcluster * self.block()),
            _ => panic!("{offset:#x} is data and zeroes: {bitmap:#x}"),
        }
    }

    /// Up to `limit` of the guest's clusters of which something is said.
    pub fn touched(&self, limit: usize) -> Vec<u64> {
        self.l2_tables()
            .flat_map(|(table, start)| {
                self.file
                    .pieces(start..start + self.cluster)
                    .map(move |(at, _)| table * self.entries_per_table() + (at - start) / 16)
            })
            .take(limit)
            .collect()
    }

    /// Every cluster of the file that is in use has the refcount 1, and with
    /// `leaks` false no other has one.
    pub fn check(&self, leaks: bool) {
        let mut used = BTreeSet::new();
        let mut take = |range: Range<u64>| {
            for cluster in range.start / self.cluster..range.end.div_ceil(self.cluster) {
                assert!(used.insert(cluster), "cluster {cluster} has two uses");
            }
        };
        let one = |at: u64| at..at + self.cluster;
        take(one(0));
        take(self.refcount_table.clone());
        // An L1 table of no entries may take a cluster.
        take(self.l1.start..self.l1.end.max(self.l1.start + 1));
        let mut refcount_blocks = Vec::new();
        for at in self.refcount_table.clone().step_by(8) {
            let block = match u64_at(self.file, at) {
                0 => None,
                pointer => Some(self.pointer(pointer, 0)),
            };
            if let Some(block) = block {
                take(one(block));
            }
            refcount_blocks.push(block);
        }
        for (_, table) in self.l2_tables() {
            take(one(table));
            for (_, entry) in self.file.pieces(one(table)) {
                let (descriptor, bitmap) = entry.split_at(8);
                let descriptor = u64::from_be_bytes(descriptor.try_into().expect("8 bytes"));
                let bitmap = u64::from_be_bytes(bitmap.try_into().expect("8 bytes"));
                assert_eq!(bitmap as u32 & (bitmap >> 32) as u32, 0, "both bits");
                match descriptor {
                    0 => assert_eq!(bitmap as u32, 0, "data nowhere"),
                    _ => take(one(self.pointer(descriptor, COPIED))),
                }
            }
        }
        if self.is_dirty {
            return;
        }
        let counted_by_one = (8 * self.cluster) >> self.refcount_order;
        for cluster in &used {
            let block = refcount_blocks.get((cluster / counted_by_one) as usize);
            let block = block.copied().flatten().expect("a block");
            let refcount = self.refcount(block, cluster % counted_by_one);
            assert_eq!(refcount, 1, "refcount of cluster {cluster}");
        }
        if leaks {
            return;
        }
        assert_eq!(self.refcount_order, 4);
        for (number, block) in (0..).zip(&refcount_blocks) {
            let Some(block) = block else { continue };
            for (at, refcounts) in self.file.pieces(one(*block)) {
                let first = number * counted_by_one + (at - block) / 2;
                for (cluster, refcount) in (first..).zip(refcounts.chunks_exact(2)) {
                    let leaked = refcount != [0, 0] && !used.contains(&cluster);
                    assert!(!leaked, "cluster {cluster} is leaked");
                }
            }
        }
    }

    /// Number `index` of those of a refcount block.
    fn refcount(&self, block: u64, index: u64) -> u64 {
        match self.refcount_order {
            // The first of a byte is in its lowest bits.
            order @ 0..3 => {
                let bits = index << order;
                let byte: [u8; 1] = self.file.bytes(block + bits / 8);
                (u64::from(byte[0]) >> (bits % 8)) & ((1 << (1 << order)) - 1)
            }
            order => {
                let len = 1 << (order - 3);
                let bytes = u64_at(self.file, block + index * len);
                bytes >> (64 - 8 * len)
            }
        }
    }
}
