//! An image: made, checked, written to, flushed.
//!
//! # What is where, and when
//!
//! The block map in memory is what counts while the image is served. The file
//! has the same map as L2 entries, as it was at the last flush. Data goes to its
//! fixed place at once, where nobody looks for it until an entry says so.
//!
//! # The order of writes
//!
//! A flush
//!
//! 1. takes the clusters that have changed since the last one, and looks at their
//!    words in the block map: what it sees now is what it writes in 4;
//! 2. writes a refcount of 1 for each that has data and had none (and, the first time,
//!    which export it is);
//! 3. syncs: the data that the words speak of, and the refcounts;
//! 4. writes the L2 entries;
//! 5. syncs (those entries, at least);
//! 6. writes a refcount of 0 for each that has no data any more.
//!
//! Whatever of it a crash leaves undone:
//!
//! - An entry in the file says *data* only after 3, and a block becomes *data* in
//!   the map only after its bytes were written: so those bytes are there, and
//!   never is a hole taken for a block.
//! - A cluster with an entry has the refcount 1, because 3 is before 4 and 5 before
//!   6. A refcount without an entry is a leak, which loses nothing; the next flush
//!   of the next program that opens the image makes up for it ([`Image::load`]).
//! - Entries are 16 bytes and do not straddle a sector, so each is old or new.
//! - A discard punches its hole before its flush. Until 5 the file's entry may
//!   still say *data*, and a crash then leaves zeroes, as the discard wanted.
//!
//! # No change is missed
//!
//! A block that becomes *data* or *zero* is changed in the map and marked as
//! changed under one hold of a lock, which a flush takes to fetch the marks. So a
//! request that finds a block in the state that it wants, and does nothing, is
//! covered too: whoever brought the block there marked it in the same hold, and
//! a flush that is asked for later fetches that mark (or an earlier flush has).
//!
//! # Locks
//!
//! `turn` (with its condition variable) decides who flushes and is held for
//! moments only; `writer` is held through a flush, by the one whose turn it is;
//! a shard of `changes` is the innermost of all: it is held while the block map
//! changes, which takes no lock, and nothing else is taken under it. So is a shard of
//! `reserved`, held while the file system takes space. Writers of data take their
//! stripe before a shard, a flush takes no stripe.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use super::file::ImageFile;
use super::header::{Header, hash_of_export};
use super::layout::{
    BLOCKS_PER_CLUSTER, ENTRY_LEN, Entry, GuestCluster, Layout, REFCOUNT_LEN, be_u64, has_data,
};
use crate::buffer::{buffer, is_zero};
use crate::error::{Error, Result};
use crate::sync::{Condvar, Mutex, MutexGuard};

/// Changes are kept for so many clusters together, 1 KiB of L2 entries: a leaf
/// of the block map.
pub const CLUSTERS_PER_GROUP: u64 = 64;
/// (Two are as many as the model checker needs.)
const SHARDS: usize = if cfg!(loom) { 2 } else { 64 };

/// So many groups are flushed at once. It bounds the memory that a flush takes
/// (16 MiB); a flush of more is several.
const GROUPS_PER_PASS: usize = 16 << 10;

/// How much of the L2 tables is read at once when an image is opened.
const LOAD_CHUNK: u64 = 1 << 20;

/// By group: a bit for each of its clusters.
type Marks = BTreeMap<u64, u64>;

/// The words of one group.
pub type Words = [u64; CLUSTERS_PER_GROUP as usize];

/// See the module's documentation.
pub struct Image<F> {
    file: F,
    path: PathBuf,
    layout: Layout,
    /// Clusters whose words have changed since they were last flushed.
    changes: Vec<Mutex<Marks>>,
    /// Groups whose tables have space: a bit each, by the number of 64 of them.
    reserved: Vec<Mutex<Marks>>,
    writer: Mutex<Writer>,
    export: Mutex<Export>,
    turn: Mutex<Turn>,
    turn_over: Condvar,
}

/// The hash of the name of the export that the image keeps; 0: not known.
struct Export {
    /// In the file, at `at`.
    recorded: u64,
    at: u64,
    /// To be recorded with what is written to it.
    current: u64,
}

/// What only the one who flushes needs.
struct Writer {
    /// Clusters whose refcount in the file is 1.
    counted: Marks,
    /// Clusters that were leaked when the image was opened, until the first flush.
    leaks: Marks,
    /// Clusters whose refcount may be 0 or 1, whatever `counted` says: a write of it
    /// failed, and may have been done in part. The next flush writes it, else it might
    /// rely on a 1 that is not there.
    unsure: Marks,
    /// Set when a sync failed. The system may have thrown away what it could not
    /// write, and would not say so a second time.
    failed: Option<String>,
}

/// Flushes are numbered from 1 on.
#[derive(Default)]
struct Turn {
    started: u64,
    ended: u64,
    /// Of the flush that ended last.
    outcome: Option<(i32, String)>,
}

/// A cluster as a flush has seen it.
struct Seen {
    cluster: GuestCluster,
    word: u64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded changes in steps that each leave it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<F: ImageFile> Image<F> {
    /// Makes an image in `file`, which is empty. It is on the disk when this
    /// returns. `path` is for messages.
    pub fn create(file: F, path: &Path, header: &Header) -> Result<Self> {
        let image = Self::new(file, path, header);
        let layout = image.layout;
        let be = |numbers: &mut dyn Iterator<Item = u64>| -> Vec<u8> {
            numbers.flat_map(u64::to_be_bytes).collect()
        };
        image
            .file
            .set_size(layout.end)
            .map_err(|e| image.error(e, &format!("making it {} bytes long", layout.end)))?;
        image.write_at(&header.to_bytes(), 0)?;
        image.write_at(
            &be(&mut layout.refcount_table_entries()),
            layout.refcount_table,
        )?;
        let ones = 1u16
            .to_be_bytes()
            .repeat(layout.metadata_clusters() as usize);
        image.write_at(&ones, layout.refcount_blocks)?;
        image.write_at(&be(&mut layout.l1_entries()), layout.l1)?;
        image
            .file
            .sync()
            .map_err(|e| image.error(e, "syncing it"))?;
        Ok(image)
    }

    /// Checks what lies before the L2 tables; [`Image::load`] has to follow.
    /// EINVAL, with what is wrong and where, if this filter can't go on with it.
    pub fn open(file: F, path: &Path) -> Result<(Self, Header)> {
        let failed = |e, tried: &str| Error::io(e, format!("{tried} {}", path.display()));
        let len = file.size().map_err(|e| failed(e, "asking the length of"))?;
        let mut bytes = vec![0; len.min(16 << 10) as usize];
        file.read_at(&mut bytes, 0)
            .map_err(|e| failed(e, "reading the header of"))?;
        let header = Header::from_bytes(&bytes).map_err(|e| refusal(path, e))?;
        let image = Self::new(file, path, &header);
        let layout = image.layout;
        if len < layout.end {
            return Err(image.refused(format!(
                "it is {len} bytes long, but should be {}: it was truncated, \
                 or emptied by qemu-img commit (which keeps it as it is with -d)",
                layout.end
            )));
        }
        let pointers = layout.refcount_table_entries();
        let (start, end) = (layout.refcount_table, layout.refcount_blocks);
        image.expect_pointers("refcount table", start, end, pointers)?;
        image.expect_pointers("L1 table", layout.l1, layout.l2, layout.l1_entries())?;
        Ok((image, header))
    }

    fn new(file: F, path: &Path, header: &Header) -> Self {
        Image {
            file,
            path: path.to_owned(),
            layout: header.layout,
            export: Mutex::new(Export {
                recorded: header.export,
                at: header.export_at,
                current: header.export,
            }),
            changes: (0..SHARDS).map(|_| Mutex::default()).collect(),
            reserved: (0..SHARDS).map(|_| Mutex::default()).collect(),
            writer: Mutex::new(Writer {
                counted: Marks::new(),
                leaks: Marks::new(),
                unsure: Marks::new(),
                failed: None,
            }),
            turn: Mutex::default(),
            turn_over: Condvar::new(),
        }
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self) -> &F {
        &self.file
    }

    fn refused(&self, what: impl std::fmt::Display) -> Error {
        refusal(&self.path, what)
    }

    fn error(&self, source: io::Error, tried: &str) -> Error {
        Error::io(
            source,
            format!("{tried} (cow-overlay={})", self.path.display()),
        )
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file.write_at(bytes, offset).map_err(|e| {
            let tried = format!("writing {} bytes of tables at {offset:#x}", bytes.len());
            self.error(e, &tried)
        })
    }

    /// A table between `start` and `end` must have `wanted`, and nothing else.
    fn expect_pointers(
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
                    return Err(self.refused(format!(
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
                .map_err(|e| self.error(e, &format!("reading {len} bytes of tables at {at:#x}")))?;
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
                if counted != 0 {
                    writer.counted.insert(group, counted);
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
        self.file
            .read_at(buf, at)
            .map_err(|e| self.error(e, &format!("reading refcounts at {at:#x}")))?;
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
            Some(i) => Err(self.refused(format!(
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
            Err(self.refused(format!(
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
            if counted >> i & 1 != 0 && !has_data(words[i]) {
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

    /// Writes the refcount 0 for what was leaked when the image was opened. Done once,
    /// before anything else is flushed: in the file no entry leads there yet. (A sync
    /// comes first: that the entry is gone may not be on the disk, if the program
    /// before this one was killed.) That the refcounts can't be written is no error of
    /// the one who asked for a flush.
    fn give_up_leaks(&self, writer: &mut Writer, word: &dyn Fn(GuestCluster) -> u64) -> Result<()> {
        let leaks = std::mem::take(&mut writer.leaks);
        if leaks.is_empty() {
            return Ok(());
        }
        self.sync_or_fail(writer)?;
        let seen: Vec<Seen> = leaks
            .iter()
            .flat_map(|(group, bits)| {
                (0..CLUSTERS_PER_GROUP)
                    .filter(move |i| bits >> i & 1 != 0)
                    .map(move |i| GuestCluster(group * CLUSTERS_PER_GROUP + i))
            })
            .map(|cluster| Seen {
                cluster,
                word: word(cluster) & self.layout.valid_bits(cluster),
            })
            .collect();
        if let Err(e) = self.count(writer, &seen, false) {
            log::debug!("clusters stay leaked: {e}");
        }
        Ok(())
    }

    /// Takes the space for the tables of `clusters` now, so that a full file system
    /// makes the write fail that it has no room for, and not the flush which is to make
    /// earlier ones safe. ENOSPC if there is none.
    pub fn reserve(&self, clusters: Range<GuestCluster>) -> Result<()> {
        let groups =
            clusters.start.0 / CLUSTERS_PER_GROUP..clusters.end.0.div_ceil(CLUSTERS_PER_GROUP);
        for group in groups {
            let (key, bit) = (group / 64, 1 << (group % 64));
            let mut reserved = locked(&self.reserved[(key % SHARDS as u64) as usize]);
            let bits = reserved.entry(key).or_default();
            if *bits & bit != 0 {
                continue;
            }
            let first = GuestCluster(group * CLUSTERS_PER_GROUP);
            let refcounts = self.layout.refcount_at(first);
            let refcounts_end = refcounts + CLUSTERS_PER_GROUP * REFCOUNT_LEN;
            let tables = [
                (self.layout.entry_at(first), CLUSTERS_PER_GROUP * ENTRY_LEN),
                (refcounts, refcounts_end.min(self.layout.l1) - refcounts),
            ];
            for (at, len) in tables {
                self.file
                    .reserve(at, len)
                    .map_err(|e| self.error(e, "taking space for the tables of the overlay"))?;
            }
            *bits |= bit;
        }
        Ok(())
    }

    fn shard(&self, group: u64) -> &Mutex<Marks> {
        &self.changes[(group % SHARDS as u64) as usize]
    }

    /// Runs `change`, which changes words of `clusters` (which lie in one group) in
    /// the block map and tells whether it did, so that a flush sees the change and
    /// the mark as one.
    pub fn publish(
        &self,
        clusters: Range<GuestCluster>,
        change: impl FnOnce() -> Result<bool>,
    ) -> Result<()> {
        let group = clusters.start.0 / CLUSTERS_PER_GROUP;
        debug_assert_eq!((clusters.end.0 - 1) / CLUSTERS_PER_GROUP, group);
        let mut marks = locked(self.shard(group));
        let changed = change();
        // A change that failed may have been made in part.
        if !matches!(changed, Ok(false)) {
            let count = clusters.end.0 - clusters.start.0;
            let bits = (u64::MAX >> (CLUSTERS_PER_GROUP - count))
                << (clusters.start.0 % CLUSTERS_PER_GROUP);
            *marks.entry(group).or_default() |= bits;
        }
        changed.map(drop)
    }

    /// Makes all that was published before safe from power loss. `word` looks a
    /// cluster's word up in the block map.
    ///
    /// Flushes that are asked for while one is under way share the next.
    pub fn flush(&self, word: &dyn Fn(GuestCluster) -> u64) -> Result<()> {
        let mut turn = locked(&self.turn);
        // The one that is under way may have fetched the marks already.
        let wanted = turn.started + 1;
        while turn.started > turn.ended && turn.ended < wanted {
            turn = self
                .turn_over
                .wait(turn)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if turn.ended >= wanted {
            return match &turn.outcome {
                None => Ok(()),
                Some((errno, message)) => Err(Error::new(*errno, message.clone())),
            };
        }
        turn.started += 1;
        drop(turn);

        // Ends the turn on every way out, else the others would wait for ever.
        let mut ending = EndTurn {
            turn: &self.turn,
            turn_over: &self.turn_over,
            outcome: Some((libc::EIO, "a flush did not end".to_string())),
        };
        let done = self.flush_alone(word);
        ending.outcome = done
            .as_ref()
            .err()
            .map(|error| (error.errno(), error.to_string()));
        done
    }

    fn flush_alone(&self, word: &dyn Fn(GuestCluster) -> u64) -> Result<()> {
        let mut writer = self.writer.lock().unwrap_or_else(|poisoned| {
            // A bug of ours has ended a flush half way, and the marks that it had
            // fetched are lost.
            let mut writer = poisoned.into_inner();
            writer.failed.get_or_insert("internal error".to_string());
            writer
        });
        if let Some(reason) = &writer.failed {
            return Err(Error::new(
                libc::EIO,
                format!(
                    "nothing can be made safe any more, since an earlier flush failed: {reason}"
                ),
            ));
        }
        self.expect_whole(&mut writer)?;
        self.give_up_leaks(&mut writer, word)?;
        let mut marks = Marks::new();
        for shard in &self.changes {
            marks.append(&mut locked(shard));
        }
        if marks.is_empty() {
            return self.sync_or_fail(&mut writer);
        }
        while !marks.is_empty() {
            let later = match marks.keys().nth(GROUPS_PER_PASS) {
                Some(&group) => marks.split_off(&group),
                None => Marks::new(),
            };
            if let Err(e) = self.flush_marked(&mut writer, &marks, word) {
                // They are not in the file yet. Those that are lose nothing by
                // being written again.
                for (group, bits) in marks.into_iter().chain(later) {
                    *locked(self.shard(group)).entry(group).or_default() |= bits;
                }
                return Err(e);
            }
            marks = later;
        }
        Ok(())
    }

    /// Somebody who does not heed locks may have cut the file, and tables with it.
    fn expect_whole(&self, writer: &mut Writer) -> Result<()> {
        let len = self.file.size();
        let len = len.map_err(|e| self.error(e, "asking the length of the overlay"))?;
        if len >= self.layout.end {
            return Ok(());
        }
        let reason = format!(
            "cow-overlay={} was truncated to {len} bytes while it was served",
            self.path.display()
        );
        writer.failed = Some(reason.clone());
        Err(Error::new(libc::EIO, reason))
    }

    /// Whether the image keeps the export with this name. If nothing says yet which one
    /// it keeps, it is this one from the next change on.
    pub fn claim(&self, name: &[u8]) -> bool {
        let hash = hash_of_export(name);
        let mut export = locked(&self.export);
        if export.recorded == 0 {
            export.current = hash;
        }
        export.current == hash
    }

    fn record_export(&self) -> Result<()> {
        let mut export = locked(&self.export);
        if export.recorded != export.current {
            self.write_at(&export.current.to_be_bytes(), export.at)?;
            export.recorded = export.current;
        }
        Ok(())
    }

    fn flush_marked(
        &self,
        writer: &mut Writer,
        marks: &Marks,
        word: &dyn Fn(GuestCluster) -> u64,
    ) -> Result<()> {
        let seen: Vec<Seen> = spans(marks)
            .map(|cluster| Seen {
                cluster,
                word: word(cluster) & self.layout.valid_bits(cluster),
            })
            .collect();

        self.record_export()?;
        self.count(writer, &seen, true)?;
        self.sync_or_fail(writer)?;
        self.write_entries(writer, &seen)?;
        self.count(writer, &seen, false)
    }

    /// Writes the L2 entries; they are safe when this returns.
    ///
    /// Where they lie in one piece, that piece alone is synced, and not what other
    /// requests have written since the first sync: that would be new space, which
    /// costs the file system a transaction. It is written before without a sync, so
    /// that an error of the sync is known from one of the write (no space, say),
    /// after which nothing is lost.
    fn write_entries(&self, writer: &mut Writer, seen: &[Seen]) -> Result<()> {
        let mut pieces = runs(seen).map(|run| {
            let bytes: Vec<u8> = run
                .iter()
                .flat_map(|seen| self.layout.entry(seen.cluster, seen.word).to_bytes())
                .collect();
            (bytes, self.layout.entry_at(run[0].cluster))
        });
        let Some((first, at)) = pieces.next() else {
            return Ok(());
        };
        self.write_at(&first, at)?;
        let mut is_one = true;
        for (bytes, at) in pieces {
            self.write_at(&bytes, at)?;
            is_one = false;
        }
        if !is_one {
            return self.sync_or_fail(writer);
        }
        let synced = self.file.write_synced(&first, at);
        self.expect_synced(writer, synced)
    }

    /// Writes the refcount 1 (`counted`) for those that have data and no refcount,
    /// or 0 for those that have a refcount and no data. Those for which that is not
    /// known get one in any case.
    fn count(&self, writer: &mut Writer, seen: &[Seen], counted: bool) -> Result<()> {
        let changed: Vec<Seen> = seen
            .iter()
            .filter(|seen| {
                let is_right = contains(&writer.counted, seen.cluster) == counted
                    && !contains(&writer.unsure, seen.cluster);
                has_data(seen.word) == counted && !is_right
            })
            .map(|seen| Seen { ..*seen })
            .collect();
        for run in runs(&changed) {
            let bytes = u16::from(counted).to_be_bytes().repeat(run.len());
            let done = self.write_at(&bytes, self.layout.refcount_at(run[0].cluster));
            for seen in run {
                set(&mut writer.unsure, seen.cluster, done.is_err());
                if done.is_ok() {
                    set(&mut writer.counted, seen.cluster, counted);
                }
            }
            done?;
        }
        Ok(())
    }

    fn sync_or_fail(&self, writer: &mut Writer) -> Result<()> {
        self.expect_synced(writer, self.file.sync())
    }

    /// EIO, now and for ever, if a sync has failed.
    fn expect_synced(&self, writer: &mut Writer, synced: io::Result<()>) -> Result<()> {
        synced.map_err(|e| {
            let reason = self.error(e, "syncing the overlay").to_string();
            writer.failed = Some(reason.clone());
            Error::new(libc::EIO, reason)
        })
    }
}

fn contains(marks: &Marks, cluster: GuestCluster) -> bool {
    let bits = marks.get(&(cluster.0 / CLUSTERS_PER_GROUP));
    bits.is_some_and(|bits| bits >> (cluster.0 % CLUSTERS_PER_GROUP) & 1 != 0)
}

fn set(marks: &mut Marks, cluster: GuestCluster, is_marked: bool) {
    let group = cluster.0 / CLUSTERS_PER_GROUP;
    let bit = 1 << (cluster.0 % CLUSTERS_PER_GROUP);
    if is_marked {
        *marks.entry(group).or_default() |= bit;
    } else if let Some(bits) = marks.get_mut(&group) {
        *bits &= !bit;
    }
}

struct EndTurn<'a> {
    turn: &'a Mutex<Turn>,
    turn_over: &'a Condvar,
    outcome: Option<(i32, String)>,
}

impl Drop for EndTurn<'_> {
    fn drop(&mut self) {
        let mut turn = locked(self.turn);
        turn.ended = turn.started;
        turn.outcome = self.outcome.take();
        self.turn_over.notify_all();
    }
}

fn refusal(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::new(
        libc::EINVAL,
        format!("cow-overlay={} can't be used: {what}", path.display()),
    )
}

/// The clusters from the first to the last marked one of each group: those in
/// between go with them in one write.
fn spans(marks: &Marks) -> impl Iterator<Item = GuestCluster> + '_ {
    marks.iter().flat_map(|(group, bits)| {
        let first = group * CLUSTERS_PER_GROUP;
        let start = first + u64::from(bits.trailing_zeros());
        let end = first + CLUSTERS_PER_GROUP - u64::from(bits.leading_zeros());
        (start..end).map(GuestCluster)
    })
}

/// `seen` cut into runs of clusters that follow each other.
fn runs(seen: &[Seen]) -> impl Iterator<Item = &[Seen]> {
    seen.chunk_by(|a, b| a.cluster.0 + 1 == b.cluster.0)
}
