//! The core without nbdkit, to be counted: this executable, started again as
//! `bench driver WHAT COUNT`, does COUNT requests over a base and a store that
//! do nothing.
//!
//! `instructions` runs it under callgrind twice with different counts, so that
//! what happens once drops out; and for each request there is one that calls the
//! base or the store alone, so that this call drops out too.

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use nbdkit_cow_filter::base::{Allocation, Base, Extent};
use nbdkit_cow_filter::block::{BlockSize, ByteRange};
use nbdkit_cow_filter::error::Result;
use nbdkit_cow_filter::kept::KeptStore;
use nbdkit_cow_filter::overlay::{Overlay, Store, Zeroing};
use nbdkit_cow_filter::qcow2::file::ImageFile;
use nbdkit_cow_filter::qcow2::header::Header;
use nbdkit_cow_filter::qcow2::image::Image;
use nbdkit_cow_filter::qcow2::layout;

use super::server::resident;

const BLOCK: u64 = 4096;
/// Blocks that are written before rewrites and reads of data are counted.
const PREPARED: u64 = 1024;

/// What a leaf of the block map is in charge of, in bytes of the disk.
const LEAF: u64 = 2048 * BLOCK;

/// Counts allocations: there should be none on the path of a request.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: everything is left to the system's allocator; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the promises that this function asks for too.
        unsafe { System.alloc(layout) }
    }

    // Not left to the default, which would touch all the memory.
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// The next layer, reduced to the call, for a disk of so many bytes. Not inlined, as no real one would be.
pub struct Nothing(pub u64);

impl Base for Nothing {
    fn size(&self) -> u64 {
        self.0
    }

    #[inline(never)]
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        black_box((buf, offset));
        Ok(())
    }

    fn cache(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    fn extents(&self, range: ByteRange, _only_first: bool, list: &mut Vec<Extent>) -> Result<()> {
        list.push(Extent {
            bytes: range,
            allocation: Allocation::DATA,
        });
        Ok(())
    }
}

impl Store for Nothing {
    #[inline(never)]
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        black_box((buf, offset));
        Ok(())
    }

    #[inline(never)]
    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        black_box((buf, offset));
        Ok(())
    }

    #[inline(never)]
    fn punch(&self, range: ByteRange) -> Result<bool> {
        black_box(range);
        Ok(true)
    }

    fn zero_range(&self, _range: ByteRange) -> Result<bool> {
        Ok(true)
    }

    fn can_zero_range(&self) -> bool {
        true
    }
}

impl ImageFile for Nothing {
    fn size(&self) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn set_size(&self, _size: u64) -> io::Result<()> {
        Ok(())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        black_box((buf, offset));
        Ok(())
    }

    #[inline(never)]
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        black_box((buf, offset));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn write_synced(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, _offset: u64, _len: u64) -> io::Result<bool> {
        Ok(true)
    }

    fn zero_range(&self, _offset: u64, _len: u64) -> io::Result<bool> {
        Ok(true)
    }
}

/// Prints one number: allocations, or bytes of memory.
pub fn main(arguments: &[String]) -> ExitCode {
    let [what, count] = arguments else {
        eprintln!("bench driver WHAT COUNT");
        return ExitCode::FAILURE;
    };
    let count = count.parse().expect("a count");
    match run(what, count) {
        Ok(number) => {
            println!("{number}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(what: &str, count: u64) -> Result<u64> {
    match what {
        "memory-trim" => memory(count, |overlay, base, offset| {
            overlay.zero(base, offset, BLOCK, Zeroing::Trim)
        }),
        "memory-write" => {
            let data = [1; BLOCK as usize];
            memory(count, move |overlay, base, offset| {
                overlay.write(base, &data, offset)
            })
        }
        _ => allocations(what, count),
    }
}

fn allocations(what: &str, count: u64) -> Result<u64> {
    let size = 1 << 40;
    let (base, store) = (Nothing(size), Nothing(size));
    let overlay = Overlay::new(size, block_size(), Nothing(size));
    let kept = kept(size)?;
    let mut buffer = [1; BLOCK as usize];
    for block in 0..PREPARED {
        overlay.write(&base, &buffer, block * BLOCK)?;
        kept.write(&base, &buffer, block * BLOCK)?;
    }
    let again = |index: u64| index % PREPARED * BLOCK;
    // Here and there, and none twice: a step that is odd comes everywhere in a power of two.
    let fresh = |index: u64| (PREPARED + index * 40_503 % (1 << 18)) * BLOCK;
    let far = |index: u64| index * LEAF + (1 << 30);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for index in 0..count {
        // The same match in each, so that it drops out of the differences.
        match what {
            "read-base" => overlay.read(&base, &mut buffer, fresh(index), false)?,
            "read-data" => overlay.read(&base, &mut buffer, again(index), false)?,
            "write-fresh" => overlay.write(&base, &buffer, fresh(index))?,
            "write-far" => overlay.write(&base, &buffer, far(index))?,
            "write-again" => overlay.write(&base, &buffer, again(index))?,
            "kept-fresh" => kept.write(&base, &buffer, fresh(index))?,
            "kept-again" => kept.write(&base, &buffer, again(index))?,
            "call-base" => Base::read(&base, &mut buffer, fresh(index))?,
            "call-store-read" => Store::read(&store, &mut buffer, again(index))?,
            "call-store-write" => Store::write(&store, &buffer, fresh(index))?,
            _ => panic!("bench driver: what is {what}?"),
        }
    }
    Ok(ALLOCATIONS.load(Ordering::Relaxed) - before)
}

/// An overlay that is kept, in a file that does nothing.
fn kept(size: u64) -> Result<Overlay<KeptStore<Nothing>>> {
    let header = Header::new(
        layout::Layout::new(size, block_size())?,
        b"disk.img".to_vec(),
        None,
    );
    let image = Image::create(Nothing(size), Path::new("diff.qcow2"), &header)?;
    Ok(Overlay::new(
        size,
        block_size(),
        KeptStore::new(image, true),
    ))
}

/// What memory grows by when every second one of `count` blocks is changed.
fn memory(
    count: u64,
    change: impl Fn(&Overlay<Nothing>, &Nothing, u64) -> Result<()>,
) -> Result<u64> {
    let size = count * BLOCK;
    let base = Nothing(size);
    let overlay = Overlay::new(size, block_size(), Nothing(size));
    let now = || resident("/proc/self/status").expect("the memory of this process");
    let before = now();
    for block in (0..count).step_by(2) {
        change(&overlay, &base, block * BLOCK)?;
    }
    let grown = now() - before;
    // Without this it could be gone by now.
    overlay.state_at(0)?;
    Ok(grown)
}

fn block_size() -> BlockSize {
    BlockSize::new(BLOCK).expect("a power of two")
}
