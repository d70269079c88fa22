//! The file that a kept overlay has in the models: what it holds of two blocks, and
//! what a power loss would leave of that. One step of a flush may fail.
//!
//! The first byte of each block lies in an atomic that is only ever accessed
//! *relaxed*, as in the store of the other models, so that a sync finds a block's
//! bytes only if the code has put their write before it. Only one thread at a time
//! writes tables (L2 entries and refcounts), so they lie behind a lock.

use std::io;
use std::ops::Range;

use loom::sync::atomic::{AtomicU8, Ordering};
use loom::sync::{Arc, Mutex};

use nbdkit_cow_filter::block::BlockSize;
use nbdkit_cow_filter::qcow2::file::ImageFile;
use nbdkit_cow_filter::qcow2::layout::{Entry, GuestCluster, Layout};

use super::{BLOCK, GARBAGE, SIZE};

/// The blocks that are written to, in clusters of their own: one after the other in
/// the L2 table, so that a flush of both writes one piece.
pub const BLOCKS: [u64; 2] = [0, 32];
const CLUSTERS: usize = (SIZE / BLOCK / 32) as usize;
const ENTRY_LEN: usize = 16;

pub fn layout() -> Layout {
    Layout::new(SIZE, BlockSize::new(BLOCK).expect("a block size")).expect("fits")
}

/// The L2 entries and the refcounts of the disk's clusters.
#[derive(Clone, Copy, Default)]
pub struct Tables {
    entries: [[u8; ENTRY_LEN]; CLUSTERS],
    pub refcounts: [[u8; 2]; CLUSTERS],
}

impl Tables {
    fn entry(&self, cluster: usize) -> Entry {
        Entry::from_bytes(&self.entries[cluster])
    }

    pub fn has_data(&self, number: usize) -> bool {
        self.entry(number).bitmap & 1 != 0
    }

    pub fn has_zeroes(&self, number: usize) -> bool {
        (self.entry(number).bitmap >> 32) & 1 != 0
    }
}

/// What a flush asks of the file, where the models let it fail.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    WriteTables,
    Sync,
}

#[derive(Default)]
pub struct Metadata {
    pub written: Tables,
    /// What a power loss leaves for certain.
    pub safe: Tables,
    /// The step that is to fail, once, and how many of its kind come before it.
    pub fault: Option<(Step, usize)>,
    /// The step that has failed.
    pub failed: Option<Step>,
    /// How many flushes were told of a failure.
    pub told: usize,
    /// What is wrong: told by the main thread, when the others have ended.
    pub mistake: Option<String>,
}

impl Metadata {
    /// A step that fails changes nothing.
    fn take_step(&mut self, step: Step) -> io::Result<()> {
        match &mut self.fault {
            Some((failing, before)) if *failing == step && *before > 0 => *before -= 1,
            Some((failing, _)) if *failing == step => {
                self.fault = None;
                self.failed = Some(step);
                return Err(io::Error::from_raw_os_error(match step {
                    Step::WriteTables => libc::ENOSPC,
                    Step::Sync => libc::EIO,
                }));
            }
            _ => {}
        }
        Ok(())
    }
}

/// In all that follows, `number` is that of a block in [`BLOCKS`], and of its cluster.
struct ModelFile {
    bytes: [AtomicU8; 2],
    safe: [AtomicU8; 2],
    metadata: Mutex<Metadata>,
}

#[derive(Clone)]
pub struct Handle(Arc<ModelFile>);

impl Handle {
    pub fn new() -> Self {
        // To be told from the holes that discards make.
        let holes = || [AtomicU8::new(GARBAGE), AtomicU8::new(GARBAGE)];
        Handle(Arc::new(ModelFile {
            bytes: holes(),
            safe: holes(),
            metadata: Mutex::new(Metadata::default()),
        }))
    }

    /// The byte of a block that a range of the file has, if it has one.
    fn byte_at(range: Range<u64>) -> Option<usize> {
        let data = layout().data;
        BLOCKS
            .iter()
            .position(|block| range.contains(&(data + block * BLOCK)))
    }

    pub fn put(&self, range: Range<u64>, byte: u8) {
        if let Some(number) = Self::byte_at(range) {
            self.0.bytes[number].store(byte, Ordering::Relaxed);
        }
    }

    pub fn metadata<T>(&self, f: impl FnOnce(&mut Metadata) -> T) -> T {
        f(&mut self.0.metadata.lock().expect("nothing panics in here"))
    }

    pub fn safe_byte(&self, number: usize) -> u8 {
        self.0.safe[number].load(Ordering::Relaxed)
    }

    /// Writes what lies before the data, unless `step` fails.
    fn write_tables(&self, step: Step, buf: &[u8], offset: u64) -> io::Result<()> {
        let layout = layout();
        let first = GuestCluster(0);
        let is_l2 = offset >= layout.l2;
        self.metadata(|metadata| {
            metadata.take_step(step)?;
            let Tables { entries, refcounts } = &mut metadata.written;
            if is_l2 {
                put_cells(entries, layout.entry_at(first), buf, offset);
            } else {
                put_cells(refcounts, layout.refcount_at(first), buf, offset);
            }
            io::Result::Ok(())
        })?;
        if is_l2 {
            self.check_order();
        }
        Ok(())
    }

    /// What an L2 entry says must be true of the file already.
    fn check_order(&self) {
        let safe_bytes = [0, 1].map(|number| self.safe_byte(number));
        self.metadata(|metadata| {
            for (number, safe) in safe_bytes.into_iter().enumerate() {
                let entry = metadata.written.entry(number);
                let mistake = if entry.descriptor != 0 && metadata.safe.refcounts[number] != [0, 1]
                {
                    "has no refcount"
                } else if metadata.written.has_data(number) && safe == GARBAGE {
                    "was never synced"
                } else {
                    continue;
                };
                metadata.mistake = Some(format!("{number} {mistake} when its entry is written"));
            }
        });
    }
}

/// The parts of a table of `N`-byte cells from `start` on that a write covers.
fn put_cells<const N: usize>(cells: &mut [[u8; N]], start: u64, bytes: &[u8], at: u64) {
    for (i, cell) in cells.iter_mut().enumerate() {
        let cell_at = start + (i * N) as u64;
        if cell_at >= at && cell_at + N as u64 <= at + bytes.len() as u64 {
            cell.copy_from_slice(&bytes[(cell_at - at) as usize..][..N]);
        }
    }
}

impl ImageFile for Handle {
    fn size(&self) -> io::Result<u64> {
        Ok(layout().end)
    }

    fn set_size(&self, _size: u64) -> io::Result<()> {
        Ok(())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if let Some(number) = Self::byte_at(offset..offset + buf.len() as u64) {
            buf[0] = self.0.bytes[number].load(Ordering::Relaxed);
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if offset < layout().data {
            return self.write_tables(Step::WriteTables, buf, offset);
        }
        self.put(offset..offset + buf.len() as u64, buf[0]);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        // Before the lock, which would order other threads' writes before this.
        let bytes = [0, 1].map(|number: usize| self.0.bytes[number].load(Ordering::Relaxed));
        self.metadata(|metadata| {
            metadata.take_step(Step::Sync)?;
            metadata.safe = metadata.written;
            io::Result::Ok(())
        })?;
        for (safe, byte) in self.0.safe.iter().zip(bytes) {
            safe.store(byte, Ordering::Relaxed);
        }
        Ok(())
    }

    fn write_synced(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_tables(Step::Sync, buf, offset)?;
        self.metadata(|metadata| metadata.safe.entries = metadata.written.entries);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.put(offset..offset + len, 0);
        Ok(true)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.punch(offset, len)
    }
}
