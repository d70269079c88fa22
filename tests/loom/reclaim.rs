//! The thread that gives space back beside requests: no byte that was written is punched
//! out, and nothing of what was trimmed is left.

use std::sync::Arc;

use loom::model::Builder;
use loom::sync::atomic::Ordering;
use loom::thread;

use nbdkit_cow_filter::overlay::Reclaim;

use super::{
    Disk, HALF, Prepared, halves, prepared, read_and_copy, trim, write, write_block,
    write_first_half, zero_and_keep,
};

/// The bytes of the first block in the store.
fn stored(disk: &Disk) -> (u8, u8) {
    let [first, second] = &disk.store().near;
    (
        first.load(Ordering::Relaxed),
        second.load(Ordering::Relaxed),
    )
}

/// A block of data is trimmed, then `requests` follow, beside the thread. There are too
/// many orders: only those in which threads are stopped that could go on no more than
/// twice. (One is enough for the mistake that `packaging/model-check.sh` puts in.)
fn check(requests: fn(&Disk), expected: (u8, u8)) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(move || {
        let reclaim = Arc::new(Reclaim::default());
        let disk = prepared(Prepared::Data).join(&reclaim);
        let thread = {
            let reclaim = Arc::clone(&reclaim);
            thread::spawn(move || reclaim.run())
        };
        trim(&disk);
        requests(&disk);
        reclaim.stop();
        thread.join().expect("no panic");
        disk.give_back();
        assert_eq!(halves(&disk), expected);
        // A trimmed block is a hole.
        assert_eq!(stored(&disk), expected);
    });
}

#[test]
fn a_write_after_a_trim_is_not_punched_out() {
    check(write_block, (3, 3));
    check(write_first_half, (1, 0));
    check(zero_and_keep, (0, 0));
    check(
        |disk| {
            write_block(disk);
            // In place.
            write(disk, 5, 0, HALF);
        },
        (5, 3),
    );
}

#[test]
fn a_block_that_is_trimmed_again_is_punched_out() {
    check(|_| {}, (0, 0));
    check(
        |disk| {
            write_block(disk);
            trim(disk);
        },
        (0, 0),
    );
    check(read_and_copy, (0, 0));
}
