//! How much memory opening a kept overlay takes: a file says of itself how large
//! its tables are, and must not be believed. In a program of its own, because the
//! allocator counts for all threads. (The fuzz target asks the same of every image.)

#[path = "../fuzz/fuzz_targets/allocations.rs"]
mod allocations;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;

use nbdkit_cow_filter::block::BlockSize;
use nbdkit_cow_filter::kept::resume;
use nbdkit_cow_filter::qcow2::header::Header;
use nbdkit_cow_filter::qcow2::home;
use nbdkit_cow_filter::qcow2::image::Image;
use nbdkit_cow_filter::qcow2::layout::Layout;

use allocations::peak;

const TIB: u64 = 1 << 40;
/// Two chunks of tables, and change. The tables of the disks below take much more.
const LITTLE: usize = 2 << 20;

fn header(disk_size: u64, block: u64) -> Header {
    let block_size = BlockSize::new(block).expect("a block size");
    let layout = Layout::new(disk_size, block_size).expect("fits");
    Header::new(layout, b"disk.img".to_vec(), None)
}

fn image(header: &Header) -> File {
    let file = tempfile::tempfile().expect("a file");
    let handle = file.try_clone().expect("a file");
    Image::create(handle, Path::new("diff.qcow2"), header).expect("an image");
    file
}

/// Opens an image as the filter does. What it said, and how much memory it took.
fn open(file: File) -> (Result<(), String>, usize) {
    peak(|| {
        let (image, _) = Image::open(file, Path::new("diff.qcow2")).map_err(|e| e.to_string())?;
        let overlay = resume(image, true).map_err(|e| e.to_string())?;
        assert!(overlay.is_untouched());
        Ok(())
    })
}

/// The allocator counts for all tests.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[test]
fn opening_an_image_takes_memory_for_what_is_in_it() {
    let _alone = ONE_AT_A_TIME.lock();
    for (size, block) in [(TIB, 4096), (TIB, 65536), (8 * TIB, 65536)] {
        let untouched = header(size, block);
        assert!(untouched.layout.data > 8 << 20, "large tables");
        let (opened, taken) = open(image(&untouched));
        assert_eq!(opened, Ok(()), "{size}");
        assert!(taken < LITTLE, "{taken} bytes for a disk of {size}");
    }

    let small = header(1 << 20, 4096);
    // As long as it claims to be, or far shorter (and longer than a file may be).
    let long = [(TIB, 4096), (8 * TIB, 4096)].map(|(size, block)| (size, block, true));
    let short = [(TIB, 4096), (64 * TIB, 512), (4096 * TIB, 4096)];
    let short = short.map(|(size, block)| (size, block, false));
    for (size, block, is_long) in long.into_iter().chain(short) {
        let claimed = header(size, block);
        let file = image(&small);
        file.write_all_at(&claimed.to_bytes(), 0).expect("a write");
        if is_long {
            file.set_len(claimed.layout.end).expect("a longer file");
        }
        let (opened, taken) = open(file);
        opened.expect_err("damaged");
        assert!(taken < LITTLE, "{taken} bytes for a claim of {size}");
    }
}

/// What another program may have written is read in another way.
#[test]
fn a_survey_takes_memory_for_what_is_in_the_file() {
    let _alone = ONE_AT_A_TIME.lock();
    let small = header(1 << 20, 4096);
    let layout = small.layout;
    let largest_l1 = (4u32 << 20).to_be_bytes();
    let largest_refcount_table = 64u32.to_be_bytes();
    let survey = |changes: &[(&[u8], u64)], len: u64| {
        let file = image(&small);
        for (bytes, at) in changes {
            file.write_all_at(bytes, *at).expect("a write");
        }
        file.set_len(len).expect("another length");
        peak(|| home::survey(&file, Path::new("diff.qcow2")).map(drop))
    };
    // Tables that are longer than the file, and one that is named many times.
    let table = (layout.l2 | (1 << 63)).to_be_bytes().repeat(1 << 16);
    let at = layout.end.to_be_bytes();
    for (changes, len) in [
        (&[(&largest_l1[..], 36)][..], layout.end),
        (&[(&largest_refcount_table, 56)], layout.end),
        (
            &[
                (&(1u32 << 16).to_be_bytes(), 36),
                (&at, 40),
                (&table, layout.end),
            ],
            layout.end + (1 << 20),
        ),
    ] {
        let (said, taken) = survey(changes, len);
        said.expect_err("damaged");
        assert!(taken < LITTLE, "{taken} bytes for {len}");
    }
}
