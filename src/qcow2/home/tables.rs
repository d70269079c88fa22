//! The tables of an image that is brought home: changed where they lie, or written anew.

use std::ops::Range;

use super::super::file::ImageFile;
use super::super::header::Tables;
use super::super::layout::{
    COPIED, ENTRY_LEN, Entry, GuestCluster, Layout, MAX_REFCOUNT_TABLE_LEN, POINTER_LEN,
    REFCOUNT_LEN, has_data,
};
use super::hosts::{HostCluster, HostSet, ranges};
use super::io::{Io, Source};
use super::survey::Findings;
use crate::buffer::{buffer, list};
use crate::error::Result;

/// How many refcounts are written at once.
const REFCOUNTS: u64 = 1 << 16;
const SECTOR: usize = 512;

/// Writes a refcount for each of `clusters`, which are in ascending order. The refcount blocks
/// are at home.
pub fn write_refcounts<F: ImageFile>(
    io: Io<'_, F>,
    layout: Layout,
    clusters: impl Iterator<Item = HostCluster>,
    refcount: u16,
) -> Result<()> {
    for range in ranges(clusters) {
        for first in (range.start.0..range.end.0).step_by(REFCOUNTS as usize) {
            let count = (range.end.0 - first).min(REFCOUNTS);
            let bytes = refcount.to_be_bytes().repeat(count as usize);
            io.write(&bytes, layout.refcount_blocks + first * REFCOUNT_LEN)?;
        }
    }
    Ok(())
}

/// Makes the header lead to `tables`, in one write of a sector.
pub fn switch_to<F: ImageFile>(io: Io<'_, F>, tables: Tables) -> Result<()> {
    let mut sector = [0; SECTOR];
    io.read(&mut sector, 0)?;
    tables.put_into(&mut sector);
    io.write(&sector, 0)
}

/// A copy of all tables that lies beyond everything else, and where each part of it is. Scratch
/// clusters are between them.
pub struct TemporaryTables {
    l1: u64,
    /// As in [`Findings`].
    pub l2: Vec<u64>,
    pub scratch: HostCluster,
    refcount_table: u64,
    refcount_table_clusters: u64,
    /// The number of each block, and its offset.
    refcount_blocks: Vec<(u64, u64)>,
    /// What has a refcount.
    pub counted: HostSet,
    pub end: u64,
}

impl TemporaryTables {
    /// Finds the places, from `start` on. `counted` is what has a refcount beside the tables
    /// themselves. `None`: there would have to be more refcounts than QEMU reads.
    pub fn place(
        layout: Layout,
        l2: &[u64],
        start: HostCluster,
        scratch: u64,
        mut counted: HostSet,
    ) -> Result<Option<Self>> {
        let size = layout.cluster_size();
        let l1 = start.0 * size;
        let mut at = l1 + (layout.l2_tables() * POINTER_LEN).div_ceil(size) * size;
        let l2 = list(l2.iter().map(|table| match table {
            0 => 0,
            _ => {
                at += size;
                at - size
            }
        }))?;
        let scratch_at = HostCluster(at / size);
        let refcount_table = at + scratch * size;
        // Refcount blocks count themselves too, so their number is found step by step.
        let per_block = size / REFCOUNT_LEN;
        let block_of = |cluster: HostCluster| cluster.0 / per_block;
        let mut below: Vec<_> = list(counted.iter().map(block_of).chain([0]))?;
        below.sort_unstable();
        below.dedup();
        let (mut blocks, mut table_clusters) = (below.clone(), 1);
        let end = loop {
            let end = refcount_table / size + table_clusters + blocks.len() as u64;
            let own = block_of(start)..end.div_ceil(per_block);
            let table_len = own.end * POINTER_LEN;
            let needed = table_len.div_ceil(size);
            let mut wanted = below.clone();
            wanted.extend(own);
            wanted.sort_unstable();
            wanted.dedup();
            if needed <= table_clusters && wanted.len() <= blocks.len() {
                break end;
            }
            (blocks, table_clusters) = (wanted, needed.max(table_clusters));
        };
        if table_clusters * size > MAX_REFCOUNT_TABLE_LEN || i64::try_from(end * size).is_err() {
            return Ok(None);
        }
        counted.insert(HostCluster(0));
        counted.insert_all((start.0..end).map(HostCluster));
        let blocks_at = refcount_table + table_clusters * size;
        let places = (0..).map(|i| blocks_at + i * size);
        Ok(Some(TemporaryTables {
            l1,
            l2,
            scratch: scratch_at,
            refcount_table,
            refcount_table_clusters: table_clusters,
            refcount_blocks: list(blocks.into_iter().zip(places))?,
            counted,
            end: end * size,
        }))
    }

    /// Writes it, and makes the header lead to it. It is on the disk when this returns.
    pub fn write<F: ImageFile>(&self, io: Io<'_, F>, found: &Findings) -> Result<()> {
        let layout = found.layout;
        let pointers = self.l2.iter().map(|table| match table {
            0 => 0,
            table => COPIED | table,
        });
        io.write(&list(pointers.flat_map(u64::to_be_bytes))?, self.l1)?;
        self.write_l2_tables(io, found)?;
        self.write_refcounts(io, layout)?;
        io.sync()?;
        switch_to(
            io,
            Tables {
                l1_size: layout.l2_tables(),
                l1: self.l1,
                refcount_table: self.refcount_table,
                refcount_table_clusters: self.refcount_table_clusters,
                ..Tables::at_home(layout)
            },
        )?;
        io.sync()
    }

    fn write_l2_tables<F: ImageFile>(&self, io: Io<'_, F>, found: &Findings) -> Result<()> {
        let layout = found.layout;
        let mut table = buffer(layout.cluster_size())?;
        let mut source = Source::new(io, found.len);
        for (number, (from, to)) in (0..).zip(found.l2.iter().zip(&self.l2)) {
            if *from == 0 || !source.read(&mut table, *from)? {
                continue;
            }
            let first = number * (layout.cluster_size() / ENTRY_LEN);
            for (guest, bytes) in (first..).zip(table.chunks_exact_mut(ENTRY_LEN as usize)) {
                let entry = Entry::from_bytes((&*bytes).try_into().expect("sixteen bytes"));
                let bitmap = entry.bitmap & layout.valid_bits(GuestCluster(guest));
                let descriptor = match has_data(bitmap) {
                    true => entry.descriptor | COPIED,
                    false => 0,
                };
                bytes.copy_from_slice(&Entry { descriptor, bitmap }.to_bytes());
            }
            io.write(&table, *to)?;
        }
        Ok(())
    }

    fn write_refcounts<F: ImageFile>(&self, io: Io<'_, F>, layout: Layout) -> Result<()> {
        let size = layout.cluster_size();
        let mut table = buffer(self.refcount_table_clusters * size)?;
        let mut bytes = buffer(size)?;
        let per_block = size / REFCOUNT_LEN;
        for (number, at) in &self.refcount_blocks {
            table[(number * POINTER_LEN) as usize..][..POINTER_LEN as usize]
                .copy_from_slice(&at.to_be_bytes());
            let first = number * per_block;
            let described = HostCluster(first)..HostCluster(first + per_block);
            bytes.fill(0);
            for Range { start, end } in self.counted.ranges_in(described) {
                for cluster in start.0..end.0 {
                    let place = &mut bytes[((cluster - first) * REFCOUNT_LEN) as usize..];
                    place[..REFCOUNT_LEN as usize].copy_from_slice(&1u16.to_be_bytes());
                }
            }
            io.write(&bytes, *at)?;
        }
        io.write(&table, self.refcount_table)
    }

    /// Writes the tables at home, where nothing lies any more, and makes the header lead to
    /// them. `used` is what has to have a refcount.
    pub fn install<F: ImageFile>(
        &self,
        io: Io<'_, F>,
        layout: Layout,
        used: &HostSet,
    ) -> Result<()> {
        io.clear(layout.refcount_table..layout.data)?;
        for (at, table) in layout.new_tables() {
            io.write(&table, at)?;
        }
        write_refcounts(io, layout, used.iter(), 1)?;
        let size = layout.cluster_size();
        for (number, from) in (0..).zip(&self.l2) {
            if *from != 0 {
                io.copy(*from, layout.l2 + number * size, size)?;
            }
        }
        io.sync()?;
        switch_to(io, Tables::at_home(layout))?;
        io.sync()
    }
}
