//! A reader of qcow2 images, written from the specification (`docs/interop/qcow2.txt`
//! of QEMU) and not from the code under test. It knows what an image with extended
//! L2 entries may hold that neither is compressed nor has snapshots, wherever that lies.

use std::collections::BTreeMap;
use std::ops::Range;

use super::content::{Content, SECTOR, Sector};

pub struct Reader<'a> {
    content: &'a Content,
    cluster: u64,
    size: u64,
    /// Its refcounts may be wrong.
    pub is_dirty: bool,
    /// Features of which nothing is left when the image is ours.
    pub other_features: (u64, u64),
    l1: Vec<u64>,
    l1_at: u64,
    refcount_order: u64,
    refcount_table: Vec<u64>,
    refcount_table_at: u64,
}

/// What is wrong with an image.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub errors: Vec<String>,
    /// Clusters in use whose refcount is not the number of their uses.
    pub miscounted: Vec<String>,
    /// The bit COPIED is missing.
    pub uncopied: Vec<String>,
    /// Clusters that are counted and not in use.
    pub leaks: Vec<u64>,
}

const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const DIRTY: u64 = 1 << 0;
const EXTENDED_L2: u64 = 1 << 4;
const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Bitmaps, and a data file that can be read by itself.
const KNOWN_AUTOCLEAR: u64 = 3;
const SUBCLUSTERS: u64 = 32;

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, byte| (n << 8) | u64::from(*byte))
}

impl Report {
    /// All but the leaks.
    pub fn all_errors(&self) -> String {
        let all = [&self.errors[..], &self.miscounted, &self.uncopied].concat();
        all.join("\n")
    }
}

impl<'a> Reader<'a> {
    pub fn open(content: &'a Content) -> Result<Self, String> {
        let header = content.bytes(0..112);
        let field = |at: usize, len: usize| number(&header[at..at + len]);
        for (name, found, wanted) in [
            ("magic", field(0, 4), 0x5146_49fb),
            ("version", field(4, 4), 3),
            ("crypt_method", field(32, 4), 0),
            ("nb_snapshots", field(60, 4), 0),
            ("incompatible_features", field(72, 8) & !DIRTY, EXTENDED_L2),
            ("compatible_features", field(80, 8) & !LAZY_REFCOUNTS, 0),
            ("autoclear_features", field(88, 8) & KNOWN_AUTOCLEAR, 0),
            ("header_length", field(100, 4), 112),
        ] {
            if found != wanted {
                return Err(format!("{name} is {found:#x}"));
            }
        }
        if field(96, 4) > 6 {
            return Err(format!("refcount_order is {:#x}", field(96, 4)));
        }
        let cluster = 1 << field(20, 4);
        let numbers = |at: u64, count: u64| -> Vec<u64> {
            let bytes = content.bytes(at..at + 8 * count);
            bytes.chunks(8).map(number).collect()
        };
        let (l1_at, refcount_table_at) = (field(40, 8), field(48, 8));
        Ok(Reader {
            content,
            cluster,
            size: field(24, 8),
            is_dirty: field(72, 8) & DIRTY != 0,
            other_features: (field(80, 8), field(88, 8)),
            refcount_order: field(96, 4),
            l1: numbers(l1_at, field(36, 4)),
            l1_at,
            refcount_table: numbers(refcount_table_at, field(56, 4) * cluster / 8),
            refcount_table_at,
        })
    }

    fn entries_per_table(&self) -> u64 {
        self.cluster / 16
    }

    fn subcluster(&self) -> u64 {
        self.cluster / SUBCLUSTERS
    }

    /// The descriptor and the bitmap of the cluster of the disk that holds `offset`.
    fn entry(&self, offset: u64) -> (u64, u64) {
        let cluster = offset / self.cluster;
        let (table, place) = (
            cluster / self.entries_per_table(),
            cluster % self.entries_per_table(),
        );
        let table = self.l1[table as usize] & OFFSET;
        if table == 0 {
            return (0, 0);
        }
        let entry = self
            .content
            .bytes(table + 16 * place..table + 16 * place + 16);
        (number(&entry[..8]), number(&entry[8..]))
    }

    /// The sector of the disk with that number, which lies within it. `None`: it is in
    /// the backing file.
    pub fn sector(&self, sector: u64) -> Option<Sector> {
        let offset = sector * SECTOR;
        assert!(offset < self.size, "within the disk");
        let (descriptor, bitmap) = self.entry(offset);
        let bit = offset % self.cluster / self.subcluster();
        let mut bytes = [0; SECTOR as usize];
        match ((bitmap >> bit) & 1, (bitmap >> (bit + SUBCLUSTERS)) & 1) {
            (0, 0) => return None,
            (0, _) => {}
            (_, _) => {
                let host = (descriptor & OFFSET) + offset % self.cluster;
                self.content.read(&mut bytes, host);
            }
        }
        Some(bytes)
    }

    /// Every L2 entry that is not empty: the number of the cluster of the disk, the
    /// descriptor, the bitmap.
    fn entries(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        let tables = (0..).zip(&self.l1).filter(|(_, table)| **table != 0);
        tables.flat_map(move |(n, table)| {
            let start = table & OFFSET;
            let present = self.content.present(start..start + self.cluster);
            present.flat_map(move |(at, sector)| {
                let first = n * self.entries_per_table() + (at - start) / 16;
                let entries = (first..).zip(sector.chunks(16));
                entries
                    .map(|(cluster, entry)| (cluster, number(&entry[..8]), number(&entry[8..])))
                    .filter(|entry| (entry.1, entry.2) != (0, 0))
            })
        })
    }

    /// Where the clusters of the disk lie in the file.
    pub fn places(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.entries()
            .filter(|(_, descriptor, _)| *descriptor != 0)
            .map(|(cluster, descriptor, _)| (cluster, descriptor & OFFSET))
    }

    /// The clusters of the disk that are not in the backing file as a whole.
    pub fn clusters(&self) -> impl Iterator<Item = u64> + '_ {
        self.entries().map(|(cluster, _, _)| cluster)
    }

    /// The sectors of a cluster of the disk, as [`Reader::sector`] has them.
    pub fn cluster(&self, cluster: u64) -> Vec<Option<Sector>> {
        let per_cluster = self.cluster / SECTOR;
        let sectors = cluster * per_cluster..(cluster + 1) * per_cluster;
        sectors
            .filter(|number| number * SECTOR < self.size)
            .map(|number| self.sector(number))
            .collect()
    }

    /// Where all that is not the disk lies in the file.
    pub fn metadata(&self) -> Vec<Range<u64>> {
        let table = |at: u64, numbers: &[u64]| at..at + 8 * numbers.len() as u64;
        let pointers = self.l1.iter().map(|table| table & OFFSET);
        let pointers = pointers.chain(self.refcount_table.iter().copied());
        [
            0..self.cluster,
            table(self.refcount_table_at, &self.refcount_table),
            table(self.l1_at, &self.l1),
        ]
        .into_iter()
        .chain(
            pointers
                .filter(|at| *at != 0)
                .map(|at| at..at + self.cluster),
        )
        .collect()
    }

    /// The numbers of all subclusters that are not in the backing file.
    pub fn subclusters(&self) -> impl Iterator<Item = u64> + '_ {
        self.entries().flat_map(|(cluster, _, bitmap)| {
            (0..SUBCLUSTERS)
                .filter(move |bit| ((bitmap >> bit) | (bitmap >> (bit + SUBCLUSTERS))) & 1 != 0)
                .map(move |bit| cluster * SUBCLUSTERS + bit)
        })
    }

    /// Every rule that `qemu-img check` knows and some more.
    pub fn check(&self) -> Report {
        let mut report = Report::default();
        let mut used: BTreeMap<u64, u64> = BTreeMap::new();
        let cluster = self.cluster;
        let size = self.content.size;
        let mut need = |at: u64, len: u64, end: u64, errors: &mut Vec<String>| {
            if at % cluster != 0 || end > size {
                errors.push(format!("something is said to lie at {at:#x}"));
            }
            for number in at / cluster..(at + len).div_ceil(cluster) {
                *used.entry(number).or_default() += 1;
            }
        };
        let errors = &mut report.errors;
        for Range { start, end } in self.metadata() {
            need(start, end - start, end, errors);
        }
        for table in self.l1.iter().filter(|table| **table != 0) {
            let bad = format!("an L1 entry is {table:#x}");
            if table & COPIED == 0 {
                report.uncopied.push(bad);
            } else if table & !(COPIED | OFFSET) != 0 {
                errors.push(bad);
            }
        }
        for (number, descriptor, bitmap) in self.entries() {
            let bad = |what| format!("cluster {number}: {what}: {descriptor:#x} {bitmap:#x}");
            let at = descriptor & OFFSET;
            if descriptor != 0 {
                // What lies beyond the end is zeroes.
                need(at, cluster, at + 1, errors);
                if descriptor & COPIED == 0 {
                    report.uncopied.push(bad("COPIED"));
                }
                if descriptor & !(COPIED | OFFSET) != 0 || at == 0 {
                    errors.push(bad("bits of the descriptor"));
                }
            }
            if bitmap as u32 & (bitmap >> SUBCLUSTERS) as u32 != 0 {
                errors.push(bad("a subcluster both ways"));
            }
            if descriptor == 0 && bitmap as u32 != 0 {
                errors.push(bad("data that is nowhere"));
            }
            if number * cluster >= self.size {
                errors.push(bad("beyond the disk"));
            }
        }
        let counted = self.refcounts();
        for (number, uses) in &used {
            if *uses != 1 {
                errors.push(format!("host cluster {number} has {uses} uses"));
            }
            let count = counted.get(number).copied().unwrap_or_default();
            if count != *uses {
                let what = format!("host cluster {number} has {uses} uses, refcount {count}");
                report.miscounted.push(what);
            }
        }
        let unused = counted.keys().filter(|number| !used.contains_key(number));
        report.leaks = unused.copied().collect();
        report
    }

    /// The refcounts that are not 0, by host cluster.
    fn refcounts(&self) -> BTreeMap<u64, u64> {
        let order = self.refcount_order;
        let per_block = (8 * self.cluster) >> order;
        let per_sector = (8 * SECTOR) >> order;
        let blocks = (0..).zip(&self.refcount_table);
        let blocks = blocks.filter(|(_, block)| **block != 0);
        let counts = blocks.flat_map(|(n, block)| {
            let present = self.content.present(*block..block + self.cluster);
            present.flat_map(move |(at, sector)| {
                let first = n * per_block + (at - block) / SECTOR * per_sector;
                let counts = (0..per_sector).map(move |i| refcount(sector, order, i as usize));
                (first..).zip(counts)
            })
        });
        counts.filter(|(_, count)| *count != 0).collect()
    }
}

/// Refcount number `index` of those in `bytes`. The first of a byte is in its lowest bits.
fn refcount(bytes: &[u8], order: u64, index: usize) -> u64 {
    match order {
        0..3 => {
            let bits = 1 << order;
            let shift = index * bits % 8;
            u64::from(bytes[index * bits / 8] >> shift) & ((1 << bits) - 1)
        }
        _ => {
            let len = 1 << (order - 3);
            number(&bytes[index * len..(index + 1) * len])
        }
    }
}
