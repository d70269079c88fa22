//! Bringing an image home that another program has written to.
//!
//! While an image is served, cluster *g* of the disk lies in the file where the
//! [`Layout`] has its *home*, and so do all tables. QEMU puts a new cluster where it finds
//! room, and tables too. [`survey`] finds out what lies elsewhere, and whether this filter can go
//! on with the image; nothing is changed by it. [`Survey::bring_home`] then moves it.
//!
//! # The order of writes
//!
//! If the tables are at home (a guest was booted from the image, say) they are changed in
//! place:
//!
//! 1. a refcount of 1 for every place that will be written to; sync;
//! 2. entries that lack the COPIED bit get it, those that lead to a cluster
//!    without needing its data lead nowhere, and the header says no more that refcounts may
//!    be wrong; sync;
//! 3. in rounds (see `plan`): data is copied to places that are free, sync, the L2 entries of
//!    what was copied, sync;
//! 4. every place that is free now is given back, what lies beyond the image's end is cut
//!    off, and their refcounts become 0; sync. (In this order: a crash that leaves a refcount
//!    makes the next start go on, and nothing else would tell it of their space.)
//!
//! Else all tables are written anew beyond all that is in the file (`TemporaryTables`, with the
//! refcounts of 1 and the entries of 2); sync; the header leads to them by one write of its first
//! sector; sync. Then everything in the file that is not data is free and given back, and 3
//! follows. Then old places are given back, the tables are written a last time, where they belong;
//! sync; the header; sync; and what lies beyond the image's end is cut off.
//!
//! Before all of this, what the survey has read is synced: it may be what an earlier process
//! wrote before it was killed, and then a crash could bring back an older entry, which leads to
//! a place that was free when the survey looked, and that has been written to since.
//!
//! The mark of a run is set before the first change, and cleared after the last sync.
//!
//! Whatever of it a crash leaves undone, QEMU reads the same bytes from the image, and finds
//! nothing in it but leaks, and the next start goes on:
//!
//! - Only free places are written to: to which nothing leads when the last sync
//!   has returned. So until an entry (or the header) is written that leads there, it does not
//!   matter what they have, and before that is written they are synced.
//! - A place is free when the entries that led to it have been replaced and synced. So a crash
//!   can't bring an old entry back whose place was used again.
//! - The old place keeps its bytes until then. So it does not matter which of the entries of a
//!   round are new: old and new lead to the same bytes.
//! - The refcount of what an entry leads to is 1 before that entry is written, and becomes 0
//!   only after another entry is on the disk.
//! - Entries are 16 bytes, the numbers of the header lie in its first sector, and a sector is
//!   old or new.

mod hosts;
mod io;
mod mover;
mod plan;
mod survey;
mod tables;

use std::ops::Range;
use std::path::Path;

use super::file::ImageFile;
use super::header::{Header, InUse, Tables, User};
use super::layout::{GuestCluster, Layout, REFCOUNT_LEN, has_data};
use crate::buffer::buffer;
use crate::error::{Error, Result};
use crate::overlay_file::OverlayFile;
use hosts::{HostCluster, HostSet};
use io::Io;
use mover::{Mover, runs, write_entries};
use plan::Plan;
use survey::Findings;
use tables::{TemporaryTables, switch_to, write_refcounts};

/// A cluster of the disk, and where it lies.
#[derive(Debug, Clone, Copy)]
struct Cluster {
    guest: GuestCluster,
    host: HostCluster,
    /// That of its L2 entry, without what is beyond the disk's end.
    bitmap: u64,
}

fn home_of(layout: Layout, guest: GuestCluster) -> HostCluster {
    HostCluster(layout.metadata_clusters() + guest.0)
}

/// How far the moving has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Clusters that were brought home.
    pub clusters: u64,
    /// Clusters that were not at home.
    pub of: u64,
    /// Bytes that were copied for it.
    pub bytes: u64,
}

/// An image that is not as this filter leaves it, and with which it can go on.
pub struct Survey<'a, F> {
    file: &'a F,
    name: OverlayFile,
    found: Findings,
    plan: Plan,
    way: Way,
}

/// How the tables get home.
enum Way {
    /// They are there.
    InPlace,
    Copied(TemporaryTables),
}

/// Finds out what there is to do. `path` is for messages. EINVAL if this filter can't go on
/// with the image, with a sentence that says what to do.
pub fn survey<'a, F: ImageFile>(file: &'a F, path: &Path) -> Result<Survey<'a, F>> {
    let name = OverlayFile::Image(path.to_owned());
    let found = survey::read(Io { file, name: &name })?;
    let plan = Plan::new(&found.away, home_of(found.layout, GuestCluster(0)))?;
    let way = way(&name, &found, &plan)?;
    Ok(Survey {
        file,
        name,
        found,
        plan,
        way,
    })
}

fn way(name: &OverlayFile, found: &Findings, plan: &Plan) -> Result<Way> {
    let layout = found.layout;
    let beyond = found.end_of_all();
    let scratch = u64::from(plan.scratch);
    // What has no refcount block at home can't get a refcount there.
    let counted_at_home = layout.refcount_block_count() * layout.cluster_size() / REFCOUNT_LEN;
    let mut missing = found.used.without(&found.counted);
    if found.is_home
        && (scratch == 0 || beyond.0 + scratch <= counted_at_home)
        && missing.all(|cluster| cluster.0 < counted_at_home)
    {
        return Ok(Way::InPlace);
    }
    let mut counted = HostSet::default();
    counted.insert_all(found.used.without(&found.tables));
    counted.insert_all(found.homes());
    // Two places that attempts can use in turn: the tables that one has left are in use when
    // the next begins, and the file would grow with each.
    for start in [found.end_of_disk(), beyond] {
        let copy = TemporaryTables::place(layout, &found.l2, start, scratch, counted.clone())?;
        let is_free = |copy: &TemporaryTables| {
            let end = HostCluster(copy.end / layout.cluster_size());
            found.used.ranges_in(start..end).next().is_none()
        };
        if let Some(copy) = copy.filter(is_free) {
            return Ok(Way::Copied(copy));
        }
    }
    let what = "the format has no room for moving what another program has written";
    Err(name.refused_with(libc::EFBIG, what))
}

impl Findings {
    fn end_of_disk(&self) -> HostCluster {
        HostCluster(self.layout.end / self.layout.cluster_size())
    }

    /// Nothing leads there, nor beyond, and nothing is going to. (What an earlier attempt has
    /// left there is written over, so that the file does not grow with each.)
    fn end_of_all(&self) -> HostCluster {
        let end = self.end_of_disk();
        let last = self.used.last();
        last.map_or(end, |last| end.max(HostCluster(last.0 + 1)))
    }

    /// Those of the clusters that are away.
    fn homes(&self) -> impl Iterator<Item = HostCluster> + '_ {
        let homes = self.away.iter();
        homes.map(|cluster| home_of(self.layout, cluster.guest))
    }

    /// What is used when all are home.
    fn used_at_the_end(&self) -> HostSet {
        let mut used = HostSet::default();
        used.insert_all((0..self.layout.metadata_clusters()).map(HostCluster));
        used.insert_all(self.used.without(&self.tables));
        for cluster in self.away.iter().chain(&self.amended) {
            used.remove(cluster.host);
        }
        let at_home = self.amended.iter().filter(|c| has_data(c.bitmap));
        used.insert_all(at_home.map(|cluster| cluster.host));
        used.insert_all(self.homes());
        used
    }
}

impl<F: ImageFile> Survey<'_, F> {
    pub fn header(&self) -> &Header {
        &self.found.foreign.header
    }

    /// How many clusters are to be moved.
    pub fn to_move(&self) -> u64 {
        self.found.away.len() as u64
    }

    /// How long the file becomes while they are.
    pub fn longest(&self) -> u64 {
        match &self.way {
            Way::InPlace => {
                let clusters = self.found.end_of_all().0 + u64::from(self.plan.scratch);
                clusters * self.layout().cluster_size()
            }
            Way::Copied(copy) => copy.end,
        }
    }

    /// Brings the image home: it can be opened by [`Image::open`] then, and is on the disk.
    /// `tell` hears of the progress, after each piece of some MiB at most. Whatever error
    /// there is, the image is sound, and the next one goes on.
    ///
    /// [`Image::open`]: super::image::Image::open
    pub fn bring_home(&self, tell: &mut dyn FnMut(Progress)) -> Result<Progress> {
        self.bring_all_home(tell).map_err(|e| {
            let path = self.name.path().display();
            let what = format!(
                "{e} (while clusters of {path} were moved that another program has written: \
                 nothing is lost, qemu can use it as it is, and the next start goes on)"
            );
            Error::new(e.errno(), what)
        })
    }

    fn bring_all_home(&self, tell: &mut dyn FnMut(Progress)) -> Result<Progress> {
        let (io, layout) = (self.io(), self.layout());
        let used = self.found.used_at_the_end();
        let mut mover = Mover {
            io,
            layout,
            l2: &self.found.l2,
            scratch: self.found.end_of_all(),
            progress: Progress {
                of: self.to_move(),
                ..Progress::default()
            },
            tell,
        };
        self.forget_fingerprint()?;
        io.sync()?;
        self.set_mark(Some(User::Start))?;
        // All that is read lies in the file then.
        io.set_size(self.found.end_of_all().0 * layout.cluster_size())?;
        match &self.way {
            Way::InPlace => {
                let written = self.prepare(mover.scratch)?;
                mover.run(&self.found.away, &self.plan)?;
                let freed = self.freed(&written, &used);
                self.give_back(&freed)?;
                io.set_size(layout.end)?;
                write_refcounts(io, layout, freed.iter(), 0)?;
            }
            Way::Copied(copy) => {
                copy.write(io, &self.found)?;
                let freed = self.freed(&HostSet::default(), &copy.counted);
                self.punch(&freed, HostCluster(0)..self.found.end_of_all())?;
                (mover.l2, mover.scratch) = (&copy.l2, copy.scratch);
                mover.run(&self.found.away, &self.plan)?;
                self.give_back(&self.freed(&copy.counted, &used))?;
                copy.install(io, layout, &used)?;
                io.set_size(layout.end)?;
            }
        }
        io.sync()?;
        self.set_mark(None)?;
        Ok(mover.progress)
    }

    /// Marks the image as one that is being changed, as a run does: after an error the next
    /// start must not rely on what the system only has in its memory. The mark of a run
    /// that has not ended well stays.
    fn set_mark(&self, by: Option<User>) -> Result<()> {
        match self.header().in_use {
            Some(mark) if mark.by != Some(User::Run) => {
                self.io().write_synced(&InUse::mark(by), mark.at)
            }
            _ => Ok(()),
        }
    }

    /// What is *base* in an image that was emptied has other bytes than when the fingerprint was
    /// taken. It has to be on the disk before anything else is: the next start would not know.
    fn forget_fingerprint(&self) -> Result<()> {
        let header = &self.found.foreign.header;
        if !self.found.may_have_been_emptied || header.samples.is_empty() {
            return Ok(());
        }
        let mut without = header.clone();
        without.samples.clear();
        let mut parts = without.fingerprint().into_iter();
        parts.try_for_each(|(at, bytes)| self.io().write(&bytes, at))
    }

    fn io(&self) -> Io<'_, F> {
        Io {
            file: self.file,
            name: &self.name,
        }
    }

    fn layout(&self) -> Layout {
        self.found.layout
    }

    /// Steps 1 and 2, where the tables are at home. What will be written to.
    fn prepare(&self, scratch: HostCluster) -> Result<HostSet> {
        let (io, found, layout) = (self.io(), &self.found, self.layout());
        let mut written = HostSet::default();
        written.insert_all(found.homes());
        let scratch_clusters = scratch.0..scratch.0 + u64::from(self.plan.scratch);
        written.insert_all(scratch_clusters.map(HostCluster));
        let mut missing = HostSet::default();
        // (Some may have leaked, and be counted twice.)
        missing.insert_all(written.without(&found.used));
        missing.insert_all(found.used.without(&found.counted));
        write_refcounts(io, layout, missing.iter(), 1)?;
        io.sync()?;

        let entry =
            |cluster: &Cluster| (cluster.guest, layout.entry(cluster.guest, cluster.bitmap));
        write_entries(io, layout, &found.l2, found.amended.iter().map(entry))?;
        if found.is_l1_stale {
            let mut l1 = buffer(layout.l2 - layout.l1)?;
            for (place, pointer) in l1.chunks_exact_mut(8).zip(layout.l1_entries()) {
                place.copy_from_slice(&pointer.to_be_bytes());
            }
            io.write(&l1, layout.l1)?;
        }
        if found.foreign.is_dirty || found.foreign.has_features {
            switch_to(io, Tables::at_home(layout))?;
        }
        io.sync()?;
        Ok(written)
    }

    /// What has space, or a refcount, and needs none: to which something led, or that was
    /// written to, or leaked.
    fn freed(&self, written: &HostSet, used: &HostSet) -> HostSet {
        let mut freed = HostSet::default();
        for clusters in [&self.found.used, &self.found.counted, written] {
            freed.insert_all(clusters.without(used));
        }
        freed
    }

    fn punch(&self, freed: &HostSet, within: Range<HostCluster>) -> Result<()> {
        let size = self.layout().cluster_size();
        for free in freed.ranges_in(within) {
            self.io().punch(free.start.0 * size..free.end.0 * size)?;
        }
        Ok(())
    }

    /// The space of `freed` within the disk (what lies beyond is cut off), and of what others
    /// have left in places that have a cluster now.
    fn give_back(&self, freed: &HostSet) -> Result<()> {
        let layout = self.layout();
        let (size, block) = (layout.cluster_size(), layout.block_size().bytes());
        let disk = home_of(layout, GuestCluster(0))..HostCluster(layout.end / size);
        self.punch(freed, disk)?;
        // Blocks of others in places that were theirs.
        let came_later = self.found.away.iter().zip(&self.plan.steps);
        for (cluster, _) in came_later.filter(|(_, step)| step.had_to_wait()) {
            let at = home_of(layout, cluster.guest).0 * size;
            for (first, blocks) in runs(!cluster.bitmap as u32) {
                let start = at + first * block;
                self.io().punch(start..start + blocks * block)?;
            }
        }
        Ok(())
    }
}
