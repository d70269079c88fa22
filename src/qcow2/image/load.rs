//! Reading an image that is there: every table is checked, and nothing is changed.

use std::ops::Range;
use std::panic::resume_unwind;
use std::thread;

use super::super::file::ImageFile;
use super::super::layout::{
    BLOCKS_PER_CLUSTER, ENTRY_LEN, Entry, GuestCluster, Layout, REFCOUNT_LEN, be_u64, has_data,
};
use super::group_set::GROUPS_PER_WORD;
use super::space::GROUP_TABLES_LEN;
use super::{CLUSTERS_PER_GROUP, ClusterSet, Image, Words};
use crate::buffer::{buffer, is_zero, push};
use crate::error::{Error, Result};
use crate::sync::{Mutex, locked};

/// How much of a table of pointers is read at once.
const LOAD_CHUNK: u64 = 64 << 10;
/// How many groups are looked at together: 64 KiB of L2 entries, which stay in the
/// processor's cache, and are little to read in vain where only one of them takes space.
const GROUPS_AT_ONCE: u64 = 64;
/// Bytes of a group's L2 entries, and of its refcounts.
const ENTRIES_LEN: usize = (CLUSTERS_PER_GROUP * ENTRY_LEN) as usize;
const REFCOUNTS_LEN: usize = (CLUSTERS_PER_GROUP * REFCOUNT_LEN) as usize;

impl<F: ImageFile> Image<F> {
    /// A table between `start` and `end` must have `wanted`, and nothing else.
    pub(super) fn expect_pointers(
        &self,
        name: &str,
        start: u64,
        end: u64,
        mut wanted: impl Iterator<Item = u64>,
    ) -> Result<()> {
        self.scan(start, end, |at, bytes| {
            for (i, found) in bytes.chunks_exact(8).enumerate() {
                let (found, wanted) = (be_u64(found, 0), wanted.next().unwrap_or(0));
                if found != wanted {
                    let at = at + 8 * i as u64;
                    return Err(self.name.refused(format!(
                        "its {name} was changed: at {at:#x} there is {found:#x}, not {wanted:#x}"
                    )));
                }
            }
            Ok(())
        })
    }

    /// Reads from `start` to `end`, by chunks.
    fn scan(
        &self,
        start: u64,
        end: u64,
        mut each: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut bytes = buffer((end - start).min(LOAD_CHUNK))?;
        let mut at = start;
        while at < end {
            let len = (end - at).min(LOAD_CHUNK);
            let chunk = &mut bytes[..len as usize];
            self.file
                .read_at(chunk, at)
                .map_err(|e| self.name.failed_at(e, "reading tables of", at, len))?;
            each(at, chunk)?;
            at += len;
        }
        Ok(())
    }

    /// Reads the L2 tables and the refcounts, and gives the words of each group
    /// that has any to `each`, in no order. EINVAL, with what is wrong and where, if there
    /// is an entry or a refcount that this filter would not have written.
    ///
    /// A cluster that has a refcount and no data (a crash between two writes leaves
    /// those) is set right by the next flush.
    pub fn load(&self, each: impl Fn(u64, &Words) -> Result<()> + Sync) -> Result<()> {
        self.expect_metadata_refcounts()?;
        let layout = self.layout;
        let unread = Mutex::new(Unread {
            layout,
            at: 0,
            end: (layout.data - layout.l2) / ENTRIES_LEN as u64,
            entries: 0,
            refcounts: 0,
        });
        let load_part = || {
            let mut part = Part::default();
            let loaded = self.load_part(&unread, &each, &mut part);
            loaded
                .map(|()| part)
                .inspect_err(|_| locked(&unread).at = u64::MAX)
        };
        let parts: Vec<_> = thread::scope(|scope| {
            let start = |_| thread::Builder::new().spawn_scoped(scope, load_part).ok();
            let others: Vec<_> = (1..threads(layout)).filter_map(start).collect();
            let here = load_part();
            let others = others.into_iter();
            let ended = others.map(|other| other.join().unwrap_or_else(|e| resume_unwind(e)));
            std::iter::once(here).chain(ended).collect()
        });
        let (mut used, mut leaks) = (Vec::new(), ClusterSet::new());
        let mut failed = Vec::new();
        for part in parts {
            match part {
                Ok(mut part) => {
                    used.push(part.used);
                    leaks.append(&mut part.leaks);
                }
                Err(error) => failed.push(error),
            }
        }
        // All that lies before the first mistake was looked at as well.
        if let Some((_, error)) = failed.into_iter().min_by_key(|(at, _)| *at) {
            return Err(error);
        }
        let mut writer = locked(&self.writer);
        // At once, from lists that are in order: one after the other takes ten times as long.
        writer.used = used.into_iter().flatten().collect();
        writer.leaks = leaks;
        if let Some(account) = &self.account {
            account.take_all_the_same(self.described.len() * GROUP_TABLES_LEN);
        }
        Ok(())
    }

    /// Reads groups as long as there are some that nobody else has read. An error comes
    /// with the number of the first group that was to be read.
    fn load_part(
        &self,
        unread: &Mutex<Unread>,
        each: &(impl Fn(u64, &Words) -> Result<()> + Sync),
        part: &mut Part,
    ) -> std::result::Result<(), (u64, Error)> {
        let at_start = |error| (0, error);
        let mut entries = buffer(GROUPS_AT_ONCE * ENTRIES_LEN as u64).map_err(at_start)?;
        let mut refcounts = buffer(GROUPS_AT_ONCE * REFCOUNTS_LEN as u64).map_err(at_start)?;
        loop {
            let groups = locked(unread).take(&self.file);
            if groups.is_empty() {
                return Ok(());
            }
            let count = (groups.end - groups.start) as usize;
            self.load_groups(
                groups.start,
                &mut entries[..count * ENTRIES_LEN],
                &mut refcounts[..count * REFCOUNTS_LEN],
                each,
                part,
            )
            .map_err(|error| (groups.start, error))?;
        }
    }

    /// Reads so many groups, from number `first` on, as the buffers are for.
    fn load_groups(
        &self,
        first: u64,
        entries: &mut [u8],
        refcounts: &mut [u8],
        each: &(impl Fn(u64, &Words) -> Result<()> + Sync),
        part: &mut Part,
    ) -> Result<()> {
        self.read_tables(first, entries, refcounts)?;
        let tables = entries
            .chunks_exact(ENTRIES_LEN)
            .zip(refcounts.chunks_exact(REFCOUNTS_LEN));
        for (group, (entries, refcounts)) in (first..).zip(tables) {
            if is_zero(entries) && is_zero(refcounts) {
                continue;
            }
            let tables = Tables {
                entries: entries.try_into().expect("a group of entries"),
                refcounts: refcounts.try_into().expect("a group of refcounts"),
            };
            let mut words = [0; CLUSTERS_PER_GROUP as usize];
            let counted = match tables.read(self.layout, group, &mut words) {
                Some(has_data) => has_data,
                None => self.look_closely(part, group, &tables)?,
            };
            if !is_zero(entries) {
                let bit = 1 << (group % GROUPS_PER_WORD);
                self.described.insert(group / GROUPS_PER_WORD, bit)?;
            }
            if counted != 0 {
                push(&mut part.used, (group, counted))?;
            }
            each(group, &words)?;
        }
        Ok(())
    }

    /// Reads the tables of the groups from number `first` on. Clusters that the last table
    /// describes, and that do not exist, get the refcount 0.
    fn read_tables(&self, first: u64, entries: &mut [u8], refcounts: &mut [u8]) -> Result<()> {
        let layout = self.layout;
        let cluster = GuestCluster(first * CLUSTERS_PER_GROUP);
        let left = layout.guest_clusters().saturating_sub(cluster.0);
        let existing = (left * REFCOUNT_LEN).min(refcounts.len() as u64);
        let (refcounts, others) = refcounts.split_at_mut(existing as usize);
        others.fill(0);
        for (what, bytes, at) in [
            ("tables", entries, layout.entry_at(cluster)),
            ("refcounts", refcounts, layout.refcount_at(cluster)),
        ] {
            self.file.read_at(bytes, at).map_err(|e| {
                let operation = format!("reading {what} of");
                self.name.failed_at(e, &operation, at, bytes.len() as u64)
            })?;
        }
        Ok(())
    }

    fn expect_metadata_refcounts(&self) -> Result<()> {
        let layout = self.layout;
        let end = layout.refcount_at(GuestCluster(0));
        let expect = |at: u64, bytes: &[u8], wanted: [u8; REFCOUNT_LEN as usize]| match bytes
            .chunks_exact(2)
            .position(|found| found != wanted)
        {
            None => Ok(()),
            Some(i) => Err(self.name.refused(format!(
                "a refcount at {:#x} is {:#x}, not {}",
                at + 2 * i as u64,
                u16::from_be_bytes([bytes[2 * i], bytes[2 * i + 1]]),
                wanted[1]
            ))),
        };
        self.scan(layout.refcount_blocks, end, |at, bytes| {
            expect(at, bytes, [0, 1])
        })?;
        let beyond = layout.refcount_at(GuestCluster(layout.guest_clusters()));
        self.scan(beyond, layout.l1, |at, bytes| expect(at, bytes, [0, 0]))
    }

    /// What the refcounts of a group say, where it is not plain: a bit for each cluster
    /// whose refcount is 1. Clusters that have it and no data are noted. EINVAL, with what
    /// is wrong and where.
    #[cold]
    fn look_closely(&self, part: &mut Part, group: u64, tables: &Tables<'_>) -> Result<u64> {
        let first = group * CLUSTERS_PER_GROUP;
        let entries = tables.entries.chunks_exact(ENTRY_LEN as usize);
        let refcounts = tables.refcounts.chunks_exact(REFCOUNT_LEN as usize);
        let (mut counted, mut leaked, mut described) = (0, 0, 0);
        for (i, (entry, refcount)) in entries.zip(refcounts).enumerate() {
            let entry = Entry::from_bytes(entry.try_into().expect("sixteen bytes"));
            let refcount = u16::from_be_bytes([refcount[0], refcount[1]]);
            self.expect_entry(GuestCluster(first + i as u64), entry, refcount)?;
            counted |= u64::from(refcount) << i;
            if refcount == 1 && !has_data(entry.bitmap) {
                match entry.descriptor {
                    0 => leaked |= 1 << i,
                    // It has to get another entry first.
                    _ => described |= 1 << i,
                }
            }
        }
        if leaked != 0 {
            part.leaks.insert(group, leaked);
        }
        if described != 0 {
            *locked(self.shard(group)).entry(group).or_default() |= described;
        }
        Ok(counted)
    }

    fn expect_entry(&self, cluster: GuestCluster, entry: Entry, refcount: u16) -> Result<()> {
        let layout = self.layout;
        let Entry { descriptor, bitmap } = entry;
        let (data, zero) = (bitmap as u32, (bitmap >> BLOCKS_PER_CLUSTER) as u32);
        let exists = cluster.0 < layout.guest_clusters();
        let is_ours = match descriptor {
            0 => data == 0 && refcount <= 1 && (exists || zero == 0),
            _ => exists && descriptor == layout.descriptor(cluster) && refcount == 1,
        };
        if is_ours && data & zero == 0 {
            return Ok(());
        }
        Err(self.name.refused(format!(
            "cluster {cluster} of the disk is not as this filter leaves it: its L2 entry at {:#x} \
             is {descriptor:#x} {bitmap:#x}, and its refcount {refcount}",
            layout.entry_at(cluster)
        )))
    }
}

/// What one thread has found, as [`Writer`](super::Writer) has it.
#[derive(Default)]
struct Part {
    used: Vec<(u64, u64)>,
    leaks: ClusterSet,
}

/// More than there are: nothing is gained where memory is the limit.
const MAX_THREADS: usize = 4;
/// Tables of which it takes a few milliseconds to read all, and no time to start a thread.
const TABLES_OF_ONE_THREAD: u64 = 16 << 20;

/// How many threads read the tables.
fn threads(layout: Layout) -> usize {
    match layout.data - layout.l2 {
        0..TABLES_OF_ONE_THREAD => 1,
        _ => thread::available_parallelism().map_or(1, |found| found.get().min(MAX_THREADS)),
    }
}

/// Groups that are still to be read: those from `at` to `end`.
struct Unread {
    layout: Layout,
    at: u64,
    end: u64,
    /// Neither the L2 entries of groups before this one take space, nor, in the next, the
    /// refcounts, but for groups before `at`.
    entries: u64,
    refcounts: u64,
}

impl Unread {
    /// Some that follow each other. Those whose tables take no space are passed over: they
    /// are all zeroes.
    fn take(&mut self, file: &impl ImageFile) -> Range<u64> {
        let layout = self.layout;
        let first = GuestCluster(0);
        for (known, start, end, len) in [
            (
                &mut self.entries,
                layout.entry_at(first),
                layout.data,
                ENTRIES_LEN as u64,
            ),
            (
                &mut self.refcounts,
                layout.refcount_at(first),
                layout.l1,
                REFCOUNTS_LEN as u64,
            ),
        ] {
            let at = self.at.saturating_mul(len).saturating_add(start);
            if *known <= self.at && at < end {
                *known = match file.next_stored(at).unwrap_or(at) {
                    stored if stored >= end => u64::MAX,
                    stored => stored.max(at).saturating_sub(start) / len,
                };
            }
        }
        let start = self.entries.min(self.refcounts).max(self.at).min(self.end);
        self.at = (start + GROUPS_AT_ONCE).min(self.end);
        start..self.at
    }
}

/// What the file says of one group.
struct Tables<'a> {
    entries: &'a [u8; ENTRIES_LEN],
    refcounts: &'a [u8; REFCOUNTS_LEN],
}

impl Tables<'_> {
    /// Fills in the words of a group that is plain, and tells which of its clusters have
    /// data, with a bit for each. Plain is what flushes leave: these clusters, and they
    /// alone, have a descriptor, which is the right one, and the refcount 1.
    ///
    /// Where much was written this is what opening takes its time for. So it goes without
    /// a branch: which clusters have data can't be foretold.
    fn read(&self, layout: Layout, group: u64, words: &mut Words) -> Option<u64> {
        let first = GuestCluster(group * CLUSTERS_PER_GROUP);
        let mut expected = layout.descriptor(first);
        let (mut wrong, mut have_data) = (0, 0);
        for (i, word) in words.iter_mut().enumerate() {
            let at = i * ENTRY_LEN as usize;
            let Entry { descriptor, bitmap } = Entry::from_bytes(
                self.entries[at..at + ENTRY_LEN as usize]
                    .try_into()
                    .expect("sixteen bytes"),
            );
            let at = i * REFCOUNT_LEN as usize;
            let refcount = u16::from_be_bytes([self.refcounts[at], self.refcounts[at + 1]]);
            // All ones, or all zeroes.
            let mask = u64::from(has_data(bitmap)).wrapping_neg();
            wrong |= descriptor ^ (expected & mask);
            wrong |= u64::from(refcount) ^ (mask & 1);
            wrong |= bitmap & (bitmap >> BLOCKS_PER_CLUSTER);
            *word = bitmap;
            have_data = (have_data >> 1) | (mask & (1 << 63));
            expected += layout.cluster_size();
        }
        // The last table describes clusters that the disk does not have.
        let existing = layout.guest_clusters().saturating_sub(first.0);
        let others = match existing {
            0..CLUSTERS_PER_GROUP => &self.entries[(existing * ENTRY_LEN) as usize..],
            _ => &[],
        };
        (wrong == 0 && is_zero(others)).then_some(have_data)
    }
}
