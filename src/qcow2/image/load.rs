//! Reading an image that is there: every table is checked, and nothing is changed.

use super::super::file::ImageFile;
use super::super::layout::{
    BLOCKS_PER_CLUSTER, ENTRY_LEN, Entry, GuestCluster, REFCOUNT_LEN, be_u64, has_data,
};
use super::{CLUSTERS_PER_GROUP, Image, Words, Writer};
use crate::buffer::{buffer, is_zero};
use crate::error::Result;
use crate::sync::locked;

/// How much of the L2 tables is read at once when an image is opened.
const LOAD_CHUNK: u64 = 1 << 20;

impl<F: ImageFile> Image<F> {
    /// A table between `start` and `end` must have `wanted`, and nothing else.
    pub(super) fn expect_pointers(
        &self,
        name: &str,
        start: u64,
        end: u64,
        wanted: impl Iterator<Item = u64>,
    ) -> Result<()> {
        let mut wanted = wanted.chain(std::iter::repeat(0));
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
    /// that has any to `each`. EINVAL, with what is wrong and where, if there is an
    /// entry or a refcount that this filter would not have written.
    ///
    /// A cluster that has a refcount and no data (a crash between two writes leaves
    /// those) is set right by the next flush.
    pub fn load(&self, mut each: impl FnMut(u64, &Words) -> Result<()>) -> Result<()> {
        self.expect_metadata_refcounts()?;
        let layout = self.layout;
        let group_len = CLUSTERS_PER_GROUP * ENTRY_LEN;
        let mut writer = locked(&self.writer);
        let mut refcounts = buffer(LOAD_CHUNK / ENTRY_LEN * REFCOUNT_LEN)?;
        self.scan(layout.l2, layout.data, |at, entries| {
            let first = GuestCluster((at - layout.l2) / ENTRY_LEN);
            let refcounts = self.refcounts_from(first, entries, &mut refcounts)?;
            let groups = entries.chunks(group_len as usize).zip(
                refcounts
                    .chunks((CLUSTERS_PER_GROUP * REFCOUNT_LEN) as usize)
                    .chain(std::iter::repeat(&[][..])),
            );
            for (i, (entries, refcounts)) in groups.enumerate() {
                if is_zero(entries) && is_zero(refcounts) {
                    continue;
                }
                let group = first.0 / CLUSTERS_PER_GROUP + i as u64;
                let (words, counted) = self.check_group(group, entries, refcounts)?;
                if !is_zero(entries) {
                    self.note_described(group);
                }
                if counted != 0 {
                    writer.used.insert(group, counted);
                    self.note_leaks(&mut writer, group, entries, counted, &words);
                }
                each(group, &words)?;
            }
            Ok(())
        })
    }

    /// The refcounts of the clusters from `first` on that `entries` describe: fewer
    /// at the disk's end, where the last table describes clusters that do not exist.
    fn refcounts_from<'a>(
        &self,
        first: GuestCluster,
        entries: &[u8],
        buf: &'a mut [u8],
    ) -> Result<&'a [u8]> {
        let described = entries.len() as u64 / ENTRY_LEN;
        let left = self.layout.guest_clusters().saturating_sub(first.0);
        let buf = &mut buf[..(described.min(left) * REFCOUNT_LEN) as usize];
        let at = self.layout.refcount_at(first);
        self.file.read_at(buf, at).map_err(|e| {
            self.name
                .failed_at(e, "reading refcounts of", at, buf.len() as u64)
        })?;
        Ok(buf)
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
                "a refcount at {:#x} is {:#x}, not {}: run qemu-img check -r all",
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

    /// The words of a group, and which of its clusters have a refcount.
    fn check_group(&self, group: u64, entries: &[u8], refcounts: &[u8]) -> Result<(Words, u64)> {
        let mut words = [0; CLUSTERS_PER_GROUP as usize];
        let mut counted = 0;
        for (i, bytes) in entries.chunks_exact(ENTRY_LEN as usize).enumerate() {
            let cluster = GuestCluster(group * CLUSTERS_PER_GROUP + i as u64);
            let entry = Entry::from_bytes(bytes.try_into().expect("sixteen bytes"));
            let refcount = refcounts
                .chunks_exact(REFCOUNT_LEN as usize)
                .nth(i)
                .map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
            self.check_entry(cluster, entry, refcount)?;
            words[i] = entry.bitmap;
            counted |= u64::from(refcount) << i;
        }
        Ok((words, counted))
    }

    fn check_entry(&self, cluster: GuestCluster, entry: Entry, refcount: u16) -> Result<()> {
        let layout = self.layout;
        let at = layout.entry_at(cluster);
        let refused = |what: String| {
            Err(self.name.refused(format!(
                "cluster {cluster} of the disk is not as this filter leaves it: {what}"
            )))
        };
        let Entry { descriptor, bitmap } = entry;
        let (data, zero) = (bitmap as u32, (bitmap >> BLOCKS_PER_CLUSTER) as u32);
        if descriptor != 0 && descriptor != layout.descriptor(cluster) {
            return refused(format!(
                "its L2 entry at {at:#x} leads to {descriptor:#x}, not to {:#x} \
                 (another program has written to the image)",
                layout.descriptor(cluster)
            ));
        }
        if data & zero != 0 || (descriptor == 0 && data != 0) {
            return refused(format!(
                "its bitmap at {:#x} is {bitmap:#x}, with the descriptor {descriptor:#x}",
                at + 8
            ));
        }
        let exists = cluster.0 < layout.guest_clusters();
        if !exists && (descriptor, bitmap) != (0, 0) {
            return refused(format!(
                "it lies beyond the disk's end; its L2 entry is at {at:#x}"
            ));
        }
        let is_right = match descriptor {
            0 => refcount <= 1,
            _ => refcount == 1,
        };
        if !is_right {
            return refused(format!(
                "its refcount at {:#x} is {refcount}: run qemu-img check -r all",
                layout.refcount_at(cluster)
            ));
        }
        Ok(())
    }

    /// Notes the clusters of a group that have a refcount and no data. Those whose entry
    /// leads to them all the same have to get another entry first.
    fn note_leaks(
        &self,
        writer: &mut Writer,
        group: u64,
        entries: &[u8],
        counted: u64,
        words: &Words,
    ) {
        let (mut leaked, mut described) = (0, 0);
        for (i, entry) in entries.chunks_exact(ENTRY_LEN as usize).enumerate() {
            if (counted >> i) & 1 != 0 && !has_data(words[i]) {
                match be_u64(entry, 0) {
                    0 => leaked |= 1 << i,
                    _ => described |= 1 << i,
                }
            }
        }
        if leaked != 0 {
            writer.leaks.insert(group, leaked);
        }
        if described != 0 {
            *locked(self.shard(group)).entry(group).or_default() |= described;
        }
    }
}
