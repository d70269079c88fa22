//! Which export has which overlay, and who uses it.
//!
//! An overlay is one of two kinds, and all those of a filter are of one. Which kind is
//! known here and in [`Connection`](super::Connection), and nowhere below.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::config::{Config, ScopeKind};
use super::stats::{Figures, Taken, Total};
use crate::base::Base;
use crate::block::BlockSize;
use crate::counters::{Counter, Counts};
use crate::error::{Error, Result};
use crate::kept::{Kept, KeptStore, Wanted};
use crate::overlay::{Account, Budget, Overlay, Reclaim, Store};
use crate::sync::{Mutex, MutexGuard, locked};
use crate::temporary::{Directory, TemporaryStore};

/// So many of the files that a process may have open are left to clients that connect, for
/// each of which nbdkit needs three or four: or one who writes to a thousand exports would
/// lock all others out.
const FILES_FOR_CLIENTS: u64 = 256;

/// The overlays of a filter.
pub enum Exports {
    Temporary(Temporary),
    Kept(Box<Kept>, Users<KeptStore<File>>),
}

/// Where temporary overlays come from.
pub struct Temporary {
    block_size: BlockSize,
    directory: Arc<Directory>,
    reclaim: Arc<Reclaim>,
    /// With a limit.
    budget: Option<Arc<Budget>>,
    users: Users<TemporaryStore>,
}

/// The overlay of a connection, of either kind.
pub enum Member<'a> {
    Temporary(Use<'a, TemporaryStore>),
    Kept(Use<'a, KeptStore<File>>),
}

/// Does the same with the overlay of either kind.
macro_rules! each {
    ($member:expr, $overlay:ident => $call:expr) => {
        match $member {
            $crate::filter::exports::Member::Temporary(used) => {
                let $overlay = used.overlay();
                $call
            }
            $crate::filter::exports::Member::Kept(used) => {
                let $overlay = used.overlay();
                $call
            }
        }
    };
}
pub(super) use each;

impl Exports {
    /// Fails if the directory of the overlays, or the image that is to be one, is not
    /// fit for it, or the limit is too small for anything.
    pub fn new(
        config: &Config,
        reclaim: &Arc<Reclaim>,
        budget: Option<Arc<Budget>>,
    ) -> Result<Self> {
        let Some(path) = &config.overlay else {
            if config.backing.is_some() {
                return Err(Error::new(
                    libc::EINVAL,
                    "cow-backing is of no use without cow-overlay",
                ));
            }
            return Ok(Exports::Temporary(Temporary::new(config, reclaim, budget)?));
        };
        if config.scope == ScopeKind::Connection {
            return Err(Error::new(
                libc::EINVAL,
                "cow-scope=connection can't be used with cow-overlay: \
                 one file can't keep an overlay for every connection",
            ));
        }
        let kept = Kept::start(Wanted {
            path: path.clone(),
            block_size: config.block_size,
            backing: config.backing(),
            reclaim: Arc::clone(reclaim),
            budget,
        })?;
        Ok(Exports::Kept(Box::new(kept), Users::new(config.scope)))
    }

    /// The overlay for a connection to `export`, over `base`. EINVAL if it was made for
    /// another size or another disk, or can't serve this export.
    pub fn join(&self, export: &CStr, base: &impl Base) -> Result<Member<'_>> {
        let size = base.size();
        match self {
            Exports::Temporary(temporary) => temporary.join(export, size).map(Member::Temporary),
            Exports::Kept(kept, users) => {
                kept.expect_fits(size)?;
                users
                    .join(export, size, |other| kept.overlay(export, base, other))
                    .map(Member::Kept)
            }
        }
    }

    /// What was counted so far, in all.
    pub fn total(&self) -> Total {
        match self {
            Exports::Temporary(temporary) => temporary.users.total(),
            Exports::Kept(_, users) => users.total(),
        }
    }

    /// What there is to tell of each export.
    pub fn figures(&self) -> Vec<Figures> {
        match self {
            Exports::Temporary(temporary) => temporary.users.figures(),
            Exports::Kept(_, users) => users.figures(),
        }
    }

    /// What the overlays take of which there are these `figures`. (One that is kept is there
    /// without a client.)
    pub fn taken(&self, figures: &[Figures]) -> Taken {
        let mut taken = Taken::default();
        match self {
            Exports::Kept(kept, _) if figures.is_empty() => {
                if let Some(overlay) = kept.current() {
                    taken += Taken::by(&overlay);
                }
            }
            _ => figures.iter().for_each(|export| taken += export.taken),
        }
        taken
    }
}

impl Member<'_> {
    /// What there is to tell of its export.
    pub fn figures(&self) -> Option<Figures> {
        match self {
            Member::Temporary(used) => used.users.figures_of(&used.export),
            Member::Kept(used) => used.users.figures_of(&used.export),
        }
    }
}

impl Temporary {
    fn new(config: &Config, reclaim: &Arc<Reclaim>, budget: Option<Arc<Budget>>) -> Result<Self> {
        // An overlay of a connection needs a file of its own, and ends with it.
        let files_for_clients = match config.scope {
            ScopeKind::Export => FILES_FOR_CLIENTS,
            ScopeKind::Connection => 0,
        };
        let directory = Directory::from_environment()?.leaving_files(files_for_clients);
        let block_size = config
            .block_size
            .unwrap_or_else(|| directory.file_system().default_block_size());
        log::debug!(
            "overlays in {}, block size {block_size}",
            directory.path().display()
        );
        if let Some(budget) = &budget {
            budget.expect_room_for_a_block(block_size, 0)?;
        }
        Ok(Temporary {
            block_size,
            directory: Arc::new(directory),
            reclaim: Arc::clone(reclaim),
            budget,
            users: Users::new(config.scope),
        })
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn join(&self, export: &CStr, size: u64) -> Result<Use<'_, TemporaryStore>> {
        let make = || {
            log::debug!("new overlay for export {export:?} of {size} bytes");
            let store = TemporaryStore::new(Arc::clone(&self.directory), size);
            Overlay::new(size, self.block_size, store)
                .limited(self.budget.as_ref().map(Account::new))
                .join(&self.reclaim)
        };
        self.users.join(export, size, |_| Ok(make()))
    }
}

/// The exports that have connections, or an overlay that something was written to.
pub struct Users<S> {
    scope: ScopeKind,
    /// Outermost lock: an overlay is made under it, so that two first connections
    /// to an export get the same one. No request takes it.
    known: Mutex<Known<S>>,
}

struct Known<S> {
    by_name: BTreeMap<CString, Export<S>>,
    connections: usize,
    /// What was counted for exports that are not known any more.
    forgotten: Counts,
}

struct Export<S> {
    connections: usize,
    /// One that they share, or one for each.
    overlays: Vec<Arc<Overlay<S>>>,
    /// What was counted for overlays that are gone.
    gone: Counts,
}

/// A connection's use of an overlay, which ends when this is dropped.
pub struct Use<'a, S: Store> {
    overlay: Arc<Overlay<S>>,
    users: &'a Users<S>,
    export: CString,
}

impl<S: Store> Users<S> {
    fn new(scope: ScopeKind) -> Self {
        Users {
            scope,
            known: Mutex::new(Known {
                by_name: BTreeMap::new(),
                connections: 0,
                forgotten: Counts::default(),
            }),
        }
    }

    /// An overlay of `export`, whose base has `size` bytes now. If there is none that can be
    /// shared `make` makes it; it is told of another export that has one. EINVAL if the
    /// overlay was made for another size: its blocks would lie over bytes that have moved or
    /// gone.
    fn join(
        &self,
        export: &CStr,
        size: u64,
        make: impl FnOnce(Option<&CStr>) -> Result<Arc<Overlay<S>>>,
    ) -> Result<Use<'_, S>> {
        let mut known = self.known();
        let shared = match (self.scope, known.by_name.get(export)) {
            (ScopeKind::Export, Some(known)) => known.overlays.first(),
            _ => None,
        };
        let overlay = match shared {
            Some(overlay) if overlay.size() != size => {
                return Err(Error::new(
                    libc::EINVAL,
                    format!(
                        "export {export:?} has {size} bytes now, but its overlay was made for \
                         {} bytes: the disk below must not be resized while nbdkit runs",
                        overlay.size()
                    ),
                ));
            }
            Some(overlay) => Arc::clone(overlay),
            None => {
                let overlay = make(known.by_name.keys().next().map(|other| &**other))?;
                let export = known.by_name.entry(export.to_owned()).or_default();
                export.overlays.push(Arc::clone(&overlay));
                overlay
            }
        };
        if let Some(export) = known.by_name.get_mut(export) {
            export.connections += 1;
        }
        known.connections += 1;
        overlay.counters().add(Counter::Connections, 1);
        Ok(Use {
            overlay,
            users: self,
            export: export.to_owned(),
        })
    }

    /// A connection to `export` ends, which has used `overlay`. If it is the last one and
    /// nothing was written, the export is forgotten: with a plugin that takes any export
    /// name, a client could otherwise fill the memory with names.
    fn leave(&self, export: &CStr, overlay: &Arc<Overlay<S>>) {
        let known = &mut *self.known();
        known.connections -= 1;
        let Some(left) = known.by_name.get_mut(export) else {
            return;
        };
        left.connections -= 1;
        if self.scope == ScopeKind::Connection {
            left.overlays.retain(|other| !Arc::ptr_eq(other, overlay));
            left.gone += &overlay.counters().take();
        }
        let is_untouched = |overlay: &Arc<Overlay<S>>| overlay.is_untouched();
        if left.connections == 0 && left.overlays.iter().all(is_untouched) {
            known.forgotten += &left.gone;
            for overlay in &left.overlays {
                // A kept one stays, and the next export that has it counts anew.
                known.forgotten += &overlay.counters().take();
            }
            known.by_name.remove(export);
        }
    }

    fn known(&self) -> MutexGuard<'_, Known<S>> {
        locked(&self.known)
    }

    /// What was counted so far, in all.
    fn total(&self) -> Total {
        let known = self.known();
        let mut counts = known.forgotten.clone();
        for export in known.by_name.values() {
            counts += &export.counts();
        }
        Total {
            connections: known.connections,
            counts,
        }
    }

    /// What there is to tell of each export.
    fn figures(&self) -> Vec<Figures> {
        let known = self.known();
        let exports: Vec<_> = known.by_name.iter().map(Seen::of).collect();
        // Looking through the maps can take time.
        drop(known);
        exports.into_iter().map(Seen::figures).collect()
    }

    /// The same of one export.
    fn figures_of(&self, export: &CStr) -> Option<Figures> {
        let seen = self.known().by_name.get_key_value(export).map(Seen::of);
        seen.map(Seen::figures)
    }
}

/// An export as it was seen under the lock.
struct Seen<S> {
    name: CString,
    connections: usize,
    counts: Counts,
    overlays: Vec<Arc<Overlay<S>>>,
}

impl<S: Store> Seen<S> {
    fn of((name, export): (&CString, &Export<S>)) -> Self {
        Seen {
            name: name.clone(),
            connections: export.connections,
            counts: export.counts(),
            overlays: export.overlays.clone(),
        }
    }

    fn figures(self) -> Figures {
        let mut figures = Figures {
            name: self.name.to_string_lossy().into_owned(),
            total: Total {
                connections: self.connections,
                counts: self.counts,
            },
            ..Figures::default()
        };
        for overlay in &self.overlays {
            figures.size = overlay.size();
            figures.block_size = overlay.block_size().bytes();
            figures.taken += Taken::by(overlay);
        }
        figures
    }
}

impl<S: Store> Export<S> {
    fn counts(&self) -> Counts {
        let mut counts = self.gone.clone();
        for overlay in &self.overlays {
            counts += &overlay.counters().sum();
        }
        counts
    }
}

impl<S> Default for Export<S> {
    fn default() -> Self {
        Export {
            connections: 0,
            overlays: Vec::new(),
            gone: Counts::default(),
        }
    }
}

impl<S: Store> Use<'_, S> {
    #[inline(always)]
    pub fn overlay(&self) -> &Overlay<S> {
        &self.overlay
    }
}

impl<S: Store> Drop for Use<'_, S> {
    fn drop(&mut self) {
        self.users.leave(&self.export, &self.overlay);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overlay::Zeroing;

    fn temporary(scope: ScopeKind) -> Temporary {
        let config = Config {
            scope,
            ..Config::default()
        };
        Temporary::new(&config, &Arc::default(), None).expect("a directory")
    }

    fn is_same(a: &Use<'_, TemporaryStore>, b: &Use<'_, TemporaryStore>) -> bool {
        std::ptr::eq(a.overlay(), b.overlay())
    }

    #[test]
    fn connections_to_an_export_share_what_was_written() {
        let exports = temporary(ScopeKind::Export);
        let get = |export, size| exports.join(export, size);
        let first = get(c"a", 5000).expect("an overlay");
        let second = get(c"a", 5000).expect("an overlay");
        assert!(is_same(&first, &second));
        assert!(!is_same(&first, &get(c"b", 5000).expect("an overlay")));
        let refused = get(c"a", 5001).map(|_| ()).expect_err("another size");
        assert!(refused.to_string().contains("5000"), "{refused}");
        assert!(refused.to_string().contains("5001"), "{refused}");
    }

    #[test]
    fn each_connection_has_its_own_where_that_is_wanted() {
        let exports = temporary(ScopeKind::Connection);
        let get = || exports.join(c"a", 5000).expect("an overlay");
        assert!(!is_same(&get(), &get()));
    }

    #[test]
    fn an_overlay_is_forgotten_if_nobody_has_written_to_it() {
        let exports = temporary(ScopeKind::Export);
        let get = || exports.join(c"a", 5000).expect("an overlay");
        let known = || exports.users.known().by_name.len();
        let (first, second) = (get(), get());
        drop(first);
        assert!(is_same(&second, &get()), "it is in use still");
        drop(second);
        assert_eq!(known(), 0);

        let third = get();
        third
            .overlay()
            .zero(&NoBase, 0, 4096, Zeroing::Trim)
            .expect("zeroed");
        drop(third);
        assert!(!get().overlay().is_untouched(), "what was written is kept");
    }

    /// A base that nobody is to ask for anything.
    struct NoBase;

    impl crate::base::Base for NoBase {
        fn size(&self) -> u64 {
            5000
        }

        fn read(&self, _buf: &mut [u8], _offset: u64) -> Result<()> {
            unreachable!("not read")
        }

        fn cache(&self, _range: crate::block::ByteRange) -> Result<()> {
            unreachable!("not cached")
        }

        fn extents(
            &self,
            _range: crate::block::ByteRange,
            _only_first: bool,
            _list: &mut Vec<crate::base::Extent>,
        ) -> Result<()> {
            unreachable!("not asked")
        }
    }
}
