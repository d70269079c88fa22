//! Which overlay a connection gets.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::sync::{Arc, Mutex, PoisonError};

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
        let mut overlays = self
            .by_export
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
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
}
