//! What a file system can do for an overlay, found out by trying.
//!
//! It is tried once, before any client connects, with a file like those that
//! will hold the data. A file system that can't hold a sparse file would have to
//! be given as much space as the disk is large, and would fail in the middle of
//! a client's work; better to say so at once.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};

use crate::block::BlockSize;
use crate::sparse;

/// ext4 ends at 16 TiB with 4K blocks; half of it leaves room, and is few files
/// even for the largest disk.
const MAX_FILE: u64 = 8 << 40;
/// The size of the file that is tried out. Where not even that fits, nothing does.
const TRIAL: u64 = 4 << 20;

/// The sizes between which the default block size lies. Below 4K the map grows
/// and nothing gets faster; above 64K each small write costs too much.
const DEFAULT_BLOCK_SIZE: std::ops::RangeInclusive<u64> = 4096..=65536;

/// See the module's documentation.
#[derive(Debug)]
pub struct FileSystem {
    /// The unit in which it allocates, in bytes.
    block: u64,
    /// Bytes that one file may hold: a power of two.
    pub largest_file: u64,
    pub can_punch: bool,
    pub can_zero_range: bool,
}

impl FileSystem {
    /// Tries out the file system of `file`, which is empty and of no other use: ext4,
    /// XFS and btrfs write out what a file holds when it is closed, if it was ever
    /// truncated. (They take it for one that was given new content.)
    pub fn try_out(file: &File) -> io::Result<Self> {
        let allowed = largest_allowed_file()?;
        file.write_all_at(&[1], 0)?;
        expect_sparse(file)?;
        Ok(FileSystem {
            block: allocation_unit(file),
            can_punch: can_punch(file),
            can_zero_range: sparse::zero_range(file, 0, 4096).is_ok_and(|done| done),
            largest_file: largest_file(file, allowed)?,
        })
    }

    /// The block size that costs least here: an aligned write of one block of the
    /// file system needs no read before it.
    pub fn default_block_size(&self) -> BlockSize {
        let bytes = self
            .block
            .clamp(*DEFAULT_BLOCK_SIZE.start(), *DEFAULT_BLOCK_SIZE.end());
        BlockSize::new(bytes.next_power_of_two()).expect("between 4K and 64K")
    }
}

/// Fails if a file of which two bytes were written takes more than half of its size.
fn expect_sparse(file: &File) -> io::Result<()> {
    file.set_len(TRIAL)?;
    // Some file systems fill a hole only when something is written behind it.
    file.write_all_at(&[1], TRIAL - 1)?;
    let stored = file.metadata()?.blocks() * 512;
    if stored > TRIAL / 2 {
        return Err(io::Error::other(format!(
            "its file system stores holes as data ({stored} bytes for an empty file of {TRIAL})"
        )));
    }
    Ok(())
}

/// FIGETBSZ of `<linux/fs.h>`: the block size by which the file system allocates.
/// (`st_blksize` is what it likes to be read in, which may be much more.)
fn allocation_unit(file: &File) -> u64 {
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
fn largest_allowed_file() -> io::Result<u64> {
    match getrlimit(Resource::RLIMIT_FSIZE)? {
        (limit, _) if limit < TRIAL => Err(Errno::EFBIG.into()),
        (limit, _) => Ok(limit.min(MAX_FILE)),
    }
}

/// The largest power of two, at most `allowed`, to which a file can be extended here.
fn largest_file(file: &File, allowed: u64) -> io::Result<u64> {
    let mut size = 1 << allowed.ilog2();
    loop {
        match file.set_len(size) {
            Ok(()) => return Ok(size),
            // EFBIG, or EINVAL from some FUSE file systems.
            Err(_) if size > TRIAL => size /= 2,
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_good_file_system_is_found_fit() {
        let file = tempfile::tempfile().expect("a file");
        let found = FileSystem::try_out(&file).expect("fit for overlays");
        assert!(found.largest_file.is_power_of_two());
        assert!(found.default_block_size().bytes() >= 4096);
    }

    #[test]
    fn a_file_system_that_stores_holes_is_found_out() {
        // No such file system can be made everywhere: a file that is full already
        // looks the same.
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(&vec![7; 4 << 20], 0).expect("space");
        let error = expect_sparse(&file).expect_err("stored as data");
        assert!(error.to_string().contains("stores holes as data"));
    }
}
