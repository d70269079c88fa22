//! The file that an overlay's bytes are in, as messages name it.
//!
//! All errors about such a file are built here, so that each has the operation, the
//! file, where in it, and the system's reason, in one form.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// See the module's documentation.
#[derive(Debug, Clone)]
pub enum OverlayFile {
    /// A file without a name, in this directory.
    In(PathBuf),
    /// The image that `cow-overlay` names.
    Image(PathBuf),
}

impl OverlayFile {
    /// The directory of a file without a name, or the path of the image.
    pub fn path(&self) -> &Path {
        match self {
            OverlayFile::In(path) | OverlayFile::Image(path) => path,
        }
    }

    /// An operation on the file has failed. `operation` goes before the name of the
    /// file, as in "opening".
    #[cold]
    pub fn failed(&self, source: io::Error, operation: &str) -> Error {
        Error::io(source, format!("{operation} {self}"))
    }

    /// As [`OverlayFile::failed`], for `len` bytes at `offset`: of the image; or of the
    /// disk, for files without a name, of which a large disk has several.
    #[cold]
    pub fn failed_at(&self, source: io::Error, operation: &str, offset: u64, len: u64) -> Error {
        Error::io(
            source,
            format!("{operation} {self} ({len} bytes at offset {offset})"),
        )
    }

    /// As [`OverlayFile::failed_at`], for a system call that writes.
    #[cold]
    pub fn write_failed_at(
        &self,
        source: io::Error,
        operation: &str,
        offset: u64,
        len: u64,
    ) -> Error {
        self.failed_at(source, operation, offset, len).of_write()
    }

    /// The file is not fit for what it is to be used for. EINVAL.
    #[cold]
    pub fn refused(&self, what: impl fmt::Display) -> Error {
        self.refused_with(libc::EINVAL, what)
    }

    /// As [`OverlayFile::refused`], with another errno.
    #[cold]
    pub fn refused_with(&self, errno: i32, what: impl fmt::Display) -> Error {
        Error::new(errno, format!("{self} can't be used: {what}"))
    }

    /// [`OverlayFile::refused`], as the outcome of a function.
    pub fn refuse<T>(&self, what: impl fmt::Display) -> Result<T> {
        Err(self.refused(what))
    }
}

impl fmt::Display for OverlayFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OverlayFile::In(directory) => write!(f, "the overlay in {}", directory.display()),
            OverlayFile::Image(path) => write!(f, "cow-overlay={}", path.display()),
        }
    }
}
