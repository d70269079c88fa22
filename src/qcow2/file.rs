//! What an image is written to. A trait, so that tests can record every write
//! and sync, or make one fail, and look at each file that a crash could leave.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use crate::sparse;

/// How much is read at once to be copied.
const COPY_BUFFER: u64 = 1 << 20;

/// A sparse file. Offsets and lengths are in bytes.
pub trait ImageFile: Send + Sync {
    fn size(&self) -> io::Result<u64>;

    /// Whether it can be found again, by whatever name. `path` is one that it had.
    fn has_name(&self, _path: &Path) -> io::Result<bool> {
        Ok(true)
    }

    /// Makes it longer or shorter; what is new is a hole.
    fn set_size(&self, size: u64) -> io::Result<()>;

    /// Fills `buf`; an error if the file ends before.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Copies bytes within the file. `from` and what follows it must lie in the file and not
    /// overlap `to` and what follows that; the file becomes longer where it has to.
    fn copy(&self, from: u64, to: u64, len: u64) -> io::Result<()> {
        copy_in_memory(self, from, to, len)
    }

    /// All that was written before is safe from power loss when this returns.
    fn sync(&self) -> io::Result<()>;

    /// Writes `buf`, and nothing but `buf` has to be safe from power loss when this
    /// returns. An error may be that of a sync.
    fn write_synced(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Takes space for bytes that will be written later; they stay what they are.
    /// Success where that can't be done.
    fn reserve(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    /// The first byte at or behind `offset` that may take space: what lies between is a
    /// hole. `None`: not known. Beyond all that takes space it is `u64::MAX`.
    fn next_stored(&self, _offset: u64) -> Option<u64> {
        None
    }

    /// Makes a hole. `false`: can't be done here, and nothing has changed.
    fn punch(&self, offset: u64, len: u64) -> io::Result<bool>;

    /// Makes zeroes that take space, without writing them. `false` as for `punch`.
    fn zero_range(&self, offset: u64, len: u64) -> io::Result<bool>;
}

/// Whether who opens `path` gets `file`.
pub fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let identity = |about: Metadata| (about.dev(), about.ino());
    Ok(identity(fs::metadata(path)?) == identity(file.metadata()?))
}

/// For `ImageFile::copy`, where the system can't do it.
fn copy_in_memory<F: ImageFile + ?Sized>(file: &F, from: u64, to: u64, len: u64) -> io::Result<()> {
    let mut buf = vec![0; len.min(COPY_BUFFER) as usize];
    for done in (0..len).step_by(buf.len().max(1)) {
        let piece = &mut buf[..(len - done).min(COPY_BUFFER) as usize];
        file.read_at(piece, from + done)?;
        file.write_at(piece, to + done)?;
    }
    Ok(())
}

impl ImageFile for File {
    fn size(&self) -> io::Result<u64> {
        self.metadata().map(|metadata| metadata.len())
    }

    fn has_name(&self, path: &Path) -> io::Result<bool> {
        // Some file systems in user space count no names.
        Ok(self.metadata()?.nlink() > 0 || is_at(self, path).unwrap_or(false))
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.set_len(size)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buf, offset).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                io::Error::new(e.kind(), "the file has become shorter than it was")
            }
            _ => e,
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(buf, offset)
    }

    fn copy(&self, from: u64, to: u64, len: u64) -> io::Result<()> {
        let done = sparse::copy(self, from, to, len)?;
        copy_in_memory(self, from + done, to + done, len - done)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn write_synced(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        sparse::write_synced(self, buf, offset)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        sparse::reserve(self, offset, len).map(drop)
    }

    fn next_stored(&self, offset: u64) -> Option<u64> {
        sparse::next_stored(self, offset)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        sparse::punch(self, offset, len)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<bool> {
        sparse::zero_range(self, offset, len)
    }
}
