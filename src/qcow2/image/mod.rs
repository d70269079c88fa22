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
//! - The hole of a discard may be punched before its flush or after it. Until 5 the
//!   file's entry may still say *data*, and a crash then leaves the old bytes, or zeroes,
//!   as the discard wanted. After 5 no entry leads to those bytes.
//!
//! # No change is missed
//!
//! A block that becomes *data* or *zero* is changed in the map and marked as
//! changed under one hold of a lock, which a flush takes to fetch the marks. So a
//! request that finds a block in the state that it wants, and does nothing, is
//! covered too: whoever brought the block there marked it in the same hold, and
//! a flush that is asked for later fetches that mark (or an earlier flush has).
//!
//! Before any of it, and before a client's bytes are written, the mark of the
//! run is safe (see `mark`).
//!
//! # Locks
//!
//! `commits` (with its condition variable) decides who flushes and is held for
//! moments only; `writer` is held through a flush, by the one who commits for the group;
//! a shard of `dirty` is the innermost of all: it is held while the block map
//! changes, which takes no lock, and nothing else is taken under it. `unreserved` is held
//! for moments, and nothing else is taken under it. Who changes blocks takes their stripe
//! before a shard, a flush takes no stripe. That of the mark is held while the mark is
//! written, and nothing is taken under it.

mod flush;
mod group_set;
mod load;
mod mark;
mod space;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use bitvec::array::BitArray;
use bitvec::order::Lsb0;

use super::file::ImageFile;
use super::header::Header;
use super::layout::Layout;
use crate::error::Result;
use crate::overlay::Account;
use crate::overlay_file::OverlayFile;
use crate::sync::{Condvar, Mutex, locked};
use group_set::GroupSet;
use mark::Mark;
pub use space::GROUP_TABLES_LEN;

/// Changes are kept for so many clusters together, 1 KiB of L2 entries: a leaf
/// of the block map.
pub const CLUSTERS_PER_GROUP: u64 = 64;
/// (Two are as many as the model checker needs.)
const SHARDS: usize = if cfg!(loom) { 2 } else { 64 };

/// Clusters, by group: a bit for each of the group's clusters.
type ClusterSet = BTreeMap<u64, u64>;

/// The words of one group.
pub type Words = [u64; CLUSTERS_PER_GROUP as usize];

/// See the module's documentation.
pub struct Image<F> {
    file: F,
    name: OverlayFile,
    layout: Layout,
    mark: Mark,
    /// Dirty clusters: their words have changed since they were last flushed.
    dirty: Vec<Mutex<ClusterSet>>,
    /// Groups whose tables have been given space.
    reserved: GroupSet,
    /// Groups that had entries when the image was opened.
    described: GroupSet,
    /// Groups that have changed though they could not be given space.
    unreserved: Mutex<BTreeSet<u64>>,
    writer: Mutex<Writer>,
    export: Mutex<Export>,
    commits: Mutex<GroupCommit>,
    commit_ended: Condvar,
    /// With a limit: what the tables are charged to.
    account: Option<Arc<Account>>,
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
    used: ClusterSet,
    /// Clusters that were leaked when the image was opened, until the first flush.
    leaks: ClusterSet,
    /// Clusters whose refcount may be 0 or 1, whatever `used` says: a write of it
    /// failed, and may have been done in part. The next flush writes it, else it might
    /// rely on a 1 that is not there.
    unknown: ClusterSet,
    /// Set when a sync failed. The system may have thrown away what it could not
    /// write, and would not say so a second time.
    failed: Option<String>,
}

/// Flushes are numbered from 1 on.
#[derive(Default)]
struct GroupCommit {
    started: u64,
    ended: u64,
    /// The last one that was good. So was all that an earlier one was asked for, if
    /// not before: a flush that fails leaves its marks to the next.
    good: u64,
    /// Why the last of the others was not.
    failure: Option<(i32, String)>,
    /// How many wait for the one that is under way.
    waiting: usize,
    /// How many have found that another was good enough for them.
    shared: u64,
}

/// The numbers of the bits that are set.
fn ones(bits: u64) -> impl Iterator<Item = u64> {
    let bits = BitArray::<[u64; 1], Lsb0>::new([bits]);
    let set = bits.into_iter().enumerate().filter(|(_, is_set)| *is_set);
    set.map(|(number, _)| number as u64)
}

impl<F: ImageFile> Image<F> {
    /// Makes an image in `file`, which is empty. It is on the disk when this
    /// returns. `path` is for messages.
    pub fn create(file: F, path: &Path, header: &Header) -> Result<Self> {
        let image = Self::new(file, OverlayFile::Image(path.to_owned()), header);
        let layout = image.layout;
        image.file.set_size(layout.end).map_err(|e| {
            let operation = format!("extending to {} bytes", layout.end);
            image.name.failed(e, &operation)
        })?;
        image.write_new(&header.to_bytes(), 0)?;
        for (at, table) in layout.new_tables() {
            image.write_new(&table, at)?;
        }
        image
            .file
            .sync()
            .map_err(|e| image.name.failed(e, "syncing"))?;
        Ok(image)
    }

    /// Checks what lies before the L2 tables; [`Image::load`] has to follow.
    /// EINVAL, with what is wrong and where, if this filter can't go on with it.
    pub fn open(file: F, path: &Path) -> Result<(Self, Header)> {
        let name = OverlayFile::Image(path.to_owned());
        let header = Self::read_header(&file, &name)?;
        let image = Self::new(file, name, &header);
        let layout = image.layout;
        let len = Self::len_of(&image.file, &image.name)?;
        if len != layout.end {
            let wanted = layout.end;
            return Err(image
                .name
                .refused(format!("it is {len} bytes long, but should be {wanted}")));
        }
        let pointers = layout.refcount_table_entries();
        let (start, end) = (layout.refcount_table, layout.refcount_blocks);
        image.expect_pointers("refcount table", start, end, pointers)?;
        image.expect_pointers("L1 table", layout.l1, layout.l2, layout.l1_entries())?;
        Ok((image, header))
    }

    fn read_header(file: &F, name: &OverlayFile) -> Result<Header> {
        let len = Self::len_of(file, name)?;
        let mut bytes = vec![0; len.min(16 << 10) as usize];
        file.read_at(&mut bytes, 0)
            .map_err(|e| name.failed(e, "reading the header of"))?;
        Header::from_bytes(&bytes).map_err(|e| name.refused(e))
    }

    fn len_of(file: &F, name: &OverlayFile) -> Result<u64> {
        file.size()
            .map_err(|e| name.failed(e, "asking the length of"))
    }

    fn new(file: F, name: OverlayFile, header: &Header) -> Self {
        let groups = header.layout.guest_clusters().div_ceil(CLUSTERS_PER_GROUP);
        Image {
            file,
            name,
            layout: header.layout,
            mark: Mark::new(header),
            export: Mutex::new(Export {
                recorded: header.export,
                at: header.export_at,
                current: header.export,
            }),
            dirty: (0..SHARDS).map(|_| Mutex::default()).collect(),
            reserved: GroupSet::new(groups),
            described: GroupSet::new(groups),
            unreserved: Mutex::default(),
            writer: Mutex::new(Writer {
                used: ClusterSet::new(),
                leaks: ClusterSet::new(),
                unknown: ClusterSet::new(),
                failed: None,
            }),
            commits: Mutex::default(),
            commit_ended: Condvar::new(),
            account: None,
        }
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    pub fn name(&self) -> &OverlayFile {
        &self.name
    }

    /// The file, not to be changed: for that there is [`Image::changing`].
    pub fn file(&self) -> &F {
        &self.file
    }

    /// Whether it says in the file which export it keeps: something was flushed to it.
    pub fn records_export(&self) -> bool {
        locked(&self.export).recorded != 0
    }

    /// Records the fingerprint that `header` has. It is safe with the next flush, before
    /// anything that is written from now on: until then the image is as it was, but for
    /// its fingerprint.
    pub fn record_fingerprint(&self, header: &Header) -> Result<()> {
        for (at, bytes) in header.fingerprint() {
            self.write_at(&bytes, at)?;
        }
        Ok(())
    }

    /// How many flushes wait for the one that is under way, or have yet to wake.
    pub fn flushes_waiting(&self) -> usize {
        locked(&self.commits).waiting
    }

    /// How many flushes were done, and how many shared one of those.
    pub fn flushes(&self) -> (u64, u64) {
        let commits = locked(&self.commits);
        (commits.started, commits.shared)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.changing()?;
        self.write_new(bytes, offset)
    }

    /// As [`Image::write_at`], while the image is made: the mark comes with the header.
    fn write_new(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file.write_at(bytes, offset).map_err(|e| {
            let len = bytes.len() as u64;
            self.name
                .write_failed_at(e, "writing tables of", offset, len)
        })
    }

    fn shard(&self, group: u64) -> &Mutex<ClusterSet> {
        &self.dirty[(group % SHARDS as u64) as usize]
    }
}
