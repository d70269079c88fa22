//! The file that the documents are in.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit};
use tempfile::NamedTempFile;

use super::document::START;
use crate::error::{Error, Result};
use crate::named_file::{self, RANDOM_LEN};

/// Where the documents are.
pub struct Place {
    path: PathBuf,
    /// What the names of the files begin with that are to become the next document.
    prefix: OsString,
}

impl Place {
    /// Tries whether a document can be written to `path`, which is absolute. What is there
    /// must be a document, or empty: another file that was named by mistake is not
    /// replaced.
    pub fn new(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or_default();
        let mut prefix = OsString::from(".cow-stats-");
        prefix.push(name);
        prefix.push("-");
        let place = Place {
            path: path.to_owned(),
            prefix,
        };
        place.expect_replaceable()?;
        place.remove_leftovers();
        place.make("{}").map_err(|e| place.failed(e))?;
        Ok(place)
    }

    fn expect_replaceable(&self) -> Result<()> {
        let metadata = match fs::symlink_metadata(&self.path) {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(self.failed(e)),
        };
        let refused = |what| {
            let path = self.path.display();
            let message = format!("cow-stats={path} can't be used: {what}");
            Err(Error::new(libc::EINVAL, message))
        };
        if !metadata.is_file() {
            return refused("it is not a regular file");
        }
        let mut start = Vec::new();
        File::open(&self.path)
            .and_then(|file| file.take(START.len() as u64).read_to_end(&mut start))
            .map_err(|e| self.failed(e))?;
        if !start.is_empty() && start != START {
            return refused("there is a file of another kind, which it would replace");
        }
        Ok(())
    }

    /// Removes what an nbdkit has left that was killed. (One that runs, and has the same
    /// file by mistake, writes its next document.)
    fn remove_leftovers(&self) {
        let Ok(entries) = fs::read_dir(self.directory()) else {
            return;
        };
        let prefix = self.prefix.as_encoded_bytes();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.as_encoded_bytes();
            if name.starts_with(prefix) && name.len() == prefix.len() + RANDOM_LEN {
                // Another user's stays.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Makes `document` the one that is found.
    pub fn replace(&self, document: &str) -> Result<()> {
        let file = self.make(document).map_err(|e| self.failed(e))?;
        file.persist(&self.path).map_err(|e| self.failed(e.error))?;
        Ok(())
    }

    /// A file that has `document`, which goes away with the value.
    fn make(&self, document: &str) -> io::Result<NamedTempFile> {
        let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE)?;
        if document.len() as u64 > limit {
            // The system would end the process by SIGXFSZ.
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        let named = named_file::in_directory(self.directory(), &self.prefix)?;
        // By calls of our own: the library's hide the errno of a failure.
        let mut file = named.as_file();
        file.write_all(document.as_bytes())?;
        // Whatever the umask is: who may see it is up to the directory.
        file.set_permissions(Permissions::from_mode(0o644))?;
        Ok(named)
    }

    fn failed(&self, source: io::Error) -> Error {
        let path = self.path.display();
        Error::io(source, format!("cow-stats={path} can't be written"))
    }
}
