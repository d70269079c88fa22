//! The directory that holds temporary overlays.

use std::env;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{self, Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit};

use crate::error::{Error, Result};
use crate::file_system::{FileSystem, NOT_KNOWN_SPARSE};
use crate::sparse;
use crate::sync::{Mutex, MutexGuard, locked};

/// A directory that was found fit to hold overlays.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    file_system: FileSystem,
    /// The first overlay file. So one can be had even if nbdkit becomes a user (`-u`)
    /// who may not make any here.
    spare: Mutex<Option<File>>,
    /// See [`Directory::leaving_files`].
    files_left: u64,
}

impl Directory {
    /// The directory of the environment: `$TMPDIR`, else `/var/tmp`, as the
    /// filter that nbdkit ships has it: an overlay may be large, and `/tmp` is
    /// often memory.
    pub fn from_environment() -> Result<Self> {
        let path = env::var_os("TMPDIR")
            .filter(|path| !path.is_empty())
            .map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let directory = Self::open(&path)?;
        if !directory.file_system.known_sparse {
            log::warn!(
                "the overlay is kept in the directory {}, but {NOT_KNOWN_SPARSE} \
                 (set TMPDIR to one that can hold a sparse file)",
                path.display()
            );
        }
        Ok(directory)
    }

    /// Tries `path` out. The error names it, and says what TMPDIR is for.
    pub fn open(path: &Path) -> Result<Self> {
        // nbdkit changes its directory when it goes into the background.
        path::absolute(path).and_then(Self::try_out).map_err(|e| {
            Error::io(
                e,
                format!(
                    "the overlay can't be kept in the directory {} \
                         (set TMPDIR to one that can hold a sparse file)",
                    path.display()
                ),
            )
        })
    }

    /// Tries out the directory with this absolute path.
    fn try_out(path: PathBuf) -> io::Result<Self> {
        // It is opened before anything else: scripts find the overlay of nbdkit's own
        // filter as descriptor 3, the first that is free.
        let spare = unnamed_file(&path)?;
        // The one that is tried is another: an overlay is to be thrown away, and may be
        // in a hundred thousand pieces. See `FileSystem::try_out`.
        let file_system = FileSystem::try_out(&unnamed_file(&path)?)?;
        let directory = Directory {
            file_system,
            spare: Mutex::new(Some(spare)),
            files_left: 0,
            path,
        };
        log::debug!("overlay directory: {directory:?}");
        if !directory.file_system.can_punch {
            log::debug!(
                "{}: no hole punching: trimmed space is not given back",
                directory.path.display()
            );
        }
        Ok(directory)
    }

    /// This directory, of which no more files are opened once only so many are left that the
    /// process may open, or a quarter of them if that is less.
    pub fn leaving_files(mut self, files: u64) -> Self {
        self.files_left = files;
        self
    }

    fn spare(&self) -> MutexGuard<'_, Option<File>> {
        locked(&self.spare)
    }

    /// A new file without a name, mode 0600, close-on-exec, sparse, of `size` bytes. ENOSPC
    /// also if the process may open no more files for this.
    pub fn make_file(&self, size: u64) -> Result<File> {
        let failed = |e| {
            Error::io(
                e,
                format!(
                    "making an overlay file of {size} bytes in {} (see TMPDIR)",
                    self.path.display()
                ),
            )
        };
        let spare = self.spare().take();
        let file = match spare {
            Some(file) => file,
            None => match unnamed_file(&self.path) {
                Ok(file) => {
                    self.expect_more_files_than_are_left(&file)?;
                    file
                }
                Err(e) => {
                    let error = failed(e);
                    return Err(match error.errno() {
                        libc::EMFILE | libc::ENFILE => no_file("too many are open"),
                        _ => error,
                    });
                }
            },
        };
        file.set_len(size).map_err(failed)?;
        Ok(file)
    }

    /// ENOSPC if `file`, which was just opened, is one of those that are left to others. Its
    /// number tells it, because the system takes the lowest one that is free.
    fn expect_more_files_than_are_left(&self, file: &File) -> Result<()> {
        // Where the limit can't be had, there is none to keep.
        let most = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
        let left = most.saturating_sub(file.as_raw_fd() as u64 + 1);
        if left >= self.files_left.min(most / 4) {
            return Ok(());
        }
        Err(no_file(&format!(
            "of {most} that nbdkit may have open the last {left} are left for clients that connect"
        )))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file system of the directory can do.
    pub fn file_system(&self) -> &FileSystem {
        &self.file_system
    }
}

fn no_file(why: &str) -> Error {
    Error::new(
        libc::ENOSPC,
        format!("no further overlay file: {why} (ulimit -n)"),
    )
}

/// A file without a name, close-on-exec, mode 0600. (The library leaves the mode
/// to the umask where the file never had a name; who may look into `/proc` could
/// still open it.)
fn unnamed_file(directory: &Path) -> io::Result<File> {
    let file = tempfile::tempfile_in(directory)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    sparse::write_in_place(&file);
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_good_directory_is_tried_out_and_left_empty() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let directory = Directory::open(dir.path()).expect("fit for overlays");
        // The first was made when the directory was tried, the second is made now.
        for _ in 0..2 {
            let file = directory.make_file(1 << 30).expect("a file");
            let metadata = file.metadata().expect("its metadata");
            assert_eq!(metadata.len(), 1 << 30);
            assert_eq!(metadata.blocks(), 0);
            assert_eq!(metadata.mode() & 0o777, 0o600);
            assert_eq!(metadata.nlink(), 0);
            let flags = nix::fcntl::fcntl(file.as_fd(), nix::fcntl::FcntlArg::F_GETFD);
            assert_eq!(flags.expect("its flags") & libc::FD_CLOEXEC, 1);
        }
        assert_eq!(dir.path().read_dir().expect("readable").count(), 0);
    }

    #[test]
    fn a_bad_directory_is_named_with_the_reason_and_tmpdir() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = dir.path().join("file");
        File::create(&file).expect("a file");
        for (path, errno) in [
            (dir.path().join("missing"), libc::ENOENT),
            (file, libc::ENOTDIR),
        ] {
            let error = Directory::open(&path).expect_err("unfit");
            let message = error.to_string();
            assert_eq!(error.errno(), errno, "{message}");
            assert!(message.contains(path.to_str().expect("UTF-8")), "{message}");
            assert!(message.contains("TMPDIR"), "{message}");
        }
    }
}
