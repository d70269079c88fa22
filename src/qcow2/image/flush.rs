//! From the block map to the file. The order of the writes, the argument for it, and
//! that of the locks are those of [`super`].

use std::io;
use std::ops::Range;
use std::sync::PoisonError;

use bitvec::order::Lsb0;
use bitvec::view::BitView;

use super::super::file::ImageFile;
use super::super::header;
use super::super::layout::{GuestCluster, has_data};
use super::{CLUSTERS_PER_GROUP, ClusterSet, GroupCommit, Image, Writer, ones};
use crate::buffer::list;
use crate::error::{Error, Result};
use crate::sync::{Condvar, Mutex, locked};

/// So many groups are flushed at once. It bounds the memory that a flush takes
/// (16 MiB); a flush of more is several.
const GROUPS_PER_PASS: usize = 16 << 10;

/// A dirty cluster, with its word as the flush has seen it.
#[derive(Clone, Copy)]
struct DirtyCluster {
    cluster: GuestCluster,
    word: u64,
}

impl<F: ImageFile> Image<F> {
    /// Writes the refcount 0 for what was leaked when the image was opened. Done once,
    /// before anything else is flushed: in the file no entry leads there yet. (A sync
    /// comes first: that the entry is gone may not be on the disk, if the program
    /// before this one was killed.) That there is no space for the refcounts is no error
    /// of the one who asked for a flush. Another error may be that of an earlier write.
    fn give_up_leaks(&self, writer: &mut Writer, word: &dyn Fn(GuestCluster) -> u64) -> Result<()> {
        if writer.leaks.is_empty() {
            return Ok(());
        }
        self.sync_or_fail(writer)?;
        let clusters = writer.leaks.iter().flat_map(|(group, bits)| {
            ones(*bits).map(move |i| GuestCluster(group * CLUSTERS_PER_GROUP + i))
        });
        let leaks = self.look_at(clusters, word)?;
        writer.leaks.clear();
        match self.write_refcounts(writer, &leaks, false) {
            Err(e) if e.is_full() => {
                log::debug!("clusters stay leaked: {e}");
                Ok(())
            }
            counted => counted,
        }
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
        let mut commits = locked(&self.commits);
        // The one that is under way may have fetched the marks already.
        let wanted = commits.started + 1;
        commits.waiting += 1;
        while commits.started > commits.ended && commits.ended < wanted {
            commits = self
                .commit_ended
                .wait(commits)
                .unwrap_or_else(PoisonError::into_inner);
        }
        commits.waiting -= 1;
        if let Some(outcome) = commits.outcome_for(wanted) {
            commits.shared += 1;
            return outcome;
        }
        commits.started += 1;
        drop(commits);

        // Ends the commit on every way out, else the others would wait for ever.
        let mut ending = EndOfCommit {
            commits: &self.commits,
            commit_ended: &self.commit_ended,
            failure: Some((libc::EIO, "a flush did not end".to_string())),
        };
        let done = self.flush_alone(word);
        ending.failure = done
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
        self.expect_named()?;
        self.expect_whole(&mut writer)?;
        self.give_up_leaks(&mut writer, word)?;
        let mut marks = ClusterSet::new();
        for shard in &self.dirty {
            marks.append(&mut locked(shard));
        }
        if marks.is_empty() {
            return self.sync_or_fail(&mut writer);
        }
        // Last what may find no space: then the rest is safe by that time. (Who was let
        // through without space is in `unreserved` before it is in the marks.)
        let (last, first): (ClusterSet, ClusterSet) = {
            let unreserved = locked(&self.unreserved);
            let is_unreserved = |(group, _): &(u64, u64)| unreserved.contains(group);
            marks.into_iter().partition(is_unreserved)
        };
        let mut passes = passes(first).chain(passes(last));
        while let Some(marks) = passes.next() {
            if let Err(e) = self.flush_clusters(&mut writer, &marks, word) {
                // They are not in the file yet. Those that are lose nothing by
                // being written again.
                for (group, bits) in marks.into_iter().chain(passes.flatten()) {
                    *locked(self.shard(group)).entry(group).or_default() |= bits;
                }
                return Err(e);
            }
            // What was written has space.
            let mut unreserved = locked(&self.unreserved);
            if !unreserved.is_empty() {
                unreserved.retain(|group| !marks.contains_key(group));
            }
        }
        Ok(())
    }

    /// An error if the file has no name any more: it will be gone with this process, and a
    /// name does not come back. (Another name is as good: it may have been moved.)
    pub fn expect_named(&self) -> Result<()> {
        let has_name = self.file.has_name(self.name.path());
        if has_name.map_err(|e| self.name.failed(e, "looking at"))? {
            return Ok(());
        }
        let what = "was removed while it was served: what is written to it will be lost \
                    when nbdkit ends";
        Err(Error::new(libc::EIO, format!("{} {what}", self.name)))
    }

    /// Somebody who does not heed locks may have cut the file, and tables with it.
    fn expect_whole(&self, writer: &mut Writer) -> Result<()> {
        let len = Self::len_of(&self.file, &self.name)?;
        if len >= self.layout.end {
            return Ok(());
        }
        let reason = format!(
            "cow-overlay={} was truncated to {len} bytes while it was served",
            self.name.path().display()
        );
        writer.failed = Some(reason.clone());
        Err(Error::new(libc::EIO, reason))
    }

    /// Whether the image keeps the export with this name. If nothing says yet which one
    /// it keeps, it is this one from the next change on.
    pub fn claim(&self, name: &[u8]) -> bool {
        let hash = header::hash(name);
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

    fn flush_clusters(
        &self,
        writer: &mut Writer,
        marks: &ClusterSet,
        word: &dyn Fn(GuestCluster) -> u64,
    ) -> Result<()> {
        let clusters = self.look_at(spans(marks), word)?;
        self.record_export()?;
        self.write_refcounts(writer, &clusters, true)?;
        self.sync_or_fail(writer)?;
        self.write_entries(writer, &clusters)?;
        self.write_refcounts(writer, &clusters, false)
    }

    /// `clusters` with the words that they have now.
    fn look_at(
        &self,
        clusters: impl Iterator<Item = GuestCluster>,
        word: &dyn Fn(GuestCluster) -> u64,
    ) -> Result<Vec<DirtyCluster>> {
        list(clusters.map(|cluster| DirtyCluster {
            cluster,
            word: word(cluster) & self.layout.valid_bits(cluster),
        }))
    }

    /// Writes the L2 entries; they are safe when this returns.
    ///
    /// Where they lie in one piece, that piece alone is synced, and not what other
    /// requests have written since the first sync: that would be new space, which
    /// costs the file system a transaction. It is written before without a sync, so
    /// that an error of the sync is known from one of the write (no space, say),
    /// after which nothing is lost.
    fn write_entries(&self, writer: &mut Writer, clusters: &[DirtyCluster]) -> Result<()> {
        let entry = |dirty: &DirtyCluster| self.layout.entry(dirty.cluster, dirty.word).to_bytes();
        let mut bytes = Vec::new();
        let mut at = 0;
        let mut pieces = 0;
        for run in runs(clusters) {
            bytes = list(run.iter().flat_map(entry))?;
            at = self.layout.entry_at(run[0].cluster);
            pieces += 1;
            self.write_at(&bytes, at)?;
        }
        match pieces {
            0 => Ok(()),
            1 => {
                let synced = self.file.write_synced(&bytes, at);
                self.expect_synced(writer, synced)
            }
            _ => self.sync_or_fail(writer),
        }
    }

    /// Writes the refcount 1 (`is_used`) for those that have data and the refcount 0, or
    /// 0 for those that have no data and the refcount 1. Those whose refcount is not known
    /// get one in any case.
    fn write_refcounts(
        &self,
        writer: &mut Writer,
        clusters: &[DirtyCluster],
        is_used: bool,
    ) -> Result<()> {
        let is_wrong = |dirty: &&DirtyCluster| {
            has_data(dirty.word) == is_used
                && (contains(&writer.used, dirty.cluster) != is_used
                    || contains(&writer.unknown, dirty.cluster))
        };
        let changed = list(clusters.iter().filter(is_wrong).copied())?;
        for run in runs(&changed) {
            let refcount = u16::from(is_used).to_be_bytes();
            let bytes = list(run.iter().flat_map(|_| refcount))?;
            let done = self.write_at(&bytes, self.layout.refcount_at(run[0].cluster));
            for dirty in run {
                set(&mut writer.unknown, dirty.cluster, done.is_err());
                if done.is_ok() {
                    set(&mut writer.used, dirty.cluster, is_used);
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
            let reason = self.name.failed(e, "syncing").to_string();
            writer.failed = Some(reason.clone());
            Error::new(libc::EIO, reason)
        })
    }
}

/// `marks`, so many at once as a flush takes.
fn passes(mut rest: ClusterSet) -> impl Iterator<Item = ClusterSet> {
    std::iter::from_fn(move || {
        let later = match rest.keys().nth(GROUPS_PER_PASS) {
            Some(&group) => rest.split_off(&group),
            None => ClusterSet::new(),
        };
        let marks = std::mem::replace(&mut rest, later);
        (!marks.is_empty()).then_some(marks)
    })
}

fn contains(set: &ClusterSet, cluster: GuestCluster) -> bool {
    let bits = set.get(&(cluster.0 / CLUSTERS_PER_GROUP));
    bits.is_some_and(|bits| bits.view_bits::<Lsb0>()[number_in_group(cluster)])
}

fn set(set: &mut ClusterSet, cluster: GuestCluster, is_in: bool) {
    let group = cluster.0 / CLUSTERS_PER_GROUP;
    if is_in || set.contains_key(&group) {
        let bits = set.entry(group).or_default();
        bits.view_bits_mut::<Lsb0>()
            .set(number_in_group(cluster), is_in);
    }
}

fn number_in_group(cluster: GuestCluster) -> usize {
    (cluster.0 % CLUSTERS_PER_GROUP) as usize
}

impl GroupCommit {
    /// What to tell one for whom the flush of number `wanted`, or any later one, is
    /// good enough; none if no such flush has ended yet.
    ///
    /// Others may have ended by the time that one who waited gets to ask.
    fn outcome_for(&self, wanted: u64) -> Option<Result<()>> {
        if self.good >= wanted {
            return Some(Ok(()));
        }
        let failure = self.failure.as_ref().filter(|_| self.ended >= wanted);
        failure.map(|(errno, message)| Err(Error::new(*errno, message.clone())))
    }
}

struct EndOfCommit<'a> {
    commits: &'a Mutex<GroupCommit>,
    commit_ended: &'a Condvar,
    failure: Option<(i32, String)>,
}

impl Drop for EndOfCommit<'_> {
    fn drop(&mut self) {
        let mut commits = locked(self.commits);
        commits.ended = commits.started;
        match self.failure.take() {
            None => commits.good = commits.ended,
            failure => commits.failure = failure,
        }
        self.commit_ended.notify_all();
    }
}

/// The clusters from the first to the last marked one of each group: those in
/// between go with them in one write.
fn spans(marks: &ClusterSet) -> impl Iterator<Item = GuestCluster> + '_ {
    marks.iter().flat_map(|(group, bits)| {
        let first = group * CLUSTERS_PER_GROUP;
        let start = first + u64::from(bits.trailing_zeros());
        let end = first + CLUSTERS_PER_GROUP - u64::from(bits.leading_zeros());
        (start..end).map(GuestCluster)
    })
}

/// `clusters` cut into runs of clusters that follow each other.
fn runs(clusters: &[DirtyCluster]) -> impl Iterator<Item = &[DirtyCluster]> {
    clusters.chunk_by(|a, b| a.cluster.0 + 1 == b.cluster.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_that_one_waited_for_counts_whatever_became_of_later_ones() {
        let commits = |good, ended| GroupCommit {
            started: ended,
            ended,
            good,
            failure: Some((libc::ENOSPC, "full".to_string())),
            waiting: 0,
            shared: 0,
        };
        let told = |commits: GroupCommit| commits.outcome_for(2).map(|outcome| outcome.is_ok());
        assert_eq!(told(commits(1, 1)), None);
        assert_eq!(told(commits(1, 2)), Some(false));
        assert_eq!(told(commits(1, 3)), Some(false));
        assert_eq!(told(commits(2, 2)), Some(true));
        assert_eq!(told(commits(2, 3)), Some(true));
        assert_eq!(told(commits(3, 3)), Some(true));
    }
}
