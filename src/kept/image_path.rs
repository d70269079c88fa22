//! Where an image is, or is to be: its path, its directory, and the lock on it.

use std::fs::{self, File};
use std::ops::Deref;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit};

use crate::error::{Error, Result};
use crate::file_system::{FileSystem, can_zero_range};
use crate::overlay_file::OverlayFile;
use crate::qcow2::file::is_at;
use crate::qcow2::lock::lock_for_writing;
use crate::sparse;

/// An image's path, which is absolute.
pub struct ImagePath(OverlayFile);

impl ImagePath {
    pub fn new(path: &Path) -> Self {
        ImagePath(OverlayFile::Image(path.to_owned()))
    }

    /// There was nothing at the path when nbdkit started.
    pub fn was_made_meanwhile(&self) -> Error {
        self.refused_with(
            libc::EEXIST,
            "it was made by another program meanwhile: start nbdkit again to go on with it",
        )
    }

    pub fn directory(&self) -> &Path {
        // Absolute, so there is one, except for "/", which is no regular file.
        self.path().parent().unwrap_or(Path::new("/"))
    }

    pub fn open(&self) -> Result<File> {
        File::options()
            .read(true)
            .write(true)
            .open(self.path())
            .map_err(|e| self.failed(e, "opening"))
    }

    /// Whether who opens the path gets `file`.
    pub fn leads_to(&self, file: &File) -> Result<bool> {
        is_at(file, self.path()).map_err(|e| self.failed(e, "looking at"))
    }

    /// Takes away `file`, to which nothing was written yet, if it is the one there.
    pub fn remove(&self, file: &File) {
        let removed = match is_at(file, self.path()) {
            Ok(true) => fs::remove_file(self.path()),
            found => found.map(drop),
        };
        if let Err(e) = removed {
            log::warn!("{}", self.failed(e, "removing"));
        }
    }

    /// Its directory, which has to be synced when the image gets its name: opened before
    /// there is an image, because there are directories that can be written to and not
    /// read.
    pub fn open_directory(&self) -> Result<File> {
        let directory = self.directory();
        File::open(directory).map_err(|e| {
            let operation = format!("opening {} (to sync it) for", directory.display());
            self.failed(e, &operation)
        })
    }

    /// To be asked when `file` is locked: another may have been put in its place since it
    /// was opened, and one who opens that finds no lock on it.
    pub fn expect_leads_to(&self, file: &File) -> Result<()> {
        if self.leads_to(file)? {
            return Ok(());
        }
        Err(self.refused_with(
            libc::EBUSY,
            "another file was put in its place while it was opened: start nbdkit again",
        ))
    }

    /// Locks `file` as QEMU does, so that no other program writes to it.
    pub fn lock(&self, file: &File) -> Result<()> {
        match lock_for_writing(file) {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.refused_with(
                libc::EBUSY,
                "it is in use by another program (nbdkit, qemu, qemu-img)",
            )),
            Err(e) => Err(self.failed(e, "locking")),
        }
    }

    /// Has what is read of `file` come from the disk, whatever of it was lost on the way
    /// there.
    pub fn drop_cached(&self, file: &File) -> Result<()> {
        sparse::drop_cached(file).map_err(|e| {
            let e = Error::io(e, "syncing it");
            self.refused_with(
                e.errno(),
                format!(
                    "what was written to it last can't be made safe ({e}): \
                     start nbdkit again when its file system works"
                ),
            )
        })
    }

    /// Finds out what the file system of the image can do.
    pub fn try_file_system(&self) -> Result<FileSystem> {
        tempfile::tempfile_in(self.directory())
            .and_then(|file| FileSystem::try_out(&file))
            .map_err(|e| {
                let directory = self.directory().display();
                self.failed(e, &format!("making a sparse file in {directory} for"))
            })
    }

    /// Whether the file system of the image can store zeroes without writing them.
    /// Nothing else of it is tried, so that an image can be served where none would be
    /// made (it is full, say).
    pub fn can_zero_range(&self) -> bool {
        tempfile::tempfile_in(self.directory()).is_ok_and(|file| can_zero_range(&file))
    }

    /// Whether a file may be `len` bytes long. Beyond the limit of `ulimit -f` the system does not answer a write with an
    /// error but ends the process by SIGXFSZ.
    pub fn expect_allowed(&self, len: u64) -> Result<()> {
        let limit = getrlimit(Resource::RLIMIT_FSIZE);
        let (limit, _) = limit.map_err(|e| self.failed(e.into(), "asking for ulimit -f for"))?;
        if len <= limit {
            return Ok(());
        }
        Err(self.refused_with(
            libc::EFBIG,
            format!(
                "it takes a file of {len} bytes, but the limit on the size of a file \
                 (ulimit -f) is {limit}"
            ),
        ))
    }
}

/// For the errors about the image.
impl Deref for ImagePath {
    type Target = OverlayFile;

    fn deref(&self) -> &OverlayFile {
        &self.0
    }
}
