//! What a file system can do for an overlay, found out by trying.
//!
//! It is tried once, before any client connects, with a file like those that
//! will hold the data. A file system that can't hold a sparse file would have to
//! be given as much space as the disk is large, and would fail in the middle of
//! a client's work; better to say so at once.
//!
//! What a file says that it takes is not enough to refuse a file system:
//!
//! - Some give a file megabytes for its first byte (huge pages of tmpfs, `extsize` of
//!   XFS, clusters of ext4 and NTFS), so that a short file has no hole. A long one has.
//! - Some make the number up from the length (sshfs). Their free space does not fall.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::fstatvfs;

use crate::block::BlockSize;
use crate::sparse;

/// ext4 ends at 16 TiB with 4K blocks; half of it leaves room, and is few files
/// even for the largest disk.
const MAX_FILE: u64 = 8 << 40;
/// The length of the file that is tried out. Where not even that fits, nothing does.
const TRIAL: u64 = 4 << 20;
/// Its length where the shorter one has no hole. It has one where a byte takes up to 64
/// MiB, and a file system that stores holes as data has soon written it.
const LONG_TRIAL: u64 = 256 << 20;

/// The sizes between which the default block size lies. Below 4K the map grows
/// and nothing gets faster; above 64K each small write costs too much.
pub const DEFAULT_BLOCK_SIZE: std::ops::RangeInclusive<u64> = 4096..=65536;

/// See the module's documentation.
#[derive(Debug)]
pub struct FileSystem {
    /// The unit in which it allocates, in bytes.
    block: u64,
    /// Bytes that one file may hold: a power of two.
    pub largest_file: u64,
    pub can_punch: bool,
    pub can_zero_range: bool,
    /// That holes take no space. Otherwise it can't be known: see [`NOT_KNOWN_SPARSE`].
    pub known_sparse: bool,
}

/// What to tell the user of a file system that is not known to be sparse.
pub const NOT_KNOWN_SPARSE: &str = "it can't be found out whether its file system \
    stores holes as data (it does not tell how much space is free, or ulimit -f allows \
    no file of 256 MiB); if it does, the overlay takes as much space as the disk is large";

impl FileSystem {
    /// Tries out the file system of `file`, which is empty and of no other use: ext4,
    /// XFS and btrfs write out what a file holds when it is closed, if it was ever
    /// truncated. (They take it for one that was given new content.)
    pub fn try_out(file: &File) -> io::Result<Self> {
        let allowed = largest_allowed_file()?;
        file.write_all_at(&[1], 0)?;
        let known_sparse = expect_sparse(file, allowed)?;
        Ok(FileSystem {
            known_sparse,
            block: allocation_unit(file),
            can_punch: can_punch(file),
            can_zero_range: can_zero_range(file),
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

/// What is asked of the file that is tried out. A trait, so that the judgement can be
/// tested with the numbers of file systems that are not there.
trait Trial {
    /// Makes it `len` bytes long, and gives the bytes that it then takes.
    fn lengthen(&self, len: u64) -> io::Result<u64>;

    /// Bytes that are free in its file system, if that is known.
    fn free(&self) -> Option<u64>;
}

impl Trial for File {
    fn lengthen(&self, len: u64) -> io::Result<u64> {
        self.set_len(len)?;
        // Some file systems fill a hole only when something is written behind it.
        self.write_all_at(&[1], len - 1)?;
        Ok(self.metadata()?.blocks() * 512)
    }

    fn free(&self) -> Option<u64> {
        // A failure is an answer, too: it is not known.
        let about = fstatvfs(self).ok().filter(|about| about.blocks() > 0)?;
        Some(about.blocks_free().saturating_mul(about.fragment_size()))
    }
}

/// Whether holes take no space, if that can be known. An error if they do take space.
/// `allowed`: how long a file may be.
fn expect_sparse(trial: &impl Trial, allowed: u64) -> io::Result<bool> {
    let short = trial.lengthen(TRIAL)?;
    if short <= TRIAL / 2 {
        return Ok(true);
    }
    let free = trial.free();
    if allowed < LONG_TRIAL {
        // (`ulimit -f`.) A shorter file may lie in one unit of allocation.
        return Ok(false);
    }
    let len = LONG_TRIAL;
    let long = trial.lengthen(len).map_err(|e| {
        io::Error::other(format!(
            "its file system can't hold an empty file of {len} bytes ({e}): \
             it stores holes as data, or is nearly full"
        ))
    })?;
    // One byte was written.
    let is_little = |taken: u64| taken < (len - TRIAL) / 2;
    if is_little(long.saturating_sub(short)) {
        return Ok(true);
    }
    let (Some(before), Some(after)) = (free, trial.free()) else {
        return Ok(false);
    };
    if is_little(before.saturating_sub(after)) {
        return Ok(true);
    }
    Err(io::Error::other(format!(
        "its file system stores holes as data ({long} bytes for an empty file of {len})"
    )))
}

/// FIGETBSZ of `<linux/fs.h>`: the block size by which the file system allocates.
/// (`st_blksize` is what it likes to be read in, which may be much more. Where it
/// allocates many blocks at once, a write of one needs no read before it all the same.)
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

/// Whether zeroes can be stored without writing them. `file` is of no other use.
pub fn can_zero_range(file: &File) -> bool {
    sparse::zero_range(file, 0, 4096).is_ok_and(|done| done)
}

/// How large a file this process may make. Beyond the limit of `ulimit -f` the
/// system would not answer with an error but end the process by SIGXFSZ.
fn largest_allowed_file() -> io::Result<u64> {
    match getrlimit(Resource::RLIMIT_FSIZE)? {
        (limit, _) if limit < TRIAL => Err(io::Error::other(format!(
            "the limit on the size of a file (ulimit -f) is {limit} bytes, less than {TRIAL}"
        ))),
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
    use nix::errno::Errno;
    use std::cell::Cell;

    #[test]
    fn a_good_file_system_is_found_fit() {
        let file = tempfile::tempfile().expect("a file");
        let found = FileSystem::try_out(&file).expect("fit for overlays");
        assert!(found.largest_file.is_power_of_two());
        assert!(found.default_block_size().bytes() >= 4096);
        assert!(found.known_sparse);
    }

    /// A file system by what it would answer.
    struct Answers {
        /// Bytes that a file of this length takes, of which a few were written.
        stored: fn(u64) -> u64,
        /// Bytes that are gone then.
        gone: fn(u64) -> u64,
        knows_free: bool,
        space: u64,
        len: Cell<u64>,
        /// The longest that was tried.
        tried: Cell<u64>,
    }

    const ALL: fn(u64) -> u64 = |len| len;
    const NOTHING: fn(u64) -> u64 = |_| 0;

    impl Answers {
        fn new(stored: fn(u64) -> u64, gone: fn(u64) -> u64) -> Self {
            Answers {
                stored,
                gone,
                knows_free: true,
                space: 1 << 30,
                len: Cell::new(1),
                tried: Cell::new(0),
            }
        }
    }

    impl Trial for Answers {
        fn lengthen(&self, len: u64) -> io::Result<u64> {
            self.tried.set(len);
            if (self.gone)(len) > self.space {
                return Err(Errno::ENOSPC.into());
            }
            self.len.set(len);
            Ok((self.stored)(len))
        }

        fn free(&self) -> Option<u64> {
            self.knows_free
                .then(|| self.space - (self.gone)(self.len.get()))
        }
    }

    #[test]
    fn a_file_with_a_hole_is_not_made_longer() {
        let answers = Answers::new(|_| 8192, |_| 8192);
        assert!(expect_sparse(&answers, u64::MAX).expect("sparse"));
        assert_eq!(answers.tried.get(), TRIAL);
    }

    /// A byte at each end of the short file, and one at that of the long one.
    #[test]
    fn a_file_without_a_hole_is_made_longer() {
        for stored in [
            |len| if len > TRIAL { 6 << 20 } else { 4 << 20 },
            |len| if len > TRIAL { 128 << 20 } else { 64 << 20 },
        ] {
            for knows_free in [true, false] {
                let answers = Answers {
                    knows_free,
                    ..Answers::new(stored, stored)
                };
                assert!(expect_sparse(&answers, u64::MAX).expect("sparse"));
                assert_eq!(answers.tried.get(), LONG_TRIAL);
            }
        }
    }

    #[test]
    fn a_file_that_is_said_to_take_its_length_is_judged_by_what_is_free() {
        let answers = Answers::new(ALL, NOTHING);
        assert!(expect_sparse(&answers, u64::MAX).expect("sparse"));
        // Others write as well.
        let answers = Answers::new(ALL, |len| len / 3);
        assert!(expect_sparse(&answers, u64::MAX).expect("sparse"));

        let answers = Answers::new(ALL, ALL);
        let error = expect_sparse(&answers, u64::MAX).expect_err("stored as data");
        assert!(error.to_string().contains("stores holes as data"));

        let answers = Answers {
            knows_free: false,
            ..answers
        };
        assert!(!expect_sparse(&answers, u64::MAX).expect("not known"));
    }

    #[test]
    fn a_file_system_that_holes_fill_up_is_refused() {
        let answers = Answers {
            space: 100 << 20,
            ..Answers::new(ALL, ALL)
        };
        let error = expect_sparse(&answers, u64::MAX).expect_err("full");
        for words in ["No space left", "stores holes as data", "nearly full"] {
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    /// Else the process would end by SIGXFSZ. And a short file may lie in one huge page.
    #[test]
    fn no_file_is_made_longer_than_is_allowed() {
        for allowed in [TRIAL, TRIAL + 1, LONG_TRIAL - 1] {
            let answers = Answers::new(ALL, ALL);
            let known = expect_sparse(&answers, allowed).expect("not known");
            assert!(!known);
            assert!(answers.tried.get() <= allowed);
        }
    }
}
