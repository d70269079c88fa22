//! A change that reads the base first, and a newer one: the newer one wins, whichever is
//! stored first.

use std::sync::Mutex;

use loom::sync::Arc;
use loom::thread::{self, JoinHandle};

use nbdkit_cow_filter::base::{Base, Extent};
use nbdkit_cow_filter::block::ByteRange;
use nbdkit_cow_filter::error::Result;

use super::{
    BLOCK, Disk, HALF, ModelBase, OF_BASE, Prepared, SIZE, halves, prepared_disk, trim, write,
    write_block, write_first_half, write_second_half, write_zeroes, zero_and_keep,
};

/// Has the newer change begin when the older one reads the base: then that has its place
/// in the order.
struct StartsNewer {
    disk: Arc<Disk>,
    newer: fn(&Disk),
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Base for StartsNewer {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let (disk, newer) = (Arc::clone(&self.disk), self.newer);
        let started = thread::spawn(move || newer(&disk));
        let before = self.thread.lock().expect("no panic").replace(started);
        assert!(before.is_none(), "the base is read once");
        ModelBase.read(buf, offset)
    }

    fn cache(&self, range: ByteRange) -> Result<()> {
        ModelBase.cache(range)
    }

    fn extents(&self, bytes: ByteRange, only_first: bool, list: &mut Vec<Extent>) -> Result<()> {
        ModelBase.extents(bytes, only_first, list)
    }
}

/// What the block holds after a write of its first half, and `newer`.
fn check(newer: fn(&Disk), expected: (u8, u8)) {
    for prepared in [Prepared::Nothing, Prepared::Neighbour] {
        loom::model(move || {
            let disk = prepared_disk(prepared);
            let base = StartsNewer {
                disk: Arc::clone(&disk),
                newer,
                thread: Mutex::default(),
            };
            disk.write(&base, &[1; HALF as usize], 0)
                .expect("a good write");
            let newer = base.thread.into_inner().expect("no panic");
            newer.expect("it has begun").join().expect("no panic");
            assert_eq!(halves(&disk), expected, "prepared: {prepared:?}");
        });
    }
}

#[test]
fn a_newer_whole_write_wins() {
    check(write_block, (3, 3));
    check(write_zeroes, (0, 0));
}

#[test]
fn a_newer_partial_write_wins() {
    check(|disk| write(disk, 5, 0, HALF), (5, OF_BASE));
    check(write_second_half, (1, 2));
    check(
        |disk| {
            write_block(disk);
            // In place, and the older one may be stored before or after it.
            write(disk, 5, 0, HALF);
        },
        (5, 3),
    );
}

#[test]
fn newer_zeroes_win() {
    check(trim, (0, 0));
    check(zero_and_keep, (0, 0));
    check(
        |disk| {
            trim(disk);
            write_first_half(disk);
        },
        (1, 0),
    );
    // Of several blocks, so that it is as wide as the stripes allow.
    check(|disk| write(disk, 4, 0, 2 * BLOCK), (4, 4));
}
