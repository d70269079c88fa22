//! Where an image is, or is to be: its path, its directory, the lock on it; and
//! messages that name it.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit};

use super::super::directory::Directory;
use crate::error::{Error, Result};
use crate::qcow2::layout::Layout;
use crate::qcow2::lock::lock_for_writing;

/// An image's path, which is absolute.
pub struct Place {
    path: PathBuf,
}

impl Place {
    pub fn new(path: &Path) -> Self {
        Place {
            path: path.to_owned(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn failed(&self, source: io::Error, tried: &str) -> Error {
        Error::io(
            source,
            format!("cow-overlay={}: {tried}", self.path.display()),
        )
    }

    pub fn refused(&self, what: impl std::fmt::Display) -> Error {
        Error::new(
            libc::EINVAL,
            format!("cow-overlay={} can't be used: {what}", self.path.display()),
        )
    }

    /// There was nothing at the path when nbdkit started.
    pub fn was_made_meanwhile(&self) -> Error {
        Error::new(
            libc::EEXIST,
            format!(
                "cow-overlay={} was made by another program meanwhile: \
                 start nbdkit again to go on with it",
                self.path.display()
            ),
        )
    }

    pub fn directory(&self) -> &Path {
        // Absolute, so there is one, except for "/", which is no regular file.
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Locks `file` as QEMU does, so that no other program writes to it.
    pub fn lock(&self, file: &File) -> Result<()> {
        match lock_for_writing(file) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::new(
                libc::EBUSY,
                format!(
                    "cow-overlay={} is in use by another program (nbdkit, qemu, qemu-img)",
                    self.path.display()
                ),
            )),
            Err(e) => Err(self.failed(e, "locking it")),
        }
    }

    /// An error if `file` has no name any more: it will be gone with this process.
    /// (Another name is as good: it may have been moved.)
    pub fn expect_still_there(&self, file: &File) -> Result<()> {
        let about = file.metadata();
        if about.map_err(|e| self.failed(e, "looking at it"))?.nlink() > 0 {
            return Ok(());
        }
        Err(Error::new(
            libc::ENOENT,
            format!(
                "{} was removed while it was served: what was written to it is lost",
                self.path.display()
            ),
        ))
    }

    /// Finds out what the file system of the image can do.
    pub fn try_directory(&self) -> Result<Directory> {
        let directory = self.directory();
        Directory::try_out(directory.to_owned()).map_err(|e| {
            let tried = format!("making a sparse file in {}", directory.display());
            self.failed(e, &tried)
        })
    }

    /// Beyond the limit of `ulimit -f` the system does not answer a write with an
    /// error but ends the process by SIGXFSZ.
    pub fn expect_allowed(&self, layout: Layout) -> Result<()> {
        let limit = getrlimit(Resource::RLIMIT_FSIZE);
        let (limit, _) = limit.map_err(|e| self.failed(e.into(), "asking for ulimit -f"))?;
        if layout.end <= limit {
            return Ok(());
        }
        Err(Error::new(
            libc::EFBIG,
            format!(
                "cow-overlay={} can't be used: it takes a file of {} bytes, \
                 but the limit on the size of a file (ulimit -f) is {limit}",
                self.path.display(),
                layout.end
            ),
        ))
    }
}
