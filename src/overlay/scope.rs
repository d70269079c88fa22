//! Which overlay a connection gets.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Overlay, Store};
use crate::config::ScopeKind;
use crate::error::{Error, Result};

/// The overlays that outlive their connections.
pub struct Scope<S> {
    kind: ScopeKind,
    /// Outermost lock: an overlay is made under it, so that two first connections
    /// to an export get the same one. No request takes it.
    by_export: Mutex<HashMap<CString, Arc<Overlay<S>>>>,
}

impl<S: Store> Scope<S> {
    pub fn new(kind: ScopeKind) -> Self {
        Scope {
            kind,
            by_export: Mutex::new(HashMap::new()),
        }
    }

    /// The overlay for a connection to `export`, whose base has `size` bytes now;
    /// `make` makes one. EINVAL if there is one already and it was made for
    /// another size: its blocks would lie over bytes that have moved or gone.
    pub fn overlay(
        &self,
        export: &CStr,
        size: u64,
        make: impl FnOnce() -> Overlay<S>,
    ) -> Result<Arc<Overlay<S>>> {
        if self.kind == ScopeKind::Connection {
            return Ok(Arc::new(make()));
        }
        let mut overlays = self.by_export();
        if let Some(overlay) = overlays.get(export) {
            if overlay.size() == size {
                return Ok(Arc::clone(overlay));
            }
            return Err(Error::new(
                libc::EINVAL,
                format!(
                    "export {export:?} has {size} bytes now, but its overlay was made for \
                     {} bytes: the disk below must not be resized while nbdkit runs",
                    overlay.size()
                ),
            ));
        }
        let overlay = Arc::new(make());
        overlays.insert(export.to_owned(), Arc::clone(&overlay));
        Ok(overlay)
    }

    /// A connection to `export` gives up `overlay`. If it is the last one and
    /// nothing was written, the overlay is forgotten: with a plugin that takes any
    /// export name, a client could otherwise fill the memory with names.
    pub fn leave(&self, export: &CStr, overlay: &Arc<Overlay<S>>) {
        let mut overlays = self.by_export();
        // New holders come only from the table, which is locked: so two, the table
        // and the caller, stay two while this looks.
        if Arc::strong_count(overlay) == 2 && overlay.is_untouched() {
            overlays.remove(export);
        }
    }

    fn by_export(&self) -> MutexGuard<'_, HashMap<CString, Arc<Overlay<S>>>> {
        self.by_export
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockNum, BlockSize};
    use crate::overlay::{Directory, TemporaryStore};

    fn overlay(size: u64) -> Overlay<TemporaryStore> {
        let directory = Directory::from_environment().expect("a directory");
        let block_size = BlockSize::new(4096).expect("a block size");
        let store = TemporaryStore::new(Arc::new(directory), size);
        Overlay::new(size, block_size, store)
    }

    #[test]
    fn connections_to_an_export_share_what_was_written() {
        let scope = Scope::new(ScopeKind::Export);
        let get = |export, size| scope.overlay(export, size, || overlay(size));
        let first = get(c"a", 5000).expect("an overlay");
        let second = get(c"a", 5000).expect("an overlay");
        assert!(Arc::ptr_eq(&first, &second));
        assert!(!Arc::ptr_eq(&first, &get(c"b", 5000).expect("an overlay")));
        let refused = get(c"a", 5001).map(|_| ()).expect_err("another size");
        assert!(refused.to_string().contains("5000"), "{refused}");
        assert!(refused.to_string().contains("5001"), "{refused}");
    }

    #[test]
    fn an_overlay_is_forgotten_if_nobody_has_written_to_it() {
        let scope = Scope::new(ScopeKind::Export);
        let get = || {
            scope
                .overlay(c"a", 5000, || overlay(5000))
                .expect("an overlay")
        };
        let (first, second) = (get(), get());
        scope.leave(c"a", &first);
        drop(first);
        assert!(Arc::ptr_eq(&second, &get()), "it is in use still");

        let touched = BlockNum(0)..BlockNum(1);
        scope.leave(c"a", &second);
        drop(second);
        let third = get();
        assert!(third.is_untouched(), "a new one");
        third.map.set_zero(&touched).expect("in range");
        scope.leave(c"a", &third);
        drop(third);
        assert!(!get().is_untouched(), "what was written is kept");
    }
}
