//! What nbdkit's callbacks mean, in safe Rust.
//!
//! The life of a filter: [`Filter::new`] when all parameters are known and
//! before nbdkit goes into the background; [`Filter::connect`] when a client has
//! chosen an export; then that connection's requests, in parallel, until it is
//! dropped.

use std::ffi::{CStr, CString};
use std::sync::Arc;

use crate::base::{Base, Extent};
use crate::block::BlockSize;
use crate::config::{Config, ScopeKind};
use crate::error::Result;
use crate::overlay::scope::Scope;
use crate::overlay::{Directory, Overlay, TemporaryStore, Zeroing};

/// Block-size advice to clients, in bytes (NBD_INFO_BLOCK_SIZE).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Advice {
    pub minimum: u32,
    pub preferred: u32,
    pub maximum: u32,
}

/// nbdkit refuses a preferred size above this.
const MAX_PREFERRED: u64 = 32 << 20;

/// What all connections share.
pub struct Filter {
    config: Config,
    block_size: BlockSize,
    directory: Arc<Directory>,
    scope: Scope<TemporaryStore>,
    user: nix::unistd::Uid,
}

impl Filter {
    /// Fails if the directory of the overlay is not fit for it.
    pub fn new(config: Config) -> Result<Self> {
        let directory = Directory::from_environment()?;
        let block_size = config
            .block_size
            .unwrap_or_else(|| directory.default_block_size());
        log::debug!(
            "overlays in {}, block size {block_size}, {config:?}",
            directory.path().display()
        );
        Ok(Filter {
            block_size,
            directory: Arc::new(directory),
            scope: Scope::new(config.scope),
            config,
            user: nix::unistd::geteuid(),
        })
    }

    /// Looks at the directory again if nbdkit has become another user (`-u`)
    /// since [`Filter::new`]. One overlay file is there already and will do for
    /// most, so that this user can make no others is only worth a warning.
    pub fn recheck(&self) {
        if nix::unistd::geteuid() == self.user {
            return;
        }
        if let Err(e) = Directory::open(self.directory.path()) {
            log::warn!("only one overlay file can be had: as the user that nbdkit is now, {e}");
        }
    }

    /// A connection to `export`, whose base has `size` bytes.
    /// EINVAL if its overlay was made for another size.
    pub fn connect(&self, export: &CStr, size: u64) -> Result<Connection<'_>> {
        let overlay = self.scope.overlay(export, size, || {
            log::debug!("new overlay for export {export:?} of {size} bytes");
            let store = TemporaryStore::new(Arc::clone(&self.directory), size);
            Overlay::new(size, self.block_size, store)
        })?;
        Ok(Connection {
            filter: self,
            export: export.to_owned(),
            overlay,
        })
    }
}

/// A client's connection to an export.
pub struct Connection<'a> {
    filter: &'a Filter,
    export: CString,
    overlay: Arc<Overlay<TemporaryStore>>,
}

impl Connection<'_> {
    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.overlay.size()
    }

    /// Whether what one connection has written is seen by the others.
    pub fn can_multi_conn(&self) -> bool {
        self.filter.config.scope == ScopeKind::Export
    }

    /// The advice to the client, given that of the layer below (`None`: it has none).
    pub fn advice(&self, below: Option<Advice>) -> Advice {
        advice(self.filter.block_size, below)
    }

    pub fn read(&self, base: &impl Base, buf: &mut [u8], offset: u64) -> Result<()> {
        log::trace!("request: read {} bytes at {offset}", buf.len());
        let copy = self.filter.config.on_read.is_on();
        self.overlay.read(base, buf, offset, copy)
    }

    pub fn write(&self, base: &impl Base, buf: &[u8], offset: u64) -> Result<()> {
        log::trace!("request: write {} bytes at {offset}", buf.len());
        self.overlay.write(base, buf, offset)
    }

    pub fn zero(&self, base: &impl Base, offset: u64, len: u64, how: Zeroing) -> Result<()> {
        log::trace!("request: zero {len} bytes at {offset}, {how:?}");
        self.overlay.zero(base, offset, len, how)
    }

    pub fn trim(&self, base: &impl Base, offset: u64, len: u64) -> Result<()> {
        log::trace!("request: trim {len} bytes at {offset}");
        self.overlay.zero(base, offset, len, Zeroing::Trim)
    }

    /// Nothing is left to do: a temporary overlay need not survive anything, and
    /// all connections see what was written.
    pub fn flush(&self) -> Result<()> {
        log::trace!("request: flush");
        Ok(())
    }

    pub fn cache(&self, base: &impl Base, offset: u64, len: u64) -> Result<()> {
        log::trace!("request: cache {len} bytes at {offset}");
        let copy = self.filter.config.on_cache;
        self.overlay.cache(base, offset, len, copy)
    }

    pub fn extents(
        &self,
        base: &impl Base,
        offset: u64,
        len: u64,
        only_first: bool,
    ) -> Result<Vec<Extent>> {
        log::trace!("request: extents of {len} bytes at {offset}, only_first={only_first}");
        self.overlay.extents(base, offset, len, only_first)
    }
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        self.filter.scope.leave(&self.export, &self.overlay);
    }
}

fn advice(block_size: BlockSize, below: Option<Advice>) -> Advice {
    let preferred = block_size.bytes().min(MAX_PREFERRED) as u32;
    match below {
        // We split requests ourselves, so any size is right.
        None => Advice {
            minimum: 1,
            preferred,
            maximum: u32::MAX,
        },
        Some(below) if below.maximum >= preferred => Advice {
            preferred: below.preferred.max(preferred),
            ..below
        },
        Some(below) => below,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(block_size: u64, below: Option<(u32, u32, u32)>) -> (u32, u32, u32) {
        let block_size = BlockSize::new(block_size).expect("a block size");
        let below = below.map(|(minimum, preferred, maximum)| Advice {
            minimum,
            preferred,
            maximum,
        });
        let advice = advice(block_size, below);
        (advice.minimum, advice.preferred, advice.maximum)
    }

    #[test]
    fn without_constraints_below_any_size_goes_and_the_block_size_is_best() {
        assert_eq!(of(4096, None), (1, 4096, u32::MAX));
        assert_eq!(of(1 << 31, None), (1, 32 << 20, u32::MAX));
    }

    #[test]
    fn constraints_below_are_kept_but_the_preferred_size_is_raised() {
        assert_eq!(of(65536, Some((512, 4096, 1 << 20))), (512, 65536, 1 << 20));
        assert_eq!(of(4096, Some((512, 65536, 1 << 20))), (512, 65536, 1 << 20));
        assert_eq!(of(65536, Some((512, 4096, 32768))), (512, 4096, 32768));
    }
}
