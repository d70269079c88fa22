//! Every change to the store fails once, and so does the base: the client is told
//! the errno, nothing that was acknowledged is lost, and the next request works.

use std::sync::atomic::Ordering;

use nbdkit_cow_filter::error::Result;
use nbdkit_cow_filter::overlay::{Overlay, State, Zeroing};

use crate::disk::{BLOCK, Call, TestBase, TestStore, block_size, read_all, test_disk};

const SIZE: u64 = 6 * BLOCK + 1000;

type Request = fn(&TestBase, &Overlay<TestStore>) -> Result<()>;

const KEEP: Zeroing = Zeroing::Zero {
    may_trim: false,
    fast: false,
};

/// As a trim, but what fails is told.
const DISCARD: Zeroing = Zeroing::Zero {
    may_trim: true,
    fast: true,
};

/// Requests that between them make every kind of change to the store.
const SCRIPT: [Request; 11] = [
    |base, disk| disk.write(base, &[1; 100], 10),
    |base, disk| disk.write(base, &vec![2; 2 * BLOCK as usize + 7], BLOCK - 3),
    |base, disk| disk.write(base, &[3; 100], 50),
    |base, disk| disk.zero(base, 20, 3 * BLOCK, DISCARD),
    |base, disk| disk.zero(base, 4 * BLOCK - 9, BLOCK + 20, KEEP),
    |base, disk| disk.write(base, &[4; 1000], 6 * BLOCK),
    |base, disk| disk.cache(base, 5 * BLOCK, BLOCK, true),
    |base, disk| disk.zero(base, 2 * BLOCK + 5, 10, KEEP),
    |base, disk| disk.write(base, &vec![5; BLOCK as usize], 2 * BLOCK),
    |base, disk| disk.zero(base, 2 * BLOCK + 5, 10, DISCARD),
    |base, disk| disk.zero(base, 0, SIZE, DISCARD),
];

#[test]
fn every_change_to_the_store_may_fail_once() {
    let (base, disk) = test_disk(SIZE);
    for request in SCRIPT {
        request(&base, &disk).expect("no fault yet");
    }
    let changes = disk.store().changes();
    assert!(changes >= SCRIPT.len(), "the script changes the store");

    for failing in 0..changes {
        for errno in [libc::ENOSPC, libc::EIO] {
            let (base, disk) = test_disk(SIZE);
            // The same requests without a fault, one step behind and ahead.
            let (_, twin) = test_disk(SIZE);
            let mut failures = 0;
            for (number, request) in SCRIPT.iter().enumerate() {
                let old = read_all(&base, &twin);
                request(&base, &twin).expect("no fault here");
                let new = read_all(&base, &twin);
                let states: Vec<_> = (0..SIZE.div_ceil(BLOCK))
                    .map(|block| disk.state_at(block * BLOCK).expect("in range"))
                    .collect();

                *disk.store().fail.lock().expect("no test thread died") = Some((failing, errno));
                let result = request(&base, &disk);
                *disk.store().fail.lock().expect("no test thread died") = None;
                if let Err(error) = &result {
                    failures += 1;
                    assert_eq!(error.errno(), errno, "change {failing}, request {number}");
                    check_old_or_new(&old, &new, &read_all(&base, &disk), &states);
                    request(&base, &disk).expect("the fault has gone");
                }
                assert!(
                    read_all(&base, &disk) == new,
                    "change {failing}, request {number}"
                );
            }
            assert_eq!(failures, 1, "change {failing} failed");
        }
    }
}

/// A block that the store did not have before is old or new as a whole; in one
/// that it had, each byte is old or new, as on any disk.
fn check_old_or_new(old: &[u8], new: &[u8], found: &[u8], states: &[State]) {
    let block = BLOCK as usize;
    for (number, state) in states.iter().enumerate() {
        let range = number * block..old.len().min((number + 1) * block);
        let (old, new, found) = (&old[range.clone()], &new[range.clone()], &found[range]);
        if *state == State::Data {
            let known = |at: usize| found[at] == old[at] || found[at] == new[at];
            assert!((0..found.len()).all(known), "block {number}");
        } else {
            assert!(found == old || found == new, "block {number} is torn");
        }
    }
}

#[test]
fn a_read_does_not_fail_because_it_could_not_be_saved() {
    let (base, disk) = test_disk(SIZE);
    *disk.store().fail.lock().expect("no test thread died") = Some((0, libc::ENOSPC));
    for _ in 0..2 {
        let mut buf = [0; 100];
        disk.read(&base, &mut buf, 50, true).expect("a good read");
        assert_eq!(buf[0], base.byte(50));
    }
    assert_eq!(
        disk.state_at(50).expect("in range"),
        State::Data,
        "the second time"
    );
}

#[test]
fn a_bad_sector_of_the_base_fails_only_what_needs_it() {
    let (base, disk) = test_disk(SIZE);
    base.failing.store(true, Ordering::SeqCst);
    let mut buf = [0; 100];
    let failures = [
        disk.read(&base, &mut buf, 0, false),
        disk.read(&base, &mut buf, 0, true),
        disk.write(&base, &[1], 5),
        disk.zero(&base, 5, 10, Zeroing::Trim),
        disk.cache(&base, 0, 10, true),
    ];
    for failure in failures {
        let error = failure.expect_err("the base can't be read");
        assert_eq!(error.errno(), libc::EIO);
        assert!(error.is_reported(), "the plugin has said why");
    }
    assert_eq!(disk.state_at(0).expect("in range"), State::Base);
    assert_eq!(disk.store().changes(), 0);

    // A whole block needs nothing of the base.
    disk.write(&base, &vec![1; BLOCK as usize], 0)
        .expect("a good write");
    disk.read(&base, &mut buf, 0, false).expect("a good read");
    assert_eq!(buf, [1; 100]);

    base.failing.store(false, Ordering::SeqCst);
    disk.write(&base, &[1], BLOCK)
        .expect("the base works again");
}

#[test]
fn requests_past_the_end_are_refused() {
    let (base, disk) = test_disk(SIZE);
    for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX - 5, 100)] {
        let mut buf = vec![0; len];
        let failures = [
            disk.read(&base, &mut buf, offset, false),
            disk.write(&base, &buf, offset),
            disk.zero(&base, offset, len as u64, Zeroing::Trim),
            disk.cache(&base, offset, len as u64, false),
            disk.extents(&base, offset, len as u64, false).map(|_| ()),
        ];
        for failure in failures {
            assert_eq!(failure.expect_err("past the end").errno(), libc::EINVAL);
        }
    }
}

#[test]
fn a_trim_on_a_full_file_system_gives_back_what_it_can() {
    let (base, disk) = test_disk(SIZE);
    disk.write(&base, &vec![1; 3 * BLOCK as usize], 0)
        .expect("a good write");
    let fail_from = disk.store().changes() + 1;
    for (how, answer) in [(Zeroing::Trim, Ok(())), (DISCARD, Err(libc::ENOSPC))] {
        // The hole for the whole block is made, then the first part fails.
        *disk.store().fail.lock().expect("no test thread died") = Some((fail_from, libc::ENOSPC));
        let result = disk.zero(&base, 100, 2 * BLOCK, how);
        assert_eq!(result.map_err(|e| e.errno()), answer, "{how:?}");
        assert_eq!(disk.state_at(BLOCK).expect("in range"), State::Zero);
        disk.store().forget_changes(fail_from - 1);
        disk.write(&base, &vec![1; BLOCK as usize], BLOCK)
            .expect("a good write");
        disk.store().forget_changes(fail_from - 1);
    }
}

#[test]
fn a_discard_gives_back_what_a_failed_write_left_behind() {
    let failing: [Request; 4] = [
        |base, disk| disk.write(base, &[1; BLOCK as usize], BLOCK),
        |base, disk| disk.write(base, &[1; 10], BLOCK + 7),
        |base, disk| disk.zero(base, BLOCK, BLOCK, KEEP),
        |base, disk| disk.cache(base, BLOCK, BLOCK, true),
    ];
    for request in failing {
        let (base, disk) = test_disk(SIZE);
        *disk.store().fail.lock().expect("no test thread died") = Some((0, libc::ENOSPC));
        request(&base, &disk).expect_err("the store is full");
        disk.store().forget_calls();
        disk.zero(&base, 0, 3 * BLOCK, Zeroing::Trim)
            .expect("a good trim");
        assert_eq!(disk.store().calls(), [Call::Punch(0, 3 * BLOCK)]);
    }
}

#[test]
fn without_a_failure_only_what_is_stored_is_punched() {
    let (base, disk) = test_disk(SIZE);
    disk.write(&base, &[1; BLOCK as usize], BLOCK)
        .expect("a good write");
    disk.write(&base, &[1; BLOCK as usize], 3 * BLOCK)
        .expect("a good write");
    disk.store().forget_calls();
    disk.zero(&base, 0, SIZE, Zeroing::Trim)
        .expect("a good trim");
    disk.zero(&base, 0, SIZE, Zeroing::Trim)
        .expect("a good trim");
    assert_eq!(disk.store().calls(), [Call::Punch(BLOCK, 4 * BLOCK)]);
}

#[test]
fn a_large_part_of_a_block_is_not_zeroed_fast() {
    let size = (16 << 20) + 1000;
    let base = TestBase::new(size);
    let disk = Overlay::new(size, block_size(8 << 20), TestStore::default());
    let error = disk.zero(&base, 1, 2 << 20, DISCARD).expect_err("not fast");
    assert_eq!(error.errno(), libc::ENOTSUP);
    assert_eq!(base.read_calls(), []);
    for (offset, len) in [(0, 8 << 20), (16 << 20, 1000), (1, 1000)] {
        disk.zero(&base, offset, len, DISCARD)
            .expect("whole blocks and small parts");
    }
}

#[test]
fn without_hole_punching_a_trim_changes_only_the_map() {
    let base = TestBase::new(SIZE);
    let store = TestStore::with(false, true);
    let disk = Overlay::new(SIZE, block_size(BLOCK), store);
    disk.write(&base, &vec![1; BLOCK as usize], 0)
        .expect("a good write");
    disk.store().forget_calls();
    disk.zero(&base, 0, BLOCK, Zeroing::Trim)
        .expect("a good trim");
    assert_eq!(disk.store().calls(), []);
    assert_eq!(disk.state_at(0).expect("in range"), State::Zero);
    // What the file still holds must not come back with the next partial write.
    disk.write(&base, &[9], 7).expect("a good write");
    let bytes = read_all(&base, &disk);
    assert_eq!(bytes[..7], [0; 7]);
    assert_eq!(bytes[7..9], [9, 0]);
}

#[test]
fn a_fast_zero_that_would_have_to_be_written_is_refused_before_anything_changes() {
    let base = TestBase::new(SIZE);
    let store = TestStore::with(true, false);
    let disk = Overlay::new(SIZE, block_size(BLOCK), store);
    let how = Zeroing::Zero {
        may_trim: false,
        fast: true,
    };
    let error = disk.zero(&base, 10, BLOCK * 2, how).expect_err("not fast");
    assert_eq!(error.errno(), libc::ENOTSUP);
    assert_eq!(disk.store().changes(), 0);
    disk.zero(&base, 0, BLOCK * 2, DISCARD)
        .expect("a fast zero");
    disk.zero(&base, 0, BLOCK * 2, KEEP).expect("a slow zero");
    assert_eq!(disk.state_at(0).expect("in range"), State::Data);
}
