//! The locks by which QEMU keeps two programs from writing to one image.
//!
//! QEMU describes what a program does with an image as *permissions*, and takes
//! read locks on single bytes of the file (open file description locks, so that
//! they survive a fork and end with the last descriptor):
//!
//! - byte 100 + *p*: somebody has permission *p*;
//! - byte 200 + *p*: somebody does not share permission *p* with others.
//!
//! Nobody writes to those bytes for it, and read locks never conflict: each takes
//! its own first, then looks whether another has one that contradicts. So of two
//! that start together at least one sees the other; both may, and give up.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

const HAS: i64 = 100;
const DOES_NOT_SHARE: i64 = 200;

/// BLK_PERM_CONSISTENT_READ, BLK_PERM_WRITE, BLK_PERM_WRITE_UNCHANGED and
/// BLK_PERM_RESIZE by the number of their bit.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const WRITE_UNCHANGED: i64 = 2;
const RESIZE: i64 = 3;

/// What a program does with a file, and what others must not do meanwhile.
struct Usage {
    has: &'static [i64],
    does_not_share: &'static [i64],
}

/// What QEMU itself takes for an image that it writes to. That others may read
/// is shared, so a program that does not mind a changing image (`qemu-img -U`)
/// can.
const WRITING: Usage = Usage {
    has: &[CONSISTENT_READ, WRITE],
    does_not_share: &[WRITE, WRITE_UNCHANGED, RESIZE],
};

/// What QEMU takes for the backing file of an image.
const BACKING: Usage = Usage {
    has: &[CONSISTENT_READ],
    does_not_share: &[WRITE, RESIZE],
};

/// Locks `file` for writing. `Ok(false)`: another program uses it. Errors are
/// those of a file system that has no such locks.
pub fn lock_for_writing(file: &File) -> io::Result<bool> {
    lock(file, &WRITING)
}

/// Locks `file` as that of an image's base. As [`lock_for_writing`], but `Ok(false)` is:
/// another program writes to it.
pub fn lock_as_backing(file: &File) -> io::Result<bool> {
    lock(file, &BACKING)
}

fn lock(file: &File, usage: &Usage) -> io::Result<bool> {
    let bytes = |permissions: &'static [i64], base| permissions.iter().map(move |p| base + p);
    let ours = bytes(usage.has, HAS).chain(bytes(usage.does_not_share, DOES_NOT_SHARE));
    for byte in ours {
        if !set(file, byte)? {
            return Ok(false);
        }
    }
    let contradicted = bytes(usage.has, DOES_NOT_SHARE).chain(bytes(usage.does_not_share, HAS));
    for byte in contradicted {
        if is_locked_by_another(file, byte)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn byte_lock(kind: libc::c_int, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// `false`: a program that is none of QEMU's has a write lock there.
fn set(file: &File, byte: i64) -> io::Result<bool> {
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&byte_lock(libc::F_RDLCK, byte))) {
            Ok(_) => return Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(false),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Asks whether a write lock could be had: it could not beside a read lock of
/// another's, and our own do not count.
fn is_locked_by_another(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = byte_lock(libc::F_WRLCK, byte);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_description_is_refused_until_the_first_is_gone() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .open(file.path())
                .expect("the file")
        };
        let (first, second) = (open(), open());
        assert!(lock_for_writing(&first).expect("locks"));
        assert!(lock_for_writing(&first).expect("its own do not count"));
        assert!(!lock_for_writing(&second).expect("locks"));
        drop((first, second));
        assert!(lock_for_writing(&open()).expect("locks"));
    }

    #[test]
    fn a_reader_that_shares_nothing_keeps_us_out_and_one_that_shares_all_does_not() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let reader = file.reopen().expect("the file");
        assert!(set(&reader, HAS + CONSISTENT_READ).expect("a lock"));
        let ours = file.reopen().expect("the file");
        assert!(lock_for_writing(&ours).expect("locks"));
        drop(ours);
        assert!(set(&reader, DOES_NOT_SHARE + WRITE).expect("a lock"));
        assert!(!lock_for_writing(&file.reopen().expect("the file")).expect("locks"));
    }
    #[test]
    fn a_base_is_shared_by_those_who_read_and_not_with_one_who_writes() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let open = || file.reopen().expect("the file");
        let (first, second, writer) = (open(), open(), open());
        assert!(lock_as_backing(&first).expect("locks"));
        assert!(lock_as_backing(&second).expect("locks"));
        assert!(!lock_for_writing(&writer).expect("locks"));
        drop((first, second, writer));
        let writer = open();
        assert!(lock_for_writing(&writer).expect("locks"));
        assert!(!lock_as_backing(&open()).expect("locks"));
    }

    #[test]
    fn a_write_lock_of_another_program_is_a_use() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let other = file.reopen().expect("the file");
        let whole = libc::flock {
            l_len: 0,
            ..byte_lock(libc::F_WRLCK, 0)
        };
        fcntl(&other, FcntlArg::F_OFD_SETLK(&whole)).expect("a lock");
        let ours = file.reopen().expect("the file");
        assert!(!lock_for_writing(&ours).expect("locks"));
        assert!(!lock_as_backing(&ours).expect("locks"));
    }
}
