//! The overlay file: where the bytes of *data* blocks are.
//!
//! The byte at offset *n* of the disk is stored at offset *n*. A file system
//! limits a file's size and a disk may be larger (NBD allows 8 EiB less one
//! byte), so the store is a row of sparse files, the *segments*, each of the size
//! that the directory was found to allow (8 TiB at most), and made when something
//! is first written to it.
//!
//! The files have no name: nobody else can open them, and the system removes
//! them when nbdkit ends, however it ends.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use super::directory::Directory;
use crate::block::ByteRange;
use crate::error::{Error, Result};
use crate::overlay::Store;
use crate::overlay_file::OverlayFile;
use crate::sparse;

/// So many segments are found without a lock: 512 TiB of disk, where a file may
/// have 8 TiB.
const NEAR: u64 = 64;

/// A store in files without a name.
pub struct TemporaryStore {
    directory: Arc<Directory>,
    size: u64,
    /// Segment *n* begins at *n* shifted left by this: their size is a power of two.
    segment_shift: u32,
    /// The first segments.
    near: Box<[OnceLock<File>]>,
    /// All others: a disk of 7 EiB has a million of 8 TiB, and under a small
    /// `ulimit -f` far more, so there must be no place kept for each.
    /// Innermost lock: nothing else is taken while it is held.
    far: RwLock<BTreeMap<u64, Arc<File>>>,
    /// Taken to make one of the first segments, so that two writers don't make
    /// the same one twice. Innermost as well.
    making: Mutex<()>,
}

/// A segment that is there.
enum Segment<'a> {
    Near(&'a File),
    Far(Arc<File>),
}

impl Deref for Segment<'_> {
    type Target = File;

    fn deref(&self) -> &File {
        match self {
            Segment::Near(file) => file,
            Segment::Far(file) => file,
        }
    }
}

impl TemporaryStore {
    /// A store for a disk of `size` bytes; no file is made yet.
    pub fn new(directory: Arc<Directory>, size: u64) -> Self {
        let segment_shift = directory.file_system().largest_file.trailing_zeros();
        let near = size
            .div_ceil(directory.file_system().largest_file)
            .min(NEAR);
        TemporaryStore {
            directory,
            size,
            segment_shift,
            near: (0..near).map(|_| OnceLock::new()).collect(),
            far: RwLock::new(BTreeMap::new()),
            making: Mutex::new(()),
        }
    }

    /// The segment, or `None` if nothing was written to it.
    fn present(&self, index: u64) -> Option<Segment<'_>> {
        match self.near.get(index as usize) {
            Some(slot) => slot.get().map(Segment::Near),
            None => {
                let far = self.far.read().unwrap_or_else(PoisonError::into_inner);
                far.get(&index).map(|file| Segment::Far(Arc::clone(file)))
            }
        }
    }

    fn present_or_new(&self, index: u64) -> Result<Segment<'_>> {
        if let Some(segment) = self.present(index) {
            return Ok(segment);
        }
        if let Some(slot) = self.near.get(index as usize) {
            let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
            return match slot.get() {
                Some(file) => Ok(Segment::Near(file)),
                None => {
                    let file = self.make(index)?;
                    Ok(Segment::Near(slot.get_or_init(|| file)))
                }
            };
        }
        let mut far = self.far.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = far.get(&index) {
            return Ok(Segment::Far(Arc::clone(file)));
        }
        let file = Arc::new(self.make(index)?);
        far.insert(index, Arc::clone(&file));
        Ok(Segment::Far(file))
    }

    fn make(&self, index: u64) -> Result<File> {
        let start = index * self.directory.file_system().largest_file;
        let len = (self.size - start).min(self.directory.file_system().largest_file);
        log::debug!("makes the overlay file for {len} bytes from offset {start} on");
        self.directory.make_file(len)
    }

    /// The segment that the byte at `offset` is in, and where in it.
    fn locate(&self, offset: u64) -> (u64, u64) {
        let index = offset >> self.segment_shift;
        (index, offset - (index << self.segment_shift))
    }

    /// The parts of `range` that lie in one segment each: the segment's index,
    /// the offset in it, and the part.
    fn parts(&self, range: ByteRange) -> impl Iterator<Item = (u64, u64, ByteRange)> + '_ {
        let mut rest = range;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let (index, at) = self.locate(rest.start);
            let part = ByteRange {
                start: rest.start,
                end: rest.end.min((index + 1) << self.segment_shift),
            };
            rest.start = part.end;
            Some((index, at, part))
        })
    }

    /// The file and the offset in it, if all of `range` is in one of the first
    /// segments and that is there: as it is for nearly every request.
    #[inline]
    fn in_one(&self, range: ByteRange) -> Option<(&File, u64)> {
        let (index, at) = self.locate(range.start);
        let file = self.near.get(index as usize)?.get()?;
        (at + range.len() <= 1 << self.segment_shift).then_some((file, at))
    }

    fn file_name(&self) -> OverlayFile {
        OverlayFile::In(self.directory.path().to_owned())
    }

    fn failed(&self, source: io::Error, operation: &str, part: ByteRange) -> Error {
        self.file_name()
            .failed_at(source, operation, part.start, part.len())
    }

    fn write_failed(&self, source: io::Error, operation: &str, part: ByteRange) -> Error {
        self.file_name()
            .write_failed_at(source, operation, part.start, part.len())
    }
}

impl Store for TemporaryStore {
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = ByteRange::checked(offset, buf.len() as u64, self.size)?;
        if let Some((file, at)) = self.in_one(range) {
            return file
                .read_exact_at(buf, at)
                .map_err(|e| self.failed(e, "reading", range));
        }
        for (index, at, part) in self.parts(range) {
            let piece = &mut buf[part.in_buffer(offset)];
            match self.present(index) {
                Some(file) => file
                    .read_exact_at(piece, at)
                    .map_err(|e| self.failed(e, "reading", part))?,
                None => piece.fill(0),
            }
        }
        Ok(())
    }

    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        let range = ByteRange::checked(offset, buf.len() as u64, self.size)?;
        if let Some((file, at)) = self.in_one(range) {
            return file
                .write_all_at(buf, at)
                .map_err(|e| self.write_failed(e, "writing to", range));
        }
        for (index, at, part) in self.parts(range) {
            let file = self.present_or_new(index)?;
            file.write_all_at(&buf[part.in_buffer(offset)], at)
                .map_err(|e| self.write_failed(e, "writing to", part))?;
        }
        Ok(())
    }

    fn punch(&self, range: ByteRange) -> Result<bool> {
        if !self.directory.file_system().can_punch {
            return Ok(false);
        }
        let mut done = true;
        for (index, at, part) in self.parts(range) {
            if let Some(file) = self.present(index) {
                done &= sparse::punch(&file, at, part.len())
                    .map_err(|e| self.write_failed(e, "punching a hole in", part))?;
            }
        }
        Ok(done)
    }

    fn zero_range(&self, range: ByteRange) -> Result<bool> {
        if !self.can_zero_range() {
            return Ok(false);
        }
        let mut done = true;
        for (index, at, part) in self.parts(range) {
            let file = self.present_or_new(index)?;
            done &= sparse::zero_range(&file, at, part.len())
                .map_err(|e| self.write_failed(e, "zeroing", part))?;
        }
        Ok(done)
    }

    fn can_zero_range(&self) -> bool {
        self.directory.file_system().can_zero_range
    }
}
