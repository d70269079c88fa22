//! What nbdkit's callbacks mean, in safe Rust.
//!
//! The life of a filter: [`Filter::new`] when all parameters are known and
//! before nbdkit goes into the background; [`Filter::connect`] when a client has
//! chosen an export; then that connection's requests, in parallel, until it is
//! dropped.

use std::ffi::{CStr, CString};
use std::process;
use std::sync::{Arc, OnceLock};

use nix::unistd::{Uid, geteuid};

use crate::base::{Base, Extent};
use crate::block::BlockSize;
use crate::config::{Config, FilesBelow, ScopeKind};
use crate::error::{Error, Result};
use crate::overlay::kept::Kept;
use crate::overlay::scope::Scope;
use crate::overlay::{Directory, Files, Overlay, TemporaryStore, Zeroing};

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
    overlays: Overlays,
    user: Uid,
    process: u32,
    /// Why nobody is served.
    unfit: OnceLock<String>,
}

/// Where what is written goes.
enum Overlays {
    Temporary {
        block_size: BlockSize,
        directory: Arc<Directory>,
        scope: Scope<Files>,
    },
    Kept(Kept),
}

impl Filter {
    /// Fails if the directory of the overlay, or the image that is to be one, is not
    /// fit for it.
    pub fn new(config: Config) -> Result<Self> {
        log::debug!("{config:?}");
        let overlays = match &config.overlay {
            Some(path) => Overlays::Kept(Kept::start(path, &config)?),
            None if config.backing.is_some() => {
                return Err(Error::new(
                    libc::EINVAL,
                    "cow-backing is of no use without cow-overlay",
                ));
            }
            None => Self::temporary(&config)?,
        };
        Ok(Filter {
            overlays,
            config,
            user: geteuid(),
            process: process::id(),
            unfit: OnceLock::new(),
        })
    }

    fn temporary(config: &Config) -> Result<Overlays> {
        let directory = Directory::from_environment()?;
        let block_size = config
            .block_size
            .unwrap_or_else(|| directory.default_block_size());
        log::debug!(
            "overlays in {}, block size {block_size}",
            directory.path().display()
        );
        Ok(Overlays::Temporary {
            block_size,
            directory: Arc::new(directory),
            scope: Scope::new(config.scope),
        })
    }

    /// Looks at the directory again if nbdkit has become another user (`-u`)
    /// since [`Filter::new`]. One overlay file is there already and will do for
    /// most, so that this user can make no others is only worth a warning.
    pub fn recheck(&self) {
        let Overlays::Temporary { directory, .. } = &self.overlays else {
            return;
        };
        if geteuid() == self.user {
            return;
        }
        if let Err(e) = Directory::open(directory.path()) {
            log::warn!("only one overlay file can be had: as the user that nbdkit is now, {e}");
        }
    }

    /// Tells before any client connects whether the overlay that is kept fits the
    /// base; `size` asks the base for its size in bytes.
    pub fn check_base(&self, size: impl FnOnce() -> Result<u64>) -> Result<()> {
        let Overlays::Kept(kept) = &self.overlays else {
            return Ok(());
        };
        // A plugin of several disks may ask which export the client has chosen, and some
        // crash where there is no client (file with dir=). One that was given a file
        // has one disk.
        let FilesBelow::One(_) = self.config.files_below else {
            return Ok(());
        };
        match size() {
            Ok(size) => kept.prepare(size).or_else(|e| self.refuse_all(e)),
            Err(e) => {
                // A plugin may have no default export: the first client will see.
                log::debug!("the size of the disk is not known before a client connects: {e}");
                Ok(())
            }
        }
    }

    /// Where nbdkit has forked, whoever started it would not see it end: the command of
    /// `--run` waits for ever to be served by nobody. So it goes on, and says no.
    fn refuse_all(&self, why: Error) -> Result<()> {
        if process::id() == self.process {
            return Err(why);
        }
        log::error!("{why}");
        self.unfit.get_or_init(|| why.to_string());
        Ok(())
    }

    /// A connection to `export`, whose base has `size` bytes.
    /// EINVAL if its overlay was made for another size.
    pub fn connect(&self, export: &CStr, size: u64) -> Result<Connection<'_>> {
        if let Some(why) = self.unfit.get() {
            return Err(Error::new(libc::EINVAL, why.clone()));
        }
        let overlay = match &self.overlays {
            Overlays::Temporary {
                block_size,
                directory,
                scope,
            } => scope.overlay(export, size, || {
                log::debug!("new overlay for export {export:?} of {size} bytes");
                let store = TemporaryStore::new(Arc::clone(directory), size);
                Overlay::new(size, *block_size, Files::Temporary(store))
            })?,
            Overlays::Kept(kept) => kept.connect(export, size)?,
        };
        Ok(Connection {
            filter: self,
            export: export.to_owned(),
            overlay,
        })
    }

    /// Makes safe what is to be kept, when the last client is gone.
    pub fn finish(&self) -> Result<()> {
        match &self.overlays {
            Overlays::Temporary { .. } => Ok(()),
            Overlays::Kept(kept) => kept.finish(),
        }
    }
}

/// A client's connection to an export.
pub struct Connection<'a> {
    filter: &'a Filter,
    export: CString,
    overlay: Arc<Overlay<Files>>,
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
        advice(self.overlay.block_size(), below)
    }

    pub fn read(&self, base: &impl Base, buf: &mut [u8], offset: u64) -> Result<()> {
        log::trace!("request: read {} bytes at {offset}", buf.len());
        let copy = self.filter.config.on_read.is_on();
        self.overlay.read(base, buf, offset, copy)
    }

    /// With `fua`, here and below: what was written is safe from power loss, where
    /// it is kept at all.
    pub fn write(&self, base: &impl Base, buf: &[u8], offset: u64, fua: bool) -> Result<()> {
        log::trace!("request: write {} bytes at {offset}, fua={fua}", buf.len());
        self.overlay.write(base, buf, offset)?;
        self.flush_if(fua)
    }

    pub fn zero(
        &self,
        base: &impl Base,
        offset: u64,
        len: u64,
        how: Zeroing,
        fua: bool,
    ) -> Result<()> {
        log::trace!("request: zero {len} bytes at {offset}, {how:?}, fua={fua}");
        self.overlay.zero(base, offset, len, how)?;
        self.flush_if(fua)
    }

    fn flush_if(&self, fua: bool) -> Result<()> {
        if fua { self.overlay.flush() } else { Ok(()) }
    }

    /// Covers what all connections have written. (A temporary overlay need not
    /// survive anything: nothing is left to do.)
    pub fn flush(&self) -> Result<()> {
        log::trace!("request: flush");
        self.overlay.flush()
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
        match &self.filter.overlays {
            Overlays::Temporary { scope, .. } => scope.leave(&self.export, &self.overlay),
            Overlays::Kept(kept) => kept.leave(),
        }
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
