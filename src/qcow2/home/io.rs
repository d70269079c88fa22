//! What is done to the file of an image, with errors that name it.

use std::ops::Range;

use super::super::file::ImageFile;
use crate::buffer::{buffer, is_zero};
use crate::error::Result;
use crate::overlay_file::OverlayFile;

/// How much is zeroed at once.
const ZEROES: u64 = 1 << 20;

/// See the module's documentation.
pub struct Io<'a, F> {
    pub file: &'a F,
    pub name: &'a OverlayFile,
}

impl<F> Clone for Io<'_, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F> Copy for Io<'_, F> {}

impl<F: ImageFile> Io<'_, F> {
    pub fn size(&self) -> Result<u64> {
        let size = self.file.size();
        size.map_err(|e| self.name.failed(e, "asking the length of"))
    }

    pub fn set_size(&self, size: u64) -> Result<()> {
        self.file.set_size(size).map_err(|e| {
            let operation = format!("changing the length to {size} bytes of");
            self.name.failed(e, &operation)
        })
    }

    pub fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        self.file.read_at(buf, at).map_err(|e| {
            let len = buf.len() as u64;
            self.name.failed_at(e, "reading tables of", at, len)
        })
    }

    pub fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.file.write_at(bytes, at).map_err(|e| {
            let len = bytes.len() as u64;
            self.name.write_failed_at(e, "writing tables of", at, len)
        })
    }

    /// As `ImageFile::write_synced`.
    pub fn write_synced(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.file.write_synced(bytes, at).map_err(|e| {
            let len = bytes.len() as u64;
            self.name.write_failed_at(e, "writing to", at, len)
        })
    }

    /// Does not overlap, and what is read lies within the file.
    pub fn copy(&self, from: u64, to: u64, len: u64) -> Result<()> {
        self.file.copy(from, to, len).map_err(|e| {
            let operation = format!("copying to offset {to} of");
            self.name.write_failed_at(e, &operation, from, len)
        })
    }

    pub fn sync(&self) -> Result<()> {
        let synced = self.file.sync();
        synced.map_err(|e| self.name.failed(e, "syncing"))
    }

    /// Gives space back, where that can be done.
    pub fn punch(&self, range: Range<u64>) -> Result<bool> {
        let len = range.end - range.start;
        self.file.punch(range.start, len).map_err(|e| {
            self.name
                .write_failed_at(e, "punching a hole in", range.start, len)
        })
    }

    /// Makes zeroes of what is in the file.
    pub fn clear(&self, range: Range<u64>) -> Result<()> {
        if self.punch(range.clone())? {
            return Ok(());
        }
        let mut source = Source::new(*self, range.end);
        let mut found = buffer(ZEROES.min(range.end - range.start))?;
        let zeroes = buffer(found.len() as u64)?;
        for at in range.clone().step_by(found.len().max(1)) {
            let len = (range.end - at).min(ZEROES) as usize;
            if source.read(&mut found[..len], at)? {
                self.write(&zeroes[..len], at)?;
            }
        }
        Ok(())
    }
}

/// Reads tables, of which large parts may be holes. Beyond the file's end there are zeroes.
pub struct Source<'a, F> {
    io: Io<'a, F>,
    len: u64,
    /// A hole, the last that was found.
    hole: Range<u64>,
}

impl<'a, F: ImageFile> Source<'a, F> {
    /// `len` is the length of the file, or how much of it is looked at.
    pub fn new(io: Io<'a, F>, len: u64) -> Self {
        Source {
            io,
            len,
            hole: 0..0,
        }
    }

    /// `false`: there are zeroes, and they may not be in `buf`.
    pub fn read(&mut self, buf: &mut [u8], at: u64) -> Result<bool> {
        let end = self.len.min(at.saturating_add(buf.len() as u64));
        if end <= at || self.is_hole(at..end) {
            return Ok(false);
        }
        let (found, beyond) = buf.split_at_mut((end - at) as usize);
        self.io.read(found, at)?;
        beyond.fill(0);
        Ok(!is_zero(found))
    }

    fn is_hole(&mut self, range: Range<u64>) -> bool {
        if !self.hole.contains(&range.start) {
            let stored = self.io.file.next_stored(range.start);
            self.hole = range.start..stored.unwrap_or(range.start);
        }
        range.end <= self.hole.end
    }
}
