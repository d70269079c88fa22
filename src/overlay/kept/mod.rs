//! The overlay that one can keep: a qcow2 image in place of files without a name.
//!
//! There is one, for one export. It is opened, and found fit, before any client
//! connects, so that what is wrong is told at start; an image that does not exist
//! yet is made as soon as the size of the disk is known.

mod backing;
mod place;
mod store;

use std::ffi::{CStr, CString};
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::Overlay;
use super::directory::Directory;
use super::store::Files;
use crate::block::BlockSize;
use crate::config::{Backing, Config, ScopeKind};
use crate::error::{Error, Result};
use crate::qcow2::header::Header;
use crate::qcow2::image::Image;
use crate::qcow2::layout::Layout;
use crate::sparse;
use backing::mtime_of;
use place::Place;
pub use store::KeptStore;

/// What `cow-overlay` asks for; see the module's documentation.
pub struct Kept {
    place: Place,
    block_size: Option<BlockSize>,
    /// The base's name, if one was given or can be told from the parameters.
    backing: Option<Backing>,
    overlay: OnceLock<Arc<Overlay<Files>>>,
    /// Outermost lock, held while an image is made.
    export: Mutex<Export>,
}

/// The export that the image belongs to.
#[derive(Default)]
struct Export {
    /// That of the first connection. Another may take its place if all of its
    /// connections have gone and nothing was written.
    name: Option<CString>,
    connections: usize,
}

impl Kept {
    /// Opens the image at `path` if there is one, else looks whether one can be made.
    pub fn start(path: &Path, config: &Config) -> Result<Self> {
        if config.scope == ScopeKind::Connection {
            return Err(Error::new(
                libc::EINVAL,
                "cow-scope=connection can't be used with cow-overlay: \
                 one file can't keep an overlay for every connection",
            ));
        }
        if let Some(block_size) = config.block_size {
            // For the message alone: the size of the disk is not known yet.
            Layout::new(0, block_size)?;
        }
        let kept = Kept {
            place: Place::new(path),
            block_size: config.block_size,
            backing: config.backing(),
            overlay: OnceLock::new(),
            export: Mutex::default(),
        };
        match File::options().read(true).write(true).open(path) {
            Ok(file) => kept.set(kept.resume(file)?),
            Err(e) if e.kind() == io::ErrorKind::NotFound => kept.expect_makeable()?,
            Err(e) => return Err(kept.place.failed(e, "opening it")),
        }
        Ok(kept)
    }

    fn set(&self, overlay: Overlay<Files>) {
        // Called once, at start or under the lock of `export`.
        let _ = self.overlay.set(Arc::new(overlay));
    }

    fn resume(&self, file: File) -> Result<Overlay<Files>> {
        let metadata = file
            .metadata()
            .map_err(|e| self.place.failed(e, "looking at it"))?;
        if !metadata.is_file() {
            return Err(self.place.refused("it is no regular file"));
        }
        self.place.lock(&file)?;
        let (image, header) = Image::open(file, self.place.path())?;
        let layout = header.layout;
        if self
            .block_size
            .is_some_and(|size| size != layout.block_size())
        {
            return Err(self.place.refused(format!(
                "it has blocks of {}: leave cow-block-size out, or give that",
                layout.block_size()
            )));
        }
        self.check_backing(&header)?;
        self.place.expect_allowed(layout)?;
        let can_zero_range = Directory::try_out(self.place.directory().to_owned())
            .is_ok_and(|directory| directory.can_zero_range());
        let overlay = Overlay::resume(image, can_zero_range)?;
        log::debug!(
            "cow-overlay={}: goes on with a disk of {} bytes in blocks of {}",
            self.place.path().display(),
            layout.disk_size(),
            layout.block_size()
        );
        Ok(overlay.map_store(|store| Files::Kept(Box::new(store))))
    }

    /// Looks, before nbdkit goes into the background, whether the image will find its
    /// place, as far as that can be told.
    fn expect_makeable(&self) -> Result<()> {
        if self.place.path().is_symlink() {
            return Err(self
                .place
                .refused("it is a symbolic link to a file that does not exist"));
        }
        let Some(backing) = &self.backing else {
            return Err(self
                .place
                .refused("the name of its backing file is not known: give it with cow-backing="));
        };
        self.recorded_name(backing)?;
        let directory = self.place.try_directory()?;
        if let Backing::File(path) = backing {
            // It has to have the size of the export.
            let layout = Layout::new(self.size_of(path)?, self.block_size_in(&directory))?;
            self.place.expect_allowed(layout)?;
            tempfile::tempfile_in(self.place.directory())
                .and_then(|file| file.set_len(layout.end))
                .map_err(|e| {
                    self.place
                        .failed(e, &format!("making it {} bytes long", layout.end))
                })?;
        }
        Ok(())
    }

    fn block_size_in(&self, directory: &Directory) -> BlockSize {
        self.block_size
            .unwrap_or_else(|| directory.default_block_size())
    }

    /// Takes note that the base has `size` bytes; makes the image if there is none.
    pub fn prepare(&self, size: u64) -> Result<()> {
        self.prepared(&self.export(), size).map(drop)
    }

    /// The lock of `export` is held, so that none is made twice.
    fn prepared(&self, _held: &MutexGuard<'_, Export>, size: u64) -> Result<&Arc<Overlay<Files>>> {
        if let Some(Backing::File(path)) = &self.backing {
            self.expect_size(path, size)?;
        }
        if self.overlay.get().is_none() {
            self.set(self.make(size)?);
        }
        let overlay = self.overlay.get().expect("set above");
        let has_content = !overlay.is_untouched() || image_of(overlay).records_export();
        self.expect_made_for(size, overlay.size(), has_content)?;
        Ok(overlay)
    }

    /// Makes the image under another name, and gives it its own when all of it is
    /// on the disk: a crash leaves either none or a whole one.
    fn make(&self, size: u64) -> Result<Overlay<Files>> {
        let directory = self.place.try_directory()?;
        let block_size = self.block_size_in(&directory);
        let Some(backing) = &self.backing else {
            return Err(self
                .place
                .refused("the name of its backing file is not known"));
        };
        let mtime = match backing {
            Backing::File(path) => mtime_of(path),
            Backing::Name(_) => None,
        };
        let layout = Layout::new(size, block_size)?;
        let header = Header::new(layout, self.recorded_name(backing)?, mtime);
        self.place.expect_allowed(header.layout)?;
        let failed = |e| self.place.failed(e, "making it");
        let named = tempfile::Builder::new()
            .prefix(".cow-overlay-")
            .tempfile_in(self.place.directory())
            .map_err(failed)?;
        let file = named.as_file().try_clone().map_err(failed)?;
        // The umask may have taken some of it away.
        file.set_permissions(Permissions::from_mode(0o600))
            .map_err(failed)?;
        // Else btrfs needs new space for every change of a table.
        sparse::write_in_place(&file);
        self.place.lock(&file)?;
        let image = Image::create(file, self.place.path(), &header)?;
        named.as_file().sync_all().map_err(failed)?;
        named
            .persist_noclobber(self.place.path())
            .map_err(|e| match e.error.kind() {
                io::ErrorKind::AlreadyExists => self.place.was_made_meanwhile(),
                _ => failed(e.error),
            })?;
        File::open(self.place.directory())
            .and_then(|directory| directory.sync_all())
            .map_err(|e| self.place.failed(e, "syncing its directory"))?;
        log::debug!(
            "cow-overlay={}: made for a disk of {size} bytes in blocks of {block_size}",
            self.place.path().display()
        );
        let store = KeptStore::new(image, directory.can_zero_range());
        let store = Files::Kept(Box::new(store));
        Ok(Overlay::new(size, block_size, store))
    }

    /// The overlay for a connection to `export`, whose base has `size` bytes. EINVAL
    /// for any other export than the image belongs to, or another size.
    pub fn connect(&self, export: &CStr, size: u64) -> Result<Arc<Overlay<Files>>> {
        let mut held = self.export();
        let overlay = self.prepared(&held, size)?;
        let is_taken = held.connections > 0 || !overlay.is_untouched();
        let others = held.name.as_deref().filter(|name| *name != export);
        if let Some(others) = others.filter(|_| is_taken) {
            return Err(self.place.refused(format!(
                "it keeps what is written to export {others:?}, and can't keep export {export:?} too"
            )));
        }
        if !image_of(overlay).claim(export.to_bytes()) {
            return Err(self.place.refused(format!(
                "it keeps what was written to another export than {export:?}"
            )));
        }
        held.name = Some(export.to_owned());
        held.connections += 1;
        Ok(Arc::clone(overlay))
    }

    /// To be called once for each connection that has ended.
    pub fn leave(&self) {
        self.export().connections -= 1;
    }

    fn export(&self) -> MutexGuard<'_, Export> {
        self.export.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last flush, when all clients are gone.
    pub fn finish(&self) -> Result<()> {
        let Some(overlay) = self.overlay.get() else {
            return Ok(());
        };
        self.place.expect_still_there(image_of(overlay).file())?;
        overlay.flush().map_err(|e| {
            Error::new(
                e.errno(),
                format!(
                    "{} is incomplete, it lacks what was written since the last flush: {e}",
                    self.place.path().display()
                ),
            )
        })
    }
}

/// The image that an overlay of this module is kept in.
fn image_of(overlay: &Overlay<Files>) -> &Image<File> {
    match overlay.store() {
        Files::Kept(store) => store.image(),
        Files::Temporary(_) => unreachable!("made by this module"),
    }
}
