//! Space for the tables, taken before a block changes whose change they are to keep: a
//! full file system then makes that request fail, and not the flush that is to make it,
//! and all that was answered before it, safe.
//!
//! With `cow-limit` this space counts too: [`GROUP_TABLES_LEN`] for each group that has or
//! gets it. Those that had entries when the image was opened were counted then.

use std::ops::Range;
use std::sync::Arc;

use super::super::file::ImageFile;
use super::super::layout::{ENTRY_LEN, GuestCluster, REFCOUNT_LEN};
use super::group_set::GROUPS_PER_WORD;
use super::{CLUSTERS_PER_GROUP, Image, ones};
use crate::error::Result;
use crate::overlay::{Account, Purpose};
use crate::sync::locked;

/// Bytes of a group's L2 entries and refcounts.
pub const GROUP_TABLES_LEN: u64 = CLUSTERS_PER_GROUP * (ENTRY_LEN + REFCOUNT_LEN);

impl<F: ImageFile> Image<F> {
    /// The same image, with what its tables take charged to `account`, if there is one. To
    /// be called before anything is loaded.
    pub fn limited(mut self, account: Option<&Arc<Account>>) -> Self {
        self.account = account.map(Arc::clone);
        self
    }

    /// What the tables are charged to.
    pub fn account(&self) -> Option<&Arc<Account>> {
        self.account.as_ref()
    }

    /// Takes the space for the tables of `clusters`. ENOSPC if there is none.
    ///
    /// A discard is let through where there is an entry already: it has space, unless a
    /// copy of the file shares it (or the file system asks for more than it needs), and
    /// who discards may do so to make room. Flushes write those entries last.
    ///
    /// No lock is held while the file system works. Two who take the same space do no
    /// harm. Nor is one held to see that there is space, which nearly every write does. Who
    /// sees the bit relies on nothing but that the file system was asked before, whoever
    /// asked it: the bit is set when it has answered (*release*), and space is never given
    /// back. Who does not see it yet asks once more.
    pub fn reserve(&self, clusters: Range<GuestCluster>, purpose: Purpose) -> Result<()> {
        let groups =
            clusters.start.0 / CLUSTERS_PER_GROUP..clusters.end.0.div_ceil(CLUSTERS_PER_GROUP);
        for key in groups.start / GROUPS_PER_WORD..groups.end.div_ceil(GROUPS_PER_WORD) {
            let first = key * GROUPS_PER_WORD;
            let from = groups.start.max(first) - first;
            let to = groups.end.min(first + GROUPS_PER_WORD) - first;
            let wanted = (u64::MAX >> (GROUPS_PER_WORD - (to - from))) << from;
            let missing = wanted & !self.reserved.word(key);
            if missing != 0 {
                self.reserve_missing(key, missing, purpose)?;
            }
        }
        Ok(())
    }

    /// Does it for the groups of word `key` whose bits are in `missing`.
    #[cold]
    fn reserve_missing(&self, key: u64, missing: u64, purpose: Purpose) -> Result<()> {
        let first = key * GROUPS_PER_WORD;
        let start = first + u64::from(missing.trailing_zeros());
        let end = first + GROUPS_PER_WORD - u64::from(missing.leading_zeros());
        let groups = |bits| ones(bits).map(|i| first + i);
        let described = self.described.word(key);
        let uncounted = tables_len(missing & !described);
        let charge = self.account.as_ref();
        let charge = charge.map(|account| account.charge(uncounted, purpose.share()));
        let charge = match charge.transpose() {
            Ok(charge) => charge,
            Err(refused) => {
                // What has no room any more may be just these tables, taken by another.
                let left = missing & !self.reserved.word(key);
                return match left {
                    0 => Ok(()),
                    _ if left == missing => Err(refused),
                    _ => self.reserve_missing(key, left, purpose),
                };
            }
        };
        let taken = self.take_space(start..end);
        // Under the hold, or a group that another has given space meanwhile would be among
        // the unreserved ones for good; or would be charged twice.
        let mut unreserved = locked(&self.unreserved);
        let reserved = self.reserved.word(key);
        if let Err(e) = taken {
            let is_discard = purpose == Purpose::Zero;
            if !is_discard || missing & !(described | reserved) != 0 {
                return Err(e);
            }
            log::debug!("discards all the same: {e}");
            unreserved.extend(groups(missing & !reserved));
            return Ok(());
        }
        self.reserved.insert(key, missing)?;
        for group in groups(missing) {
            unreserved.remove(&group);
        }
        drop(unreserved);
        if let Some(charge) = charge {
            charge.settle(tables_len(missing & !described & !reserved));
        }
        Ok(())
    }

    /// For all tables of `groups`, in one piece each. (A cluster that never gets data
    /// needs no refcount. It is an eighth more; to know which groups lack it would be
    /// more to know.)
    fn take_space(&self, groups: Range<u64>) -> Result<()> {
        let first = GuestCluster(groups.start * CLUSTERS_PER_GROUP);
        let clusters = (groups.end - groups.start) * CLUSTERS_PER_GROUP;
        let entries = self.layout.entry_at(first);
        let entries_end = entries + clusters * ENTRY_LEN;
        let refcounts = self.layout.refcount_at(first);
        let refcounts_end = refcounts + clusters * REFCOUNT_LEN;
        let file = self.changing()?;
        // The last group may not be whole.
        for (at, end) in [
            (entries, entries_end.min(self.layout.data)),
            (refcounts, refcounts_end.min(self.layout.l1)),
        ] {
            file.reserve(at, end - at).map_err(|e| {
                let operation = "taking space for tables of";
                self.name.write_failed_at(e, operation, at, end - at)
            })?;
        }
        Ok(())
    }
}

/// What the tables of the groups take whose bits are in `groups`.
fn tables_len(groups: u64) -> u64 {
    u64::from(groups.count_ones()) * GROUP_TABLES_LEN
}
