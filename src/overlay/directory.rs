//! The directory that holds temporary overlays, and what its file system can do.
//!
//! It is tried once, before any client connects, with a file like those that
//! will hold the data. A file system that can't hold a sparse file would have to
//! be given as much space as the disk is large, and would fail in the middle of
//! a client's work; better to say so at once.

use std::env;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{self, Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};

use crate::block::BlockSize;
use crate::error::{Error, Result};
use crate::sparse;

/// ext4 ends at 16 TiB with 4K blocks; half of it leaves room, and is few files
/// even for the largest disk.
const MAX_SEGMENT: u64 = 8 << 40;
/// The size of the file that is tried out. Where not even that fits, nothing does.
const MIN_SEGMENT: u64 = 4 << 20;

/// The sizes between which the default block size lies. Below 4K the map grows
/// and nothing gets faster; above 64K each small write costs too much.
const DEFAULT_BLOCK_SIZE: std::ops::RangeInclusive<u64> = 4096..=65536;

/// A directory that was found fit to hold overlays.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    file_system_block: u64,
    segment_size: u64,
    can_punch: bool,
    can_zero_range: bool,
    /// The first overlay file. So one can be had even if nbdkit becomes a user (`-u`)
    /// who may not make any here.
    spare: Mutex<Option<File>>,
}

impl Directory {
    /// The directory of the environment: `$TMPDIR`, else `/var/tmp`, as the
    /// filter that nbdkit ships has it: an overlay may be large, and `/tmp` is
    /// often memory.
    pub fn from_environment() -> Result<Self> {
        let path = env::var_os("TMPDIR")
            .filter(|path| !path.is_empty())
            .map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        Self::open(&path)
    }

    /// Tries `path` out. The error names it, and says what TMPDIR is for.
    pub fn open(path: &Path) -> Result<Self> {
        let refused = |e: io::Error| {
            Error::io(
                e,
                format!(
                    "the overlay can't be kept in the directory {} \
                     (set TMPDIR to one that can hold a sparse file)",
                    path.display()
                ),
            )
        };
        // nbdkit changes its directory when it goes into the background.
        let absolute = path::absolute(path).map_err(refused)?;
        Self::try_out(absolute).map_err(refused)
    }

    /// Tries out the directory with this absolute path.
    pub fn try_out(path: PathBuf) -> io::Result<Self> {
        let largest = largest_file()?;
        let file = unnamed_file(&path)?;
        file.write_all_at(&[1], 0)?;
        expect_sparse(&file)?;
        let directory = Directory {
            file_system_block: file_system_block(&file),
            can_punch: can_punch(&file),
            can_zero_range: sparse::zero_range(&file, 0, 4096).is_ok_and(|done| done),
            segment_size: segment_size(&file, largest)?,
            // Not the one that was tried: ext4, XFS and btrfs allocate and write what
            // a file holds when it is closed, if it was ever truncated. (They take it
            // for one that was given new content.) That of an overlay is to be thrown
            // away, and may be in a hundred thousand pieces.
            spare: Mutex::new(Some(unnamed_file(&path)?)),
            path,
        };
        log::debug!("overlay directory: {directory:?}");
        if !directory.can_punch {
            log::debug!(
                "{}: no hole punching: trimmed space is not given back",
                directory.path.display()
            );
        }
        Ok(directory)
    }

    fn spare(&self) -> MutexGuard<'_, Option<File>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new file without a name, mode 0600, close-on-exec, sparse, of `size` bytes.
    pub fn make_file(&self, size: u64) -> Result<File> {
        let spare = self.spare().take();
        spare
            .map_or_else(|| unnamed_file(&self.path), Ok)
            .and_then(|file| file.set_len(size).map(|()| file))
            .map_err(|e| {
                Error::io(
                    e,
                    format!(
                        "making an overlay file of {size} bytes in {} (see TMPDIR)",
                        self.path.display()
                    ),
                )
            })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that one file may hold: a power of two.
    pub fn segment_size(&self) -> u64 {
        self.segment_size
    }

    pub fn can_punch(&self) -> bool {
        self.can_punch
    }

    pub fn can_zero_range(&self) -> bool {
        self.can_zero_range
    }

    /// The block size that costs least here: an aligned write of one block of the
    /// file system needs no read before it.
    pub fn default_block_size(&self) -> BlockSize {
        let bytes = self
            .file_system_block
            .clamp(*DEFAULT_BLOCK_SIZE.start(), *DEFAULT_BLOCK_SIZE.end());
        BlockSize::new(bytes.next_power_of_two()).expect("between 4K and 64K")
    }
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

/// Fails if a file of which two bytes were written takes more than half of its size.
fn expect_sparse(file: &File) -> io::Result<()> {
    let size = MIN_SEGMENT;
    file.set_len(size)?;
    // Some file systems fill a hole only when something is written behind it.
    file.write_all_at(&[1], size - 1)?;
    let stored = file.metadata()?.blocks() * 512;
    if stored > size / 2 {
        return Err(io::Error::other(format!(
            "its file system stores holes as data ({stored} bytes for an empty file of {size})"
        )));
    }
    Ok(())
}

/// FIGETBSZ of `<linux/fs.h>`: the block size by which the file system allocates.
/// (`st_blksize` is what it likes to be read in, which may be much more.)
fn file_system_block(file: &File) -> u64 {
    const FIGETBSZ: libc::c_ulong = nix::request_code_none!(0, 2) as libc::c_ulong;
    let mut size: libc::c_int = 0;
    // SAFETY: the request stores one int at the address that it is given, which
    // is that of `size`; the descriptor is open.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FIGETBSZ as _, &raw mut size) };
    if result == 0 && size > 0 {
        size as u64
    } else {
        *DEFAULT_BLOCK_SIZE.start()
    }
}

/// Whether a hole can be punched, and whether that really makes zeroes.
fn can_punch(file: &File) -> bool {
    let mut byte = [1];
    sparse::punch(file, 0, 1 << 20).is_ok_and(|done| done)
        && file.read_exact_at(&mut byte, 0).is_ok()
        && byte == [0]
}

/// How large a file this process may make. Beyond the limit of `ulimit -f` the
/// system would not answer with an error but end the process by SIGXFSZ.
fn largest_file() -> io::Result<u64> {
    match getrlimit(Resource::RLIMIT_FSIZE)? {
        (limit, _) if limit < MIN_SEGMENT => Err(Errno::EFBIG.into()),
        (limit, _) => Ok(limit.min(MAX_SEGMENT)),
    }
}

/// The largest power of two, at most `largest`, to which a file can be extended here.
fn segment_size(file: &File, largest: u64) -> io::Result<u64> {
    let mut size = 1 << largest.ilog2();
    loop {
        match file.set_len(size) {
            Ok(()) => return Ok(size),
            // EFBIG, or EINVAL from some FUSE file systems.
            Err(_) if size > MIN_SEGMENT => size /= 2,
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::os::fd::AsFd;

    #[test]
    fn a_good_directory_is_tried_out_and_left_empty() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let directory = Directory::open(dir.path()).expect("fit for overlays");
        assert!(directory.segment_size().is_power_of_two());
        assert!(directory.default_block_size().bytes() >= 4096);
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

    #[test]
    fn a_file_system_that_stores_holes_is_found_out() {
        // No such file system can be made everywhere: a file that is full already
        // looks the same.
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.path().join("full"))
            .expect("a file");
        file.write_all_at(&vec![7; 4 << 20], 0).expect("space");
        let error = expect_sparse(&file).expect_err("stored as data");
        assert!(error.to_string().contains("stores holes as data"));
    }
}
