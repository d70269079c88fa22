//! Giving space back by a thread, beside requests: nobody waits for more than a piece, no
//! written byte is punched out, and no request is told of a full store that is not.

use std::sync::Arc;
use std::thread;

use nbdkit_cow_filter::block::ByteRange;
use nbdkit_cow_filter::overlay::{Overlay, Reclaim, State, Zeroing};

use crate::disk::{
    BLOCK, Call, TestBase, TestStore, assert_only_data_is_stored, block_size, read_all, tempt,
    test_disk, wait_for_thread, with_thread,
};

type Disk = Overlay<TestStore>;
type Request = fn(&TestBase, &Disk);

const AREA: u64 = 1 << 20;
const SIZE: u64 = 3 * AREA + 1000;

const KEEP: Zeroing = Zeroing::Zero {
    may_trim: false,
    fast: false,
};

fn joined(reclaim: &Arc<Reclaim>, size: u64) -> (TestBase, Arc<Disk>) {
    let (base, disk) = test_disk(size);
    (base, disk.join(reclaim))
}

fn trim(base: &TestBase, disk: &Disk, offset: u64, len: u64) {
    disk.zero(base, offset, len, Zeroing::Trim)
        .expect("a good trim");
}

fn write(base: &TestBase, disk: &Disk, byte: u8, offset: u64, len: u64) {
    disk.write(base, &vec![byte; len as usize], offset)
        .expect("a good write");
}

fn punches(disk: &Disk) -> Vec<Call> {
    let calls = disk.store().calls().into_iter();
    calls
        .filter(|call| matches!(call, Call::Punch(..)))
        .collect()
}

/// An overlay on which a thread is at work, at a gate that is closed: what others leave
/// meanwhile is pending. To be made before them, or they come first.
struct Busy(Arc<Disk>);

impl Busy {
    fn new(reclaim: &Arc<Reclaim>) -> Self {
        Busy::with(joined(reclaim, BLOCK))
    }

    fn with((base, disk): (TestBase, Arc<Disk>)) -> Self {
        write(&base, &disk, 1, 0, BLOCK);
        disk.store().punch_gate.close();
        trim(&base, &disk, 0, BLOCK);
        disk.store().punch_gate.wait_for(1);
        Busy(disk)
    }

    fn end(&self) {
        self.0.store().punch_gate.open();
    }
}

#[test]
fn a_trim_is_answered_before_its_space_is_given_back() {
    let reclaim = Arc::new(Reclaim::default());
    let (base, disk) = joined(&reclaim, SIZE);
    with_thread(&reclaim, || {
        write(&base, &disk, 1, 0, SIZE);
        disk.store().punch_gate.close();
        trim(&base, &disk, 0, SIZE);
        disk.store().punch_gate.wait_for(1);
        assert!(read_all(&base, &disk).iter().all(|byte| *byte == 0));
        assert!(!disk.store().stored().is_empty());
        // So are others, meanwhile.
        trim(&base, &disk, 2 * AREA, BLOCK);
        disk.store().punch_gate.open();
        disk.give_back();
        assert!(disk.store().stored().is_empty());
        for call in punches(&disk) {
            let Call::Punch(start, end) = call else {
                unreachable!("filtered")
            };
            assert_eq!(
                start / AREA,
                (end - 1) / AREA,
                "{call:?} is within one area"
            );
        }
    });
}

#[test]
fn what_is_written_between_a_trim_and_its_hole_stays() {
    for (offset, len) in [(0, BLOCK), (BLOCK + 7, 100), (3 * BLOCK - 9, 18)] {
        let reclaim = Arc::new(Reclaim::default());
        let (base, disk) = joined(&reclaim, SIZE);
        with_thread(&reclaim, || {
            let busy = Busy::new(&reclaim);
            write(&base, &disk, 1, 0, 4 * BLOCK);
            trim(&base, &disk, 0, 4 * BLOCK);
            write(&base, &disk, 2, offset, len);
            assert_eq!(punches(&disk), [], "nothing was punched before the write");
            busy.end();
            disk.give_back();
        });
        let mut expected = base.bytes(ByteRange {
            start: 0,
            end: SIZE,
        });
        expected[..4 * BLOCK as usize].fill(0);
        expected[offset as usize..(offset + len) as usize].fill(2);
        assert!(
            read_all(&base, &disk) == expected,
            "{len} bytes at {offset}"
        );
        assert_ne!(punches(&disk), []);
        assert_only_data_is_stored(&disk);
    }
}

#[test]
fn a_change_waits_for_the_piece_of_its_area_and_no_other() {
    let changes: [(&str, u8, Request); 4] = [
        ("a whole write", 2, |base, disk| {
            write(base, disk, 2, 0, BLOCK)
        }),
        ("a partial write", 2, |base, disk| {
            write(base, disk, 2, 5, 10)
        }),
        ("zeroes that keep their space", 0, |base, disk| {
            disk.zero(base, 0, BLOCK, KEEP).expect("a good zero");
        }),
        ("a trim", 0, |base, disk| trim(base, disk, 0, BLOCK)),
    ];
    for (name, byte, change) in changes {
        let reclaim = Arc::new(Reclaim::default());
        let (base, disk) = joined(&reclaim, SIZE);
        with_thread(&reclaim, || {
            write(&base, &disk, 1, 0, SIZE);
            disk.store().punch_gate.close();
            trim(&base, &disk, 0, SIZE);
            disk.store().punch_gate.wait_for(1);
            // Elsewhere all goes on.
            write(&base, &disk, 3, AREA, BLOCK);
            write(&base, &disk, 3, 2 * AREA + 5, 10);
            disk.zero(&base, AREA + BLOCK, BLOCK, KEEP)
                .expect("a good zero");
            disk.store().punch_gate.assert_waiting(1);
            thread::scope(|scope| {
                let change = tempt(scope, || change(&base, &disk));
                assert!(!change.is_finished(), "{name} would be punched out");
                disk.store().punch_gate.open();
                change.join().expect("no panic");
            });
            disk.give_back();
        });
        let mut bytes = [9; 10];
        for (at, byte) in [(5, byte), (AREA, 3), (2 * AREA + 5, 3), (AREA + BLOCK, 0)] {
            disk.read(&base, &mut bytes, at, false)
                .expect("a good read");
            assert_eq!(bytes, [byte; 10], "{name}, at {at}");
        }
        assert_only_data_is_stored(&disk);
    }
}

#[test]
fn a_stop_ends_the_thread_after_the_piece_in_hand() {
    let reclaim = Arc::new(Reclaim::default());
    let (base, disk) = joined(&reclaim, SIZE);
    thread::scope(|scope| {
        let thread = scope.spawn(|| reclaim.run());
        wait_for_thread(&reclaim);
        write(&base, &disk, 1, 0, SIZE);
        disk.store().punch_gate.close();
        trim(&base, &disk, 0, SIZE);
        disk.store().punch_gate.wait_for(1);
        reclaim.stop();
        disk.store().punch_gate.open();
        thread.join().expect("no panic");
    });
    assert_eq!(punches(&disk).len(), 1);
    // What is left is pending.
    disk.give_back();
    assert!(disk.store().stored().is_empty());
    // Without a thread there are requests.
    write(&base, &disk, 1, 0, BLOCK);
    trim(&base, &disk, 0, BLOCK);
    assert!(disk.store().stored().is_empty());
}

#[test]
fn who_finds_no_space_waits_for_the_last_piece() {
    let base = TestBase::new(SIZE);
    let store = TestStore::with_capacity(2 * BLOCK);
    let reclaim = Arc::new(Reclaim::default());
    let disk = Overlay::new(SIZE, block_size(BLOCK), store).join(&reclaim);
    let writes: [Request; 3] = [
        |base, disk| write(base, disk, 2, 2 * AREA, BLOCK),
        |base, disk| write(base, disk, 2, 2 * AREA, 100),
        |base, disk| {
            disk.zero(base, 2 * AREA, BLOCK, KEEP).expect("a good zero");
        },
    ];
    with_thread(&reclaim, || {
        for again in writes {
            write(&base, &disk, 1, 0, 2 * BLOCK);
            disk.store().punch_gate.close();
            trim(&base, &disk, 0, BLOCK);
            disk.store().punch_gate.wait_for(1);
            thread::scope(|scope| {
                let request = tempt(scope, || again(&base, &disk));
                assert!(!request.is_finished(), "the store is full");
                disk.store().punch_gate.open();
                request.join().expect("no panic");
            });
            assert_eq!(disk.state_at(2 * AREA).expect("in range"), State::Data);
            trim(&base, &disk, 0, SIZE);
            disk.give_back();
            assert_only_data_is_stored(&disk);
        }
    });
}

#[test]
fn who_finds_no_space_has_what_is_pending_elsewhere() {
    let reclaim = Arc::new(Reclaim::default());
    let (other_base, other) = joined(&reclaim, SIZE);
    let (base, disk) = joined(&reclaim, SIZE);
    with_thread(&reclaim, || {
        let busy = Busy::new(&reclaim);
        write(&other_base, &other, 1, 0, SIZE);
        other.store().punch_gate.close();
        trim(&other_base, &other, 0, SIZE);
        disk.store().fail_next(libc::ENOSPC);
        thread::scope(|scope| {
            let request = scope.spawn(|| write(&base, &disk, 2, 0, BLOCK));
            // The thread has something else in hand, so this is the request.
            other.store().punch_gate.wait_for(1);
            busy.0.store().punch_gate.assert_waiting(1);
            other.store().punch_gate.open();
            busy.end();
            request.join().expect("the client hears nothing");
        });
        assert!(other.store().stored().is_empty());
        assert_only_data_is_stored(&disk);
        assert!(read_all(&base, &disk)[..BLOCK as usize] == [2; BLOCK as usize]);
    });
}

/// An error may be told once only: it must not be lost in another attempt for which no
/// room was made.
#[test]
fn who_finds_no_space_hears_of_it_if_nothing_was_given_back() {
    let reclaim = Arc::new(Reclaim::default());
    let (base, disk) = joined(&reclaim, SIZE);
    with_thread(&reclaim, || {
        let busy = Busy::new(&reclaim);
        // Of what is pending here all is data again, and there the hole can't be made.
        write(&base, &disk, 1, 0, BLOCK);
        trim(&base, &disk, 0, BLOCK);
        write(&base, &disk, 2, 0, BLOCK);
        busy.0.store().fail_next(libc::EIO);
        disk.store().fail_next(libc::ENOSPC);
        thread::scope(|scope| {
            let request = tempt(scope, || disk.write(&base, &[3], AREA));
            assert!(!request.is_finished(), "there may be room yet");
            busy.end();
            let error = request.join().expect("no panic").expect_err("no space");
            assert_eq!(error.errno(), libc::ENOSPC);
        });
        assert_eq!(disk.state_at(AREA).expect("in range"), State::Base);
        disk.give_back();
    });
    assert_only_data_is_stored(&disk);
}

/// While the thread is at work on one overlay it keeps no other, whose file would stay.
#[test]
fn an_overlay_that_nobody_uses_any_more_is_gone() {
    let reclaim = Arc::new(Reclaim::default());
    let [before, at_work, after] = [SIZE, BLOCK, SIZE].map(|size| joined(&reclaim, size));
    with_thread(&reclaim, || {
        let busy = Busy::with(at_work);
        for (base, disk) in [before, after] {
            write(&base, &disk, 1, 0, SIZE);
            trim(&base, &disk, 0, SIZE);
            let gone = Arc::downgrade(&disk);
            drop(disk);
            assert_eq!(gone.strong_count(), 0);
        }
        busy.end();
    });
}

/// XFS needs space to make a hole. A full one has none, and what could not be punched is
/// *zero* already: no later trim would come upon it again.
#[test]
fn a_hole_for_which_there_was_no_space_is_made_later() {
    let others: [(&str, Request); 3] = [
        ("another trim", |base, disk| trim(base, disk, AREA, BLOCK)),
        ("the same trim", |base, disk| trim(base, disk, 0, BLOCK)),
        ("a request that finds no space", |base, disk| {
            disk.store().fail_next(libc::ENOSPC);
            write(base, disk, 3, 2 * AREA, BLOCK);
        }),
    ];
    for (name, other) in others {
        let (base, disk) = test_disk(SIZE);
        write(&base, &disk, 1, 0, BLOCK);
        write(&base, &disk, 1, AREA, BLOCK);
        disk.store().fail_next(libc::ENOSPC);
        trim(&base, &disk, 0, BLOCK);
        assert!(disk.store().stored().contains(&0), "{name}: it has failed");
        other(&base, &disk);
        assert_only_data_is_stored(&disk);
    }
}

#[test]
fn blocks_that_share_a_block_of_the_file_system_give_it_back_as_a_whole() {
    let base = TestBase::new(SIZE);
    let disk = Overlay::new(SIZE, block_size(512), TestStore::default());
    write(&base, &disk, 1, 8192, 4096);
    disk.store().forget_calls();
    for block in 0..8 {
        trim(&base, &disk, 8192 + block * 512, 512);
    }
    let last = disk.store().calls().pop();
    assert_eq!(last, Some(Call::Punch(8192, 12288)));
}
