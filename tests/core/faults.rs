//! Every change to the store fails once, and so does the base: the client is told
//! the errno, nothing that was acknowledged is lost, and the next request works.

use nbdkit_cow_filter::block::ByteRange;
use nbdkit_cow_filter::error::Result;
use nbdkit_cow_filter::overlay::{Overlay, State, Zeroing};

use crate::disk::{
    BLOCK, Call, TestBase, TestStore, assert_only_data_is_stored, block_size, read_all, test_disk,
};

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

/// The request of the script that is only advice.
const CACHE: usize = 6;
/// The one that discards whole blocks that have data, and zeroes in others.
const DISCARDING: usize = 3;

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

/// The changes of which the client hears nothing if they fail: what is optional, and what
/// is done when it has its answer.
fn unheard_changes(errno: i32) -> Vec<bool> {
    let (base, disk) = test_disk(SIZE);
    let mut unheard = Vec::new();
    for (number, request) in SCRIPT.into_iter().enumerate() {
        disk.store().forget_calls();
        request(&base, &disk).expect("no fault yet");
        let calls = disk.store().calls();
        let changes = calls.iter().filter(|call| !matches!(call, Call::Read(..)));
        // It makes room for its own parts.
        let has_room = number == DISCARDING && errno == libc::ENOSPC;
        let is_optional = number == CACHE || has_room;
        unheard.extend(changes.map(|call| is_optional || matches!(call, Call::Punch(..))));
    }
    assert_eq!(unheard.len(), disk.store().changes());
    unheard
}

#[test]
fn every_change_to_the_store_may_fail_once() {
    for errno in [libc::ENOSPC, libc::EIO] {
        let unheard = unheard_changes(errno);
        assert!(
            unheard.len() >= SCRIPT.len(),
            "the script changes the store"
        );
        for (failing, is_unheard) in unheard.into_iter().enumerate() {
            let (base, disk) = test_disk(SIZE);
            *disk.store().fail.lock().expect("no test thread died") = Some((failing, errno));
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

                if let Err(error) = request(&base, &disk) {
                    failures += 1;
                    assert_eq!(error.errno(), errno, "change {failing}, request {number}");
                    check_old_or_new(&old, &new, &read_all(&base, &disk), &states);
                    assert_only_data_is_stored(&disk);
                    request(&base, &disk).expect("the fault has gone");
                }
                assert!(
                    read_all(&base, &disk) == new,
                    "change {failing}, request {number}"
                );
            }
            let expected = usize::from(!is_unheard);
            assert_eq!(failures, expected, "change {failing} failed");
            assert!(disk.store().changes() > failing, "the fault has happened");
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

/// The store has lost what was there.
#[test]
fn zeroes_that_fail_leave_zeroes_where_data_was() {
    let (base, disk) = test_disk(SIZE);
    disk.write(&base, &[1; 2 * BLOCK as usize], BLOCK)
        .expect("a good write");
    let mut expected = read_all(&base, &disk);
    disk.store().fail_next(libc::ENOSPC);
    let error = disk.zero(&base, 0, 4 * BLOCK, KEEP).expect_err("full");
    assert_eq!(error.errno(), libc::ENOSPC);
    expected[BLOCK as usize..3 * BLOCK as usize].fill(0);
    assert!(read_all(&base, &disk) == expected);
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
    base.spoil(0, BLOCK);
    let mut buf = [0; 100];
    let failures = [
        disk.read(&base, &mut buf, 0, false),
        disk.read(&base, &mut buf, 0, true),
        disk.write(&base, &[1], 5),
        disk.zero(&base, 5, 10, DISCARD),
        disk.zero(&base, 5, 10, KEEP),
    ];
    for failure in failures {
        let error = failure.expect_err("the base can't be read");
        assert_eq!(error.errno(), libc::EIO);
        assert!(error.is_reported(), "the plugin has said why");
    }
    assert_eq!(disk.state_at(0).expect("in range"), State::Base);
    assert!(disk.store().stored().is_empty());

    // A whole block needs nothing of the base.
    disk.write(&base, &vec![1; BLOCK as usize], 0)
        .expect("a good write");
    disk.read(&base, &mut buf, 0, false).expect("a good read");
    assert_eq!(buf, [1; 100]);

    base.spoil(BLOCK, 2 * BLOCK);
    disk.write(&base, &[1], BLOCK).expect_err("a bad sector");
    base.repair();
    disk.write(&base, &[1], BLOCK)
        .expect("the base works again");
}

/// Where the bad sector of a block is, and bytes of the same block beside it.
const BAD: (u64, u64) = (BLOCK + 5000, BLOCK + 5512);
const GOOD: (u64, u64) = (BLOCK + 100, BLOCK + 300);

#[test]
fn a_copying_read_needs_only_the_bytes_that_were_asked_for() {
    let (base, disk) = test_disk(SIZE);
    base.spoil(BAD.0, BAD.1);
    let mut buf = [0; 200];
    disk.read(&base, &mut buf, GOOD.0, true)
        .expect("a good read");
    assert!(buf[..] == whole_base()[GOOD.0 as usize..GOOD.1 as usize]);
    assert_eq!(base.read_calls(), [(BLOCK, 2 * BLOCK), GOOD]);
    assert_eq!(disk.state_at(BLOCK).expect("in range"), State::Base);
    // The blocks beside it are saved all the same, by requests of their own.
    let mut buf = vec![0; BLOCK as usize + 1];
    disk.read(&base, &mut buf, 0, true).expect("a good read");
    disk.read(&base, &mut buf[..100], 2 * BLOCK, true)
        .expect("a good read");
    assert_eq!(disk.state_at(2 * BLOCK).expect("in range"), State::Data);
    disk.read(&base, &mut buf[..1], BAD.0 + 7, true)
        .expect_err("just what can't be read");
}

#[test]
fn a_cache_request_that_can_not_copy_is_passed_on() {
    let passed_on = |base: &TestBase| base.caches.lock().expect("no test thread died").clone();
    let (start, end) = GOOD;
    let expected = [ByteRange { start, end }];

    let (base, disk) = test_disk(SIZE);
    base.spoil(BAD.0, BAD.1);
    disk.cache(&base, start, end - start, true)
        .expect("a good cache");
    assert_eq!(passed_on(&base), expected, "a bad sector");

    let (base, disk) = test_disk(SIZE);
    disk.store().fail_next(libc::ENOSPC);
    disk.cache(&base, start, end - start, true)
        .expect("a good cache");
    assert_eq!(passed_on(&base), expected, "no space");
    assert_only_data_is_stored(&disk);
}

#[test]
fn a_bad_sector_may_be_overwritten_by_a_part_of_its_block() {
    let (start, end) = BAD;
    let changes: [(&str, u64, u64); 5] = [
        ("just the sector", start, end),
        ("from the start of the block", BLOCK, end),
        ("to the end of the block", start, 2 * BLOCK),
        ("from the block before", BLOCK - 7, end),
        ("to the block behind", start, 2 * BLOCK + 7),
    ];
    for (name, start, end) in changes {
        for how in [None, Some(KEEP), Some(DISCARD)] {
            let (base, disk) = test_disk(SIZE);
            base.spoil(BAD.0, BAD.1);
            let len = end - start;
            let byte = match how {
                None => disk
                    .write(&base, &vec![0x5a; len as usize], start)
                    .map(|()| 0x5a),
                Some(how) => disk.zero(&base, start, len, how).map(|()| 0),
            }
            .unwrap_or_else(|e| panic!("{name}, {how:?}: {e}"));
            let mut expected = whole_base();
            expected[start as usize..end as usize].fill(byte);
            assert!(read_all(&base, &disk) == expected, "{name}, {how:?}");
        }
    }
    // What is beside it is another matter.
    let (base, disk) = test_disk(SIZE);
    base.spoil(BAD.0, BAD.1);
    for (start, end) in [(start, end - 1), (start + 1, end), (BLOCK - 7, end - 1)] {
        disk.write(&base, &vec![1; (end - start) as usize], start)
            .expect_err("a byte that can't be read");
    }
    assert_eq!(disk.state_at(BLOCK).expect("in range"), State::Base);
}

fn whole_base() -> Vec<u8> {
    let (start, end) = (0, SIZE);
    TestBase::new(SIZE).bytes(ByteRange { start, end })
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
fn a_trim_of_what_needs_space_may_do_nothing() {
    let (base, disk) = test_disk(SIZE);
    disk.write(&base, &[1; BLOCK as usize], 0)
        .expect("a good write");
    for (how, answer) in [(Zeroing::Trim, Ok(())), (DISCARD, Err(libc::ENOSPC))] {
        disk.store().fail_next(libc::ENOSPC);
        let result = disk.zero(&base, 100, 1000, how);
        assert_eq!(result.map_err(|e| e.errno()), answer, "{how:?}");
        disk.store().fail_next(libc::EIO);
        let result = disk.zero(&base, 100, 1000, how);
        assert_eq!(result.map_err(|e| e.errno()), Err(libc::EIO), "{how:?}");
    }
}

/// Zeroes in the parts of blocks at its ends may need space.
#[test]
fn a_discard_gives_the_space_of_whole_blocks_to_its_own_parts() {
    for how in [Zeroing::Trim, DISCARD] {
        let (base, disk) = test_disk(SIZE);
        disk.write(&base, &[1; 3 * BLOCK as usize], 0)
            .expect("a good write");
        disk.store().fail_next(libc::ENOSPC);
        disk.zero(&base, 100, 2 * BLOCK, how)
            .expect("there is room");
        let mut expected = whole_base();
        expected[..3 * BLOCK as usize].fill(1);
        expected[100..100 + 2 * BLOCK as usize].fill(0);
        assert!(read_all(&base, &disk) == expected, "{how:?}");
        assert_eq!(disk.state_at(BLOCK).expect("in range"), State::Zero);
        assert_only_data_is_stored(&disk);
    }
    // A read-modify-write, where there is really no space.
    let base = TestBase::new(SIZE);
    let store = TestStore::with_capacity(2 * BLOCK);
    let disk = Overlay::new(SIZE, block_size(BLOCK), store);
    disk.write(&base, &[1; 2 * BLOCK as usize], BLOCK)
        .expect("a good write");
    disk.zero(&base, 100, 3 * BLOCK, DISCARD)
        .expect("there is room");
    let mut expected = whole_base();
    expected[100..100 + 3 * BLOCK as usize].fill(0);
    assert!(read_all(&base, &disk) == expected);
    assert_only_data_is_stored(&disk);
}

#[test]
fn a_failed_request_gives_back_what_it_left() {
    let failing: [(u64, Request); 6] = [
        (1, |base, disk| {
            disk.write(base, &[1; BLOCK as usize], BLOCK)
        }),
        (1, |base, disk| disk.write(base, &[1; 10], BLOCK + 7)),
        (2, |base, disk| disk.write(base, &[1; 10], 2 * BLOCK - 5)),
        (1, |base, disk| disk.zero(base, BLOCK + 7, 10, KEEP)),
        (1, |base, disk| disk.cache(base, BLOCK, BLOCK, true)),
        (1, |base, disk| disk.read(base, &mut [0; 10], BLOCK, true)),
    ];
    for (number, (blocks, request)) in failing.into_iter().enumerate() {
        for errno in [libc::ENOSPC, libc::EIO] {
            let (base, disk) = test_disk(SIZE);
            disk.store().fail_next(errno);
            let is_optional = number >= 4;
            assert_eq!(request(&base, &disk).is_ok(), is_optional, "{number}");
            assert_eq!(disk.store().calls()[0], Call::Write(BLOCK, 2 * BLOCK));
            assert!(disk.store().stored().is_empty(), "{number}");
            let last = disk.store().calls_with_whole_holes().pop();
            let expected = Call::Punch(BLOCK, (1 + blocks) * BLOCK);
            assert_eq!(last, Some(expected), "{number}");
        }
    }
}

/// It shares a block, or a request, with blocks that have data.
#[test]
fn a_failed_request_leaves_what_is_data() {
    let (base, disk) = test_disk(SIZE);
    disk.write(&base, &[1; BLOCK as usize], BLOCK)
        .expect("a good write");
    disk.store().fail_next(libc::EIO);
    disk.write(&base, &[2; 3 * BLOCK as usize], 0)
        .expect_err("a fault");
    let bytes = read_all(&base, &disk);
    assert!(bytes[..BLOCK as usize] == whole_base()[..BLOCK as usize]);
    let was = &bytes[BLOCK as usize..2 * BLOCK as usize];
    assert!(was.iter().all(|byte| [1, 2].contains(byte)));
    assert_only_data_is_stored(&disk);
}

#[test]
fn that_space_can_not_be_given_back_fails_no_request() {
    let (base, disk) = test_disk(SIZE);
    for _ in 0..2 {
        disk.write(&base, &[1; BLOCK as usize], BLOCK)
            .expect("a good write");
        disk.store().fail_next(libc::EIO);
        disk.zero(&base, BLOCK, BLOCK, Zeroing::Trim)
            .expect("a good trim");
        assert_eq!(disk.state_at(BLOCK).expect("in range"), State::Zero);
        assert!(!disk.store().stored().is_empty());
    }
    // And what was not given back is no room.
    disk.store().fail_next(libc::ENOSPC);
    let error = disk.write(&base, &[1], 0).expect_err("no space");
    assert_eq!(error.errno(), libc::ENOSPC);
}

#[test]
fn a_write_that_finds_no_space_has_what_a_trim_has_left_but_no_more() {
    let base = TestBase::new(SIZE);
    let store = TestStore::with_capacity(2 * BLOCK);
    let disk = Overlay::new(SIZE, block_size(BLOCK), store);
    let whole = [1; BLOCK as usize];
    let write = |number| {
        let written = disk.write(&base, &whole, number * BLOCK);
        assert_only_data_is_stored(&disk);
        written.map_err(|e| e.errno())
    };
    assert_eq!(write(0), Ok(()));
    assert_eq!(write(1), Ok(()));
    assert_eq!(write(2), Err(libc::ENOSPC));
    disk.zero(&base, 0, BLOCK, Zeroing::Trim)
        .expect("a good trim");
    assert_eq!(write(2), Ok(()));
    assert_eq!(write(3), Err(libc::ENOSPC));
    assert_eq!(write(1), Ok(()), "it has space");
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
    assert_eq!(
        disk.store().calls_with_whole_holes(),
        [Call::Punch(BLOCK, 4 * BLOCK)]
    );
}

#[test]
fn a_large_part_of_a_block_is_not_zeroed_fast() {
    let size = (16 << 20) + 1000;
    let base = TestBase::new(size);
    let disk = Overlay::new(size, block_size(8 << 20), TestStore::default());
    let error = disk.zero(&base, 1, 2 << 20, DISCARD).expect_err("not fast");
    assert_eq!(error.errno(), libc::ENOTSUP);
    assert_eq!(base.read_calls(), []);
    // A small part of a block that is not stored takes the rest of the block with it.
    disk.zero(&base, 0, 8 << 20, DISCARD).expect("a good zero");
    let keep = Zeroing::Zero {
        may_trim: false,
        fast: true,
    };
    let error = disk.zero(&base, 1, 1000, keep).expect_err("not fast");
    assert_eq!(error.errno(), libc::ENOTSUP);
    let error = disk
        .zero(&base, (8 << 20) + 1, 1000, DISCARD)
        .expect_err("not fast");
    assert_eq!(error.errno(), libc::ENOTSUP);
    assert_eq!(base.read_calls(), []);
    for (offset, len) in [(0, 8 << 20), (16 << 20, 1000), (1, 1000)] {
        disk.zero(&base, offset, len, DISCARD)
            .expect("whole blocks, and parts of what is zeroes");
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
