//! Which export has which overlay, and who uses it.
//!
//! An overlay is one of two kinds, and all those of a filter are of one. Which kind is
//! known here and in [`Connection`](super::Connection), and nowhere below.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::config::{Config, ScopeKind};
use crate::base::Base;
use crate::block::BlockSize;
use crate::error::{Error, Result};
use crate::kept::{Kept, KeptStore, Wanted};
use crate::overlay::{Overlay, Reclaim, Store};
use crate::sync::{Mutex, MutexGuard, locked};
use crate::temporary::{Directory, TemporaryStore};

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
    /// `None`: each connection has an overlay of its own.
    users: Option<Users<TemporaryStore>>,
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
    /// fit for it.
    pub fn new(config: &Config, reclaim: &Arc<Reclaim>) -> Result<Self> {
        let Some(path) = &config.overlay else {
            if config.backing.is_some() {
                return Err(Error::new(
                    libc::EINVAL,
                    "cow-backing is of no use without cow-overlay",
                ));
            }
            return Ok(Exports::Temporary(Temporary::new(config, reclaim)?));
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
        })?;
        Ok(Exports::Kept(Box::new(kept), Users::default()))
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
}

impl Temporary {
    fn new(config: &Config, reclaim: &Arc<Reclaim>) -> Result<Self> {
        let directory = Directory::from_environment()?;
        let block_size = config
            .block_size
            .unwrap_or_else(|| directory.file_system().default_block_size());
        log::debug!(
            "overlays in {}, block size {block_size}",
            directory.path().display()
        );
        Ok(Temporary {
            block_size,
            directory: Arc::new(directory),
            reclaim: Arc::clone(reclaim),
            users: match config.scope {
                ScopeKind::Export => Some(Users::default()),
                ScopeKind::Connection => None,
            },
        })
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn join(&self, export: &CStr, size: u64) -> Result<Use<'_, TemporaryStore>> {
        let make = || {
            log::debug!("new overlay for export {export:?} of {size} bytes");
            let store = TemporaryStore::new(Arc::clone(&self.directory), size);
            Overlay::new(size, self.block_size, store).join(&self.reclaim)
        };
        match &self.users {
            Some(users) => users.join(export, size, |_| Ok(make())),
            None => Ok(Use::Alone(make())),
        }
    }
}

/// The overlays that outlive their connections, and how many use each.
pub struct Users<S> {
    /// Outermost lock: an overlay is made under it, so that two first connections
    /// to an export get the same one. No request takes it.
    by_export: Mutex<HashMap<CString, Shared<S>>>,
}

struct Shared<S> {
    overlay: Arc<Overlay<S>>,
    connections: usize,
}

/// A connection's use of an overlay, which ends when this is dropped.
pub enum Use<'a, S: Store> {
    /// Nobody else can have it.
    Alone(Arc<Overlay<S>>),
    Shared {
        overlay: Arc<Overlay<S>>,
        users: &'a Users<S>,
        export: CString,
    },
}

impl<S> Default for Users<S> {
    fn default() -> Self {
        Users {
            by_export: Mutex::default(),
        }
    }
}

impl<S: Store> Users<S> {
    /// The overlay of `export`, whose base has `size` bytes now. If there is none yet
    /// `make` makes it; it is told of another export that has one. EINVAL if the overlay
    /// was made for another size: its blocks would lie over bytes that have moved or gone.
    fn join(
        &self,
        export: &CStr,
        size: u64,
        make: impl FnOnce(Option<&CStr>) -> Result<Arc<Overlay<S>>>,
    ) -> Result<Use<'_, S>> {
        let mut by_export = self.by_export();
        let overlay = match by_export.get_mut(export) {
            Some(shared) if shared.overlay.size() != size => {
                return Err(Error::new(
                    libc::EINVAL,
                    format!(
                        "export {export:?} has {size} bytes now, but its overlay was made for \
                         {} bytes: the disk below must not be resized while nbdkit runs",
                        shared.overlay.size()
                    ),
                ));
            }
            Some(shared) => {
                shared.connections += 1;
                Arc::clone(&shared.overlay)
            }
            None => {
                let overlay = make(by_export.keys().next().map(|other| &**other))?;
                let shared = Shared {
                    overlay: Arc::clone(&overlay),
                    connections: 1,
                };
                by_export.insert(export.to_owned(), shared);
                overlay
            }
        };
        Ok(Use::Shared {
            overlay,
            users: self,
            export: export.to_owned(),
        })
    }

    /// A connection to `export` ends. If it is the last one and nothing was written, the
    /// overlay is forgotten: with a plugin that takes any export name, a client could
    /// otherwise fill the memory with names.
    fn leave(&self, export: &CStr) {
        let mut by_export = self.by_export();
        let Some(shared) = by_export.get_mut(export) else {
            return;
        };
        shared.connections -= 1;
        if shared.connections == 0 && shared.overlay.is_untouched() {
            by_export.remove(export);
        }
    }

    fn by_export(&self) -> MutexGuard<'_, HashMap<CString, Shared<S>>> {
        locked(&self.by_export)
    }
}

impl<S: Store> Use<'_, S> {
    #[inline(always)]
    pub fn overlay(&self) -> &Overlay<S> {
        match self {
            Use::Alone(overlay) | Use::Shared { overlay, .. } => overlay,
        }
    }
}

impl<S: Store> Drop for Use<'_, S> {
    fn drop(&mut self) {
        if let Use::Shared { users, export, .. } = self {
            users.leave(export);
        }
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
        Temporary::new(&config, &Arc::default()).expect("a directory")
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
        let known = || exports.users.as_ref().expect("shared").by_export().len();
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
