//! What is done to a sparse file, by system calls that the standard library has
//! not, or not in this way. Offsets and lengths are in bytes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};

/// Writes all of `buf` at `offset`, and nothing but `buf` has to be safe from power
/// loss when this returns. An error may be that of a sync.
pub fn write_synced(file: &File, buf: &[u8], offset: u64) -> io::Result<()> {
    let (mut rest, mut at) = (buf, file_offset(offset)?);
    while !rest.is_empty() {
        let slice = libc::iovec {
            iov_base: rest.as_ptr().cast_mut().cast(),
            iov_len: rest.len(),
        };
        // SAFETY: the descriptor is open, and one slice is passed, that of `rest`,
        // which is only read.
        let written = unsafe { libc::pwritev2(file.as_raw_fd(), &slice, 1, at, libc::RWF_DSYNC) };
        match Errno::result(written) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                rest = &rest[written as usize..];
                at += written as i64;
            }
            Err(Errno::EINTR) => {}
            // An old kernel, or a file system that does not know the flag.
            Err(Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EINVAL) => {
                file.write_all_at(buf, offset)?;
                return file.sync_data();
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// The first byte at or behind `offset` that may take space, `u64::MAX` if there is none.
/// `None`: the file system does not tell.
pub fn next_stored(file: &File, offset: u64) -> Option<u64> {
    let offset = file_offset(offset).ok()?;
    // SAFETY: the descriptor is open. Nobody relies on the position of the file that this
    // changes: all reads and writes name theirs.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, libc::SEEK_DATA) };
    match Errno::result(found) {
        Ok(found) => u64::try_from(found).ok(),
        Err(Errno::ENXIO) => Some(u64::MAX),
        // It is only that more is looked at.
        Err(_) => None,
    }
}

/// Makes a hole; the file keeps its size. `false`: can't be done here, and nothing
/// has changed.
pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<bool> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    change_space(file, flags, offset, len)
}

/// Makes zeroes that take space, without writing them. `false` as for [`punch`].
pub fn zero_range(file: &File, offset: u64, len: u64) -> io::Result<bool> {
    change_space(file, FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, len)
}

/// Copies bytes within the file, by reference where the file system can do that. How many
/// of them were copied: fewer than `len` where it can't be done in this way.
pub fn copy(file: &File, from: u64, to: u64, len: u64) -> io::Result<u64> {
    let (mut from, mut to) = (file_offset(from)?, file_offset(to)?);
    let mut left = len;
    while left > 0 {
        let fd = file.as_raw_fd();
        // SAFETY: the descriptor is open, and the offsets are two numbers of our own, which
        // the system moves on.
        let copied =
            unsafe { libc::copy_file_range(fd, &raw mut from, fd, &raw mut to, left as usize, 0) };
        match Errno::result(copied) {
            // It takes itself to be at the end of the file.
            Ok(0) => break,
            Ok(copied) => left -= copied as u64,
            Err(Errno::EINTR) => {}
            Err(Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EXDEV | Errno::EINVAL) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(len - left)
}

/// Takes space for what is written there later; the bytes stay what they are. `false` as
/// for [`punch`].
pub fn reserve(file: &File, offset: u64, len: u64) -> io::Result<bool> {
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    // What a copy of the file shares (`cp --reflink`) needs new space to be written.
    let own = keep | FallocateFlags::FALLOC_FL_UNSHARE_RANGE;
    Ok(change_space(file, own, offset, len)? || change_space(file, keep, offset, len)?)
}

fn change_space(file: &File, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
    let (offset, len) = (file_offset(offset)?, file_offset(len)?);
    loop {
        match fallocate(file.as_fd(), flags, offset, len) {
            Ok(()) => return Ok(true),
            Err(Errno::EINTR) => {}
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Has what is read of `file` from now on come from the disk, and not from the page cache,
/// which shows also what could not be written. It is synced first, because what is still
/// to be written stays in the page cache.
pub fn drop_cached(file: &File) -> io::Result<()> {
    file.sync_all()?;
    let (from_start, to_end) = (0, 0);
    posix_fadvise(
        file,
        from_start,
        to_end,
        PosixFadviseAdvice::POSIX_FADV_DONTNEED,
    )?;
    Ok(())
}

/// As the system calls want it.
fn file_offset(n: u64) -> io::Result<i64> {
    i64::try_from(n).map_err(|_| Errno::EFBIG.into())
}

/// Asks the file system (btrfs) not to copy on write: what we have stored must not
/// need new space to be overwritten, or a block could be left torn when there is
/// none. It works on empty files only; where it does not, nothing is lost.
pub fn write_in_place(file: &File) {
    // FS_IOC_GETFLAGS, FS_IOC_SETFLAGS and FS_NOCOW_FL of `<linux/fs.h>`.
    const GET: libc::c_ulong = nix::request_code_read!(b'f', 1, size_of::<libc::c_long>()) as _;
    const SET: libc::c_ulong = nix::request_code_write!(b'f', 2, size_of::<libc::c_long>()) as _;
    const NOCOW: libc::c_int = 0x0080_0000;
    let mut flags: libc::c_int = 0;
    // SAFETY: both requests take the address of an int (whatever size their number
    // was made from), which is that of `flags`; the descriptor is open.
    unsafe {
        if libc::ioctl(file.as_raw_fd(), GET as _, &raw mut flags) == 0 {
            flags |= NOCOW;
            libc::ioctl(file.as_raw_fd(), SET as _, &raw const flags);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_and_synced_is_whole() {
        let file = tempfile::tempfile().expect("a file");
        for len in [0, 1, 4096, 400_000] {
            let bytes: Vec<u8> = (0..len).map(|n| (n / 7 + len) as u8).collect();
            let mut read = vec![0; len];
            write_synced(&file, &bytes, 5).expect("written");
            file.read_exact_at(&mut read, 5).expect("as long");
            assert!(read == bytes, "{len} bytes");
        }
    }

    #[test]
    fn what_is_copied_is_the_same_in_both_places() {
        let file = tempfile::tempfile().expect("a file");
        let bytes: Vec<u8> = (0..300_000u32).map(|n| (n / 7) as u8).collect();
        file.write_all_at(&bytes, 0).expect("written");
        let copied = copy(&file, 100, 400_000, 299_000).expect("copied");
        // None, if the file system of the temporary directory can't do it.
        let mut read = vec![0; copied as usize];
        file.read_exact_at(&mut read, 400_000).expect("as long");
        assert!(read == bytes[100..100 + read.len()]);
        let beyond = copy(&file, 1 << 30, 0, 5).expect("nothing to copy");
        assert_eq!(beyond, 0);
    }

    #[test]
    fn a_file_that_can_not_be_written_to_says_so() {
        let file = File::open("/dev/null").expect("a file");
        let error = write_synced(&file, &[1], 0).expect_err("open for reading only");
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        let error = punch(&file, u64::MAX, 1).expect_err("no such offset");
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG));
    }
}
