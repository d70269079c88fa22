//! A sparse file in memory: what an image is written to here. It may claim any
//! length, since only the pages that were written take memory.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use nbdkit_cow_filter::qcow2::file::ImageFile;

pub const PAGE: u64 = 4096;

#[derive(Clone, Default)]
pub struct Sparse {
    pub len: u64,
    pages: BTreeMap<u64, Box<[u8; PAGE as usize]>>,
    /// How many calls have changed it.
    pub changes: u64,
    /// Whether its length may change. While it is served it does not.
    pub may_grow: bool,
}

impl Sparse {
    /// Bytes beyond the end are zeroes.
    pub fn read(&self, mut buf: &mut [u8], mut at: u64) {
        while !buf.is_empty() {
            let (page, within) = (at / PAGE, (at % PAGE) as usize);
            let len = buf.len().min(PAGE as usize - within);
            let (piece, rest) = buf.split_at_mut(len);
            match self.pages.get(&page) {
                Some(bytes) => piece.copy_from_slice(&bytes[within..within + len]),
                None => piece.fill(0),
            }
            buf = rest;
            at += len as u64;
        }
    }

    pub fn bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(&mut bytes, at);
        bytes
    }

    /// Makes it longer where need be.
    pub fn write(&mut self, mut buf: &[u8], mut at: u64) {
        self.len = self.len.max(at + buf.len() as u64);
        while !buf.is_empty() {
            let (page, within) = (at / PAGE, (at % PAGE) as usize);
            let len = buf.len().min(PAGE as usize - within);
            let bytes = self
                .pages
                .entry(page)
                .or_insert_with(|| Box::new([0; PAGE as usize]));
            bytes[within..within + len].copy_from_slice(&buf[..len]);
            buf = &buf[len..];
            at += len as u64;
        }
    }

    fn punch(&mut self, range: Range<u64>) {
        let (first, last) = (range.start / PAGE, range.end.div_ceil(PAGE));
        let touched: Vec<u64> = self
            .pages
            .range(first..last)
            .map(|(page, _)| *page)
            .collect();
        for page in touched {
            let start = range.start.max(page * PAGE) - page * PAGE;
            let end = range.end.min((page + 1) * PAGE) - page * PAGE;
            if end - start == PAGE {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                bytes[start as usize..end as usize].fill(0);
            }
        }
    }

    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.punch(len..self.len);
        }
        self.len = len;
    }

    /// How many pages of `range` take memory.
    pub fn pages_in(&self, range: Range<u64>) -> usize {
        self.pages
            .range(range.start / PAGE..range.end.div_ceil(PAGE))
            .count()
    }

    /// The pieces of 16 bytes of `range` that are not all zeroes, with their offsets.
    pub fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = (u64, [u8; 16])> + '_ {
        self.pages
            .range(range.start / PAGE..range.end.div_ceil(PAGE))
            .flat_map(|(page, bytes)| {
                (page * PAGE..)
                    .step_by(16)
                    .zip(bytes.chunks_exact(16))
                    .map(|(at, piece)| (at, piece.try_into().expect("16 bytes")))
            })
            .filter(move |(at, piece)| range.contains(at) && *piece != [0; 16])
    }
}

/// A handle that outlives the image.
#[derive(Clone)]
pub struct MemoryFile {
    sparse: Arc<Mutex<Sparse>>,
    can_punch: bool,
}

impl MemoryFile {
    pub fn new(can_punch: bool) -> Self {
        MemoryFile {
            sparse: Arc::default(),
            can_punch,
        }
    }

    pub fn sparse(&self) -> MutexGuard<'_, Sparse> {
        self.sparse.lock().expect("a panic ends the process")
    }

    /// For a change that must lie within the file.
    fn change(&self, at: u64, len: u64) -> io::Result<MutexGuard<'_, Sparse>> {
        let mut sparse = self.sparse();
        let end = at.checked_add(len).expect("no overflow");
        assert!(
            sparse.may_grow || end <= sparse.len,
            "{len} bytes at {at:#x} of a file of {:#x}",
            sparse.len
        );
        expect_possible(end)?;
        sparse.changes += 1;
        Ok(sparse)
    }
}

/// No file is longer than that.
fn expect_possible(len: u64) -> io::Result<()> {
    match i64::try_from(len) {
        Ok(_) => Ok(()),
        Err(_) => Err(io::Error::from_raw_os_error(libc::EFBIG)),
    }
}

impl ImageFile for MemoryFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.sparse().len)
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        expect_possible(size)?;
        let mut sparse = self.sparse();
        assert!(sparse.may_grow || sparse.len == 0, "it is served");
        sparse.set_len(size);
        sparse.changes += 1;
        Ok(())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let sparse = self.sparse();
        match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= sparse.len => sparse.read(buf, offset),
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.change(offset, buf.len() as u64)?.write(buf, offset);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn write_synced(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_at(buf, offset)
    }

    fn next_stored(&self, offset: u64) -> Option<u64> {
        let sparse = self.sparse();
        let mut pages = sparse.pages.range(offset / PAGE..);
        Some(
            pages
                .next()
                .map_or(u64::MAX, |(page, _)| offset.max(page * PAGE)),
        )
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        if self.can_punch {
            self.change(offset, len)?.punch(offset..offset + len);
        }
        Ok(self.can_punch)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.change(offset, len)?.punch(offset..offset + len);
        Ok(true)
    }
}
