//! What an image is written to. A trait, so that tests can record every write
//! and sync, or make one fail, and look at each file that a crash could leave.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

/// A sparse file. Offsets and lengths are in bytes.
pub trait ImageFile: Send + Sync {
    fn size(&self) -> io::Result<u64>;

    /// Makes it longer; what is new is a hole.
    fn set_size(&self, size: u64) -> io::Result<()>;

    /// Fills `buf`; an error if the file ends before.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// All that was written before is safe from power loss when this returns.
    fn sync(&self) -> io::Result<()>;

    /// Writes `buf`, and nothing but `buf` has to be safe from power loss when this
    /// returns. An error may be that of a sync.
    fn write_synced(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes a hole. `false`: can't be done here, and nothing has changed.
    fn punch(&self, offset: u64, len: u64) -> io::Result<bool>;

    /// Makes zeroes that take space, without writing them. `false` as for `punch`.
    fn zero_range(&self, offset: u64, len: u64) -> io::Result<bool>;
}

impl ImageFile for File {
    fn size(&self) -> io::Result<u64> {
        self.metadata().map(|metadata| metadata.len())
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.set_len(size)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(buf, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn write_synced(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let (mut rest, mut at) = (buf, file_offset(offset)?);
        while !rest.is_empty() {
            let slice = libc::iovec {
                iov_base: rest.as_ptr().cast_mut().cast(),
                iov_len: rest.len(),
            };
            // SAFETY: the descriptor is open, and one slice is passed, that of `rest`,
            // which is only read.
            let written =
                unsafe { libc::pwritev2(self.as_raw_fd(), &slice, 1, at, libc::RWF_DSYNC) };
            match Errno::result(written) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    rest = &rest[written as usize..];
                    at += written as i64;
                }
                Err(Errno::EINTR) => {}
                // An old kernel, or a file system that does not know the flag.
                Err(Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EINVAL) => {
                    self.write_all_at(buf, offset)?;
                    return self.sync_data();
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        change_space(self, flags, offset, len)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<bool> {
        change_space(self, FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, len)
    }
}

/// As the system calls want it.
fn file_offset(n: u64) -> io::Result<i64> {
    i64::try_from(n).map_err(|_| Errno::EFBIG.into())
}

/// fallocate(2). `false` where the file system can't do that.
pub fn change_space(file: &File, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
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
