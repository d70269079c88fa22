//! Changes to an image as QEMU makes them while the filter does not use it: clusters and
//! tables move, and refcounts follow. It finds its way by the pointers of the file.
//!
//! The file may be broken: other edits come before. Then nothing is done, or what is done
//! to it makes no sense either.

use crate::memory::Sparse;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
/// An image that has more of something is left alone: the fuzzer's time is for others.
const MANY: u64 = 4096;

#[derive(Debug, Clone, Copy)]
pub enum Change {
    /// Writes to blocks of a cluster of the disk.
    Write { guest: u64, blocks: u32 },
    /// Zeroes over a whole one. It keeps its place or not.
    Zero { guest: u64, keeps: bool },
    /// One of those that have a place, to the first free one from `from` on.
    Move { which: u64, from: u64 },
    /// Two of those that have a place have each other's.
    Swap { which: [u64; 2] },
    /// A table moves, to the first free place from `from` on.
    MoveTable { table: Metadata, from: u64 },
    /// Another width of refcounts.
    Amend { refcount_order: u32 },
    /// `qemu-img commit`.
    Empty,
    /// It is written to with lazy refcounts, and may not be closed.
    Lazy { is_dirty: bool },
}

#[derive(Debug, Clone, Copy)]
pub enum Metadata {
    L1,
    L2(u64),
    RefcountTable,
    RefcountBlock(u64),
}

pub struct Qemu<'a> {
    file: &'a mut Sparse,
    cluster: u64,
}

impl<'a> Qemu<'a> {
    /// `None`: it is no such image, or too large.
    pub fn open(file: &'a mut Sparse) -> Option<Self> {
        let bits = u32::from_be_bytes(file.bytes(20));
        let is_image = file.bytes(0) == *b"QFI\xfb" && (14..=21).contains(&bits);
        let image = is_image.then(|| Qemu {
            file,
            cluster: 1 << (bits & 31),
        })?;
        let is_small = image.l1_size() <= MANY
            && image.refcount_table_clusters() * image.cluster / 8 <= 8 * MANY
            && image.order() <= 6
            && image.number(24, 8) <= 1 << 40
            && image.file.len <= 1 << 44;
        is_small.then_some(image)
    }

    fn number(&self, at: u64, width: usize) -> u64 {
        let mut bytes = [0; 8];
        if at < u64::MAX - 8 {
            self.file.read(&mut bytes[8 - width..], at);
        }
        u64::from_be_bytes(bytes)
    }

    fn put(&mut self, value: u64, at: u64, width: usize) -> Option<()> {
        (at < 1 << 48).then(|| self.file.write(&value.to_be_bytes()[8 - width..], at))
    }

    fn l1_size(&self) -> u64 {
        self.number(36, 4)
    }

    fn l1(&self) -> u64 {
        self.number(40, 8)
    }

    fn refcount_table(&self) -> u64 {
        self.number(48, 8)
    }

    fn refcount_table_clusters(&self) -> u64 {
        self.number(56, 4)
    }

    fn order(&self) -> u64 {
        self.number(96, 4)
    }

    /// Where the L2 entries are that lead to a cluster of the file, of the first few.
    fn entries(&self) -> Vec<u64> {
        let tables = (0..self.l1_size()).map(|i| self.number(self.l1().saturating_add(8 * i), 8));
        tables
            .map(|table| table & OFFSET)
            .filter(|table| *table != 0)
            .flat_map(|table| self.file.pieces(table..table + self.cluster))
            .filter(|(_, entry)| entry[..8] != [0; 8])
            .map(|(at, _)| at)
            .take(64)
            .collect()
    }

    fn guest(&self, number: u64) -> Option<u64> {
        number.checked_rem(self.number(24, 8).div_ceil(self.cluster))
    }

    /// Where the refcount of a cluster of the file lies, and how far its byte is to be
    /// shifted to the right for it.
    fn refcount_place(&self, host: u64) -> Option<(u64, u64)> {
        let per_block = (8 * self.cluster) >> self.order();
        let number = host / per_block;
        if number >= self.refcount_table_clusters() * self.cluster / 8 {
            return None;
        }
        let block = self.number(self.refcount_table().checked_add(8 * number)?, 8);
        let bits = (host % per_block) << self.order();
        (block != 0).then_some((block.checked_add(bits / 8)?, bits % 8))
    }

    fn mask(&self) -> u64 {
        match self.order() {
            0..3 => (1 << (1 << self.order())) - 1,
            _ => u64::MAX,
        }
    }

    fn width(&self) -> usize {
        match self.order() {
            0..3 => 1,
            order => 1 << (order - 3),
        }
    }

    fn refcount(&self, host: u64) -> u64 {
        let place = self.refcount_place(host);
        place.map_or(0, |(at, shift)| {
            (self.number(at, self.width()) >> shift) & self.mask()
        })
    }

    fn set_refcount(&mut self, host: u64, count: u64) -> Option<()> {
        if self.refcount_place(host).is_none() {
            self.add_refcount_block(host)?;
        }
        let (at, shift) = self.refcount_place(host)?;
        let old = self.number(at, self.width());
        let new = (old & !(self.mask() << shift)) | (count << shift);
        self.put(new, at, self.width())
    }

    /// For `host`, which is about to be used, as a few behind it may be. It lies in one of
    /// the other clusters that it counts, which are all free.
    fn add_refcount_block(&mut self, host: u64) -> Option<()> {
        let per_block = (8 * self.cluster) >> self.order();
        let number = host / per_block;
        let first = number * per_block;
        let place = match first + 64 {
            place if (host..host + 64).contains(&place) => first,
            place => place,
        };
        if number >= self.refcount_table_clusters() * self.cluster / 8 {
            return None;
        }
        self.clear(place)?;
        let entry = self.refcount_table().checked_add(8 * number)?;
        self.put(place * self.cluster, entry, 8)?;
        self.set_refcount(place, 1)
    }

    fn clear(&mut self, host: u64) -> Option<()> {
        let at = host.checked_mul(self.cluster)?;
        let zeroes = vec![0; self.cluster as usize];
        (at < 1 << 48).then(|| self.file.write(&zeroes, at))
    }

    /// Takes `count` free clusters in a row, at or behind `from`.
    fn take(&mut self, from: u64, count: u64) -> Option<u64> {
        let end = self.file.len / self.cluster + 64;
        let mut first = from % end;
        let mut tries = 0;
        while let Some(used) = (0..count).rev().find(|i| self.refcount(first + i) != 0) {
            first += used + 1;
            tries += 1;
            if tries == MANY {
                return None;
            }
        }
        for host in first..first + count {
            self.set_refcount(host, 1)?;
        }
        Some(first)
    }

    fn give_back(&mut self, at: u64) -> Option<()> {
        self.set_refcount(at / self.cluster, 0)
    }

    /// Where the L2 entry of a cluster lies. Its table is made if there is none.
    fn entry(&mut self, guest: u64) -> Option<u64> {
        let per_table = self.cluster / 16;
        let table = guest / per_table;
        if table >= self.l1_size() {
            return None;
        }
        let pointer = self.l1().checked_add(8 * table)?;
        if self.number(pointer, 8) == 0 {
            let place = self.take(0, 1)?;
            self.clear(place)?;
            self.put(COPIED | (place * self.cluster), pointer, 8)?;
        }
        let table = self.number(pointer, 8) & OFFSET;
        Some(table + 16 * (guest % per_table))
    }

    fn copy(&mut self, from: u64, to: u64, len: u64) -> Option<()> {
        let mut bytes = vec![0; usize::try_from(len.min(MANY * self.cluster)).ok()?];
        self.file.read(&mut bytes, from);
        (to < 1 << 48).then(|| self.file.write(&bytes, to))
    }

    /// `None`: not or not all of it was done.
    pub fn change(&mut self, change: Change) -> Option<()> {
        match change {
            Change::Write { blocks: 0, .. } => None,
            Change::Write { guest, blocks } => {
                let guest = self.guest(guest)?;
                let entry = self.entry(guest)?;
                let mut host = self.number(entry, 8);
                if host == 0 {
                    host = COPIED | (self.take(0, 1)? * self.cluster);
                }
                let bitmap = self.number(entry + 8, 8);
                let blocks = u64::from(blocks);
                let seed = (guest as u8 | 1).to_be_bytes();
                for block in (0..32).filter(|block| (blocks >> block) & 1 != 0) {
                    let at = (host & OFFSET) + block * self.cluster / 32;
                    (at < 1 << 48).then(|| self.file.write(&seed.repeat(512), at))?;
                }
                self.put(host, entry, 8)?;
                self.put((bitmap | blocks) & !(blocks << 32), entry + 8, 8)
            }
            Change::Zero { guest, keeps } => {
                let guest = self.guest(guest)?;
                let entry = self.entry(guest)?;
                let host = self.number(entry, 8) & OFFSET;
                self.put(0xffff_ffff << 32, entry + 8, 8)?;
                if host != 0 && !keeps {
                    self.put(0, entry, 8)?;
                    self.give_back(host)?;
                }
                Some(())
            }
            Change::Move { which, from } => {
                let entry = among(&self.entries(), which)?;
                let old = self.number(entry, 8) & OFFSET;
                let new = self.take(from, 1)? * self.cluster;
                self.copy(old, new, self.cluster)?;
                self.put(COPIED | new, entry, 8)?;
                self.give_back(old)
            }
            Change::Swap { which: [a, b] } => {
                let entries = self.entries();
                self.swap(among(&entries, a)?, among(&entries, b)?)
            }
            Change::MoveTable { table, from } => self.move_table(table, from),
            Change::Amend { refcount_order } => self.amend(refcount_order),
            Change::Empty => self.empty(),
            Change::Lazy { is_dirty } => {
                let incompatible = self.number(72, 8);
                self.put(1, 80, 8)?;
                self.put(incompatible | u64::from(is_dirty), 72, 8)
            }
        }
    }

    /// Of two L2 entries.
    fn swap(&mut self, a: u64, b: u64) -> Option<()> {
        let (of_a, of_b) = (self.number(a, 8), self.number(b, 8));
        let (at_a, at_b) = (of_a & OFFSET, of_b & OFFSET);
        let mut bytes = vec![0; self.cluster as usize];
        self.file.read(&mut bytes, at_a);
        self.copy(at_b, at_a, self.cluster)?;
        (at_b < 1 << 48).then(|| self.file.write(&bytes, at_b))?;
        self.put(of_b, a, 8)?;
        self.put(of_a, b, 8)
    }

    fn move_table(&mut self, table: Metadata, from: u64) -> Option<()> {
        let blocks = self.refcount_table_clusters() * self.cluster / 8;
        let (pointer, len) = match table {
            Metadata::L1 => (40, (8 * self.l1_size()).div_ceil(self.cluster)),
            Metadata::RefcountTable => (48, self.refcount_table_clusters()),
            Metadata::L2(number) => {
                let number = number.checked_rem(self.l1_size())?;
                (self.l1().checked_add(8 * number)?, 1)
            }
            Metadata::RefcountBlock(number) => {
                let number = number.checked_rem(blocks)?;
                (self.refcount_table().checked_add(8 * number)?, 1)
            }
        };
        let old = self.number(pointer, 8);
        let at = old & OFFSET;
        if at == 0 || len == 0 {
            return None;
        }
        let new = self.take(from, len)? * self.cluster;
        self.copy(at, new, len * self.cluster)?;
        self.put((old & COPIED) | new, pointer, 8)?;
        for i in 0..len {
            self.give_back(at + i * self.cluster)?;
        }
        Some(())
    }

    /// The clusters of the file that are counted.
    fn counted(&self) -> Vec<u64> {
        let end = self.file.len.div_ceil(self.cluster) + 128;
        let per_block = (8 * self.cluster) >> self.order();
        let mut counted = Vec::new();
        let mut host = 0;
        while host < end {
            match self.refcount_place(host) {
                None => host = (host / per_block + 1) * per_block,
                Some(_) => {
                    counted.extend((self.refcount(host) != 0).then_some(host));
                    host += 1;
                }
            }
        }
        counted
    }

    /// New blocks and a new table, beyond the end, and the old ones are free.
    fn amend(&mut self, order: u32) -> Option<()> {
        let end = self.file.len.div_ceil(self.cluster);
        if end > 2 * MANY || self.refcount_table_clusters() == 0 {
            return None;
        }
        let table = self.refcount_table() / self.cluster;
        let mut old: Vec<u64> = (table..table + self.refcount_table_clusters()).collect();
        for entry in 0..self.refcount_table_clusters() * self.cluster / 8 {
            let block = self.number(self.refcount_table().checked_add(8 * entry)?, 8);
            old.extend((block != 0).then_some(block / self.cluster));
        }
        let mut counted = self.counted();
        counted.retain(|host| !old.contains(host));
        self.clear(end)?;
        self.put(end * self.cluster, 48, 8)?;
        self.put(1, 56, 4)?;
        self.put(order.into(), 96, 4)?;
        counted.push(end);
        for host in counted {
            if self.refcount_place(host).is_some() {
                self.set_refcount(host, 1)?;
                continue;
            }
            let per_block = (8 * self.cluster) >> order;
            let block = self.file.len.div_ceil(self.cluster);
            self.clear(block)?;
            let entry = end * self.cluster + 8 * (host / per_block);
            self.put(block * self.cluster, entry, 8)?;
            self.set_refcount(host, 1)?;
            self.set_refcount(block, 1)?;
        }
        Some(())
    }

    /// The tables are made anew, at the beginning, and the file ends behind them.
    fn empty(&mut self) -> Option<()> {
        let l1_clusters = (8 * self.l1_size()).div_ceil(self.cluster);
        let table_clusters = self.refcount_table_clusters();
        let end = 2 + table_clusters + l1_clusters;
        if end > 64 {
            return None;
        }
        for host in 1..end {
            self.clear(host)?;
        }
        self.file.set_len(end * self.cluster);
        self.put(self.cluster, 48, 8)?;
        self.put((1 + table_clusters) * self.cluster, self.cluster, 8)?;
        self.put((2 + table_clusters) * self.cluster, 40, 8)?;
        for host in 0..end {
            self.set_refcount(host, 1)?;
        }
        Some(())
    }
}

fn among(places: &[u64], which: u64) -> Option<u64> {
    let which = which.checked_rem(places.len() as u64)?;
    Some(places[which as usize])
}
