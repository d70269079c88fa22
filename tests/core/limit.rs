//! The limit to what overlays take: it is kept to the byte, and nobody is refused while
//! there is room.

use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;

use nbdkit_cow_filter::error::{Error, Result};
use nbdkit_cow_filter::kept::{self, KeptStore};
use nbdkit_cow_filter::overlay::budget::Share;
use nbdkit_cow_filter::overlay::{
    Account, BlockMap, Budget, OVERLAY_LEN, Overlay, Reclaim, State, Store, Zeroing,
};
use nbdkit_cow_filter::qcow2::image::Image;

use crate::disk::{
    PATIENCE, TEMPTATION, TestBase, TestStore, block_size, read_all, tempt, with_thread,
};
use crate::kept::disk::{Kept, new_image};
use crate::kept::recorder::{Fault, Hold, Portion, Recorder};

type Disk = Overlay<TestStore>;

const BLOCK: u64 = 4096;
const LEAF: u64 = BlockMap::LEAF_LEN;
/// An overlay with one leaf.
const SMALL: u64 = OVERLAY_LEN + LEAF;
const AREA: u64 = 1 << 20;
/// One leaf of the block map, and no node.
const SIZE: u64 = 8 * AREA;
const THREADS: u64 = 16;

const KEEP: Zeroing = Zeroing::Zero {
    may_trim: false,
    fast: false,
};

fn disk_on(
    budget: &Arc<Budget>,
    reclaim: &Arc<Reclaim>,
    size: u64,
    store: TestStore,
) -> (TestBase, Arc<Disk>) {
    let disk = Overlay::new(size, block_size(BLOCK), store);
    let disk = disk.limited(Some(Account::new(budget))).join(reclaim);
    (TestBase::new(size), disk)
}

/// A disk that may have `blocks` blocks of data, with the leaf that they need.
fn disk_for(blocks: u64) -> (TestBase, Arc<Disk>, Arc<Budget>) {
    let budget = Arc::new(Budget::new(SMALL + blocks * BLOCK));
    let (base, disk) = disk_on(&budget, &Arc::default(), SIZE, TestStore::default());
    (base, disk, budget)
}

fn write<S: Store>(base: &TestBase, disk: &Overlay<S>, block: u64, count: u64) -> Result<()> {
    let bytes = vec![block as u8 | 1; (count * BLOCK) as usize];
    disk.write(base, &bytes, block * BLOCK)
}

fn trim<S: Store>(base: &TestBase, disk: &Overlay<S>, block: u64, count: u64) -> Result<()> {
    disk.zero(base, block * BLOCK, count * BLOCK, Zeroing::Trim)
}

fn state<S: Store>(disk: &Overlay<S>, block: u64) -> State {
    disk.state_at(block * BLOCK).expect("in range")
}

#[track_caller]
fn assert_refused(done: Result<()>) {
    let error = done.expect_err("there is no room");
    assert_eq!(error.errno(), libc::ENOSPC, "{error}");
    assert!(error.is_over_limit(), "{error}");
    assert!(error.to_string().contains("cow-limit="), "{error}");
}

/// Runs `request` on each thread with its number.
fn on_threads(request: impl Fn(u64) + Sync) {
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let request = &request;
            scope.spawn(move || request(thread));
        }
    });
}

#[test]
fn blocks_are_stored_up_to_the_limit_and_no_byte_beyond_it() {
    for (more, fit) in [(0, 3), (BLOCK - 1, 3), (BLOCK, 4)] {
        let budget = Arc::new(Budget::new(SMALL + 3 * BLOCK + more));
        // The last block is as long as the others to the limit.
        let size = 4 * BLOCK + 100;
        let (base, disk) = disk_on(&budget, &Arc::default(), size, TestStore::default());
        let mut stored = 0;
        for block in (0..5).rev() {
            let len = (size - block * BLOCK).min(BLOCK);
            let done = disk.write(&base, &vec![7; len as usize], block * BLOCK);
            if stored < fit {
                done.expect("there is room");
                stored += 1;
            } else {
                assert_refused(done);
                assert_eq!(state(&disk, block), State::Base);
            }
            assert_eq!(budget.used(), SMALL + stored * BLOCK);
        }
        // In place, and partly.
        disk.write(&base, b"more", 3 * BLOCK + 17)
            .expect("it takes nothing");
        assert_refused(disk.write(&base, b"more", 17));
        assert_eq!(budget.used(), SMALL + fit * BLOCK);
        assert_eq!(read_all(&base, &disk)[..17], base_bytes(&base, 0, 17));
    }
}

fn base_bytes(base: &TestBase, start: u64, len: u64) -> Vec<u8> {
    (start..start + len).map(|at| base.byte(at)).collect()
}

#[test]
fn a_request_that_does_not_fit_changes_nothing() {
    let (base, disk, budget) = disk_for(3);
    assert_refused(write(&base, &disk, 1, 4));
    assert_refused(disk.zero(&base, 0, 4 * BLOCK, KEEP));
    assert_eq!(disk.store().changes(), 0);
    assert!((0..5).all(|block| state(&disk, block) == State::Base));
    write(&base, &disk, 1, 3).expect("there is room");
    // Of these only the last is new.
    assert_refused(write(&base, &disk, 1, 4));
    disk.zero(&base, BLOCK, 3 * BLOCK, KEEP)
        .expect("it has its space");
    assert_eq!(budget.used(), budget.limit());
}

#[test]
fn zeroes_that_are_written_and_zeroes_that_need_no_space_take_none() {
    let (base, disk, budget) = disk_for(1);
    disk.write(&base, &vec![0; 9 * BLOCK as usize], 0)
        .expect("zeroes are not stored");
    trim(&base, &disk, 20, 9).expect("nor here");
    assert_eq!(budget.used(), SMALL);
    disk.zero(&base, 0, BLOCK, KEEP).expect("there is room");
    assert_refused(disk.zero(&base, BLOCK, BLOCK, KEEP));
}

#[test]
fn many_threads_fill_it_exactly() {
    for round in 0..20 {
        let (base, disk, budget) = disk_for(100);
        let stored = AtomicU64::new(0);
        on_threads(|thread| {
            for i in 0..16 {
                // One block, or two of which both fit or none.
                let count = 1 + (thread + i + round) % 2;
                match write(&base, &disk, thread * 64 + 2 * i, count) {
                    Ok(()) => stored.fetch_add(count, Ordering::Relaxed),
                    refused => {
                        assert_refused(refused);
                        0
                    }
                };
                assert!(budget.used() <= budget.limit(), "{}", budget.used());
            }
        });
        // Single ones were refused only when all was taken.
        assert_eq!(stored.load(Ordering::Relaxed), 100);
        assert_eq!(disk.store().stored().len() as u64, 100 * BLOCK / 512);
        assert_eq!(budget.used(), budget.limit());
    }
}

#[test]
fn who_writes_what_another_has_written_needs_no_room() {
    for _ in 0..50 {
        let (base, disk, budget) = disk_for(16);
        on_threads(|thread| {
            for i in 0..16 {
                write(&base, &disk, (thread + i) % 16, 1).expect("there is room");
            }
        });
        assert_eq!(budget.used(), budget.limit());
    }
}

#[test]
fn of_two_who_write_the_last_block_at_once_none_is_refused() {
    let (base, disk, budget) = disk_for(1);
    disk.store().write_gate.close();
    thread::scope(|scope| {
        let first = scope.spawn(|| write(&base, &disk, 5, 1));
        disk.store().write_gate.wait_for(1);
        let second = tempt(scope, || write(&base, &disk, 5, 1));
        // What is in flight may fail: it waits, and writes nothing yet.
        disk.store().write_gate.assert_waiting(1);
        assert_eq!(budget.used(), budget.limit());
        disk.store().write_gate.open();
        first.join().expect("no panic").expect("there is room");
        second.join().expect("no panic").expect("there is room");
    });
    assert_eq!(budget.used(), budget.limit());
}

/// It may turn out that there was room, and it must not be refused before.
#[test]
fn who_finds_the_last_block_in_flight_waits_and_is_refused_or_not() {
    for fails in [false, true] {
        let (base, disk, budget) = disk_for(1);
        disk.store().write_gate.close();
        if fails {
            disk.store().fail_next(libc::EIO);
        }
        thread::scope(|scope| {
            let first = scope.spawn(|| write(&base, &disk, 5, 1));
            disk.store().write_gate.wait_for(1);
            let second = tempt(scope, || write(&base, &disk, 900, 1));
            assert!(!second.is_finished());
            disk.store().write_gate.open();
            let first = first.join().expect("no panic");
            let second = second.join().expect("no panic");
            if fails {
                assert_eq!(first.expect_err("a fault").errno(), libc::EIO);
                // What the first has left was punched out for it.
                second.expect("there is room");
                assert_eq!(disk.store().stored(), pages(900));
            } else {
                first.expect("there is room");
                assert_refused(second);
            }
        });
        assert_eq!(budget.used(), budget.limit());
    }
}

/// The pages of a block in the store.
fn pages(block: u64) -> Vec<u64> {
    (block * BLOCK..(block + 1) * BLOCK).step_by(512).collect()
}

#[test]
fn what_a_failed_write_leaves_counts_until_it_is_punched_out() {
    let how: [fn(&TestBase, &Disk) -> Result<()>; 3] = [
        |base, disk| write(base, disk, 3, 2),
        |base, disk| disk.zero(base, 3 * BLOCK, 2 * BLOCK, KEEP),
        |base, disk| disk.write(base, b"a part", 3 * BLOCK + 5),
    ];
    for request in how {
        for can_punch in [true, false] {
            let budget = Arc::new(Budget::new(SMALL + 2 * BLOCK));
            let store = TestStore::with(can_punch, true);
            let (base, disk) = disk_on(&budget, &Arc::default(), SIZE, store);
            disk.store().fail_next(libc::EIO);
            let failed = request(&base, &disk).expect_err("a fault");
            assert_eq!(failed.errno(), libc::EIO);
            let left = budget.used() - SMALL;
            if can_punch {
                assert_eq!(left, 0);
                write(&base, &disk, 100, 2).expect("there is room");
                continue;
            }
            assert!(left == BLOCK || left == 2 * BLOCK, "{left}");
            assert!(disk.store().stored().len() as u64 * 512 <= left);
            // It is charged already.
            write(&base, &disk, 3, 2).expect("there is room");
            assert_eq!(budget.used(), budget.limit());
            assert_refused(write(&base, &disk, 100, 1));
        }
    }
}

/// Also for another overlay.
#[test]
fn what_waits_to_be_punched_out_is_room() {
    for of_same in [true, false] {
        let reclaim = Arc::new(Reclaim::default());
        let budget = Arc::new(Budget::new(2 * SMALL + 2 * BLOCK));
        let disks = [(); 2].map(|()| disk_on(&budget, &reclaim, SIZE, TestStore::default()));
        let [(base, disk), (_, other)] = &disks;
        // So that both have what their map needs.
        for (base, disk) in &disks {
            trim(base, disk, 9, 1).expect("there is room");
        }
        with_thread(&reclaim, || {
            write(base, disk, 0, 2).expect("there is room");
            disk.store().punch_gate.close();
            trim(base, disk, 0, 1).expect("a good trim");
            disk.store().punch_gate.wait_for(1);
            // It is stored still, and counts.
            assert_eq!(budget.used(), budget.limit());
            thread::scope(|scope| {
                let writer = if of_same { disk } else { other };
                let written = tempt(scope, || write(base, writer, 2 * AREA / BLOCK, 1));
                assert!(!written.is_finished(), "it was refused");
                disk.store().punch_gate.open();
                written.join().expect("no panic").expect("there is room");
            });
        });
        assert_eq!(budget.used(), budget.limit());
        assert_eq!(state(disk, 0), State::Zero);
    }
}

/// What is given back while somebody makes room, another may have taken before he tries
/// again.
#[test]
fn who_finds_no_room_tries_again_as_long_as_some_is_given_back() {
    let (reclaim, budget) = (Arc::default(), Arc::new(Budget::new(2 * SMALL + 4 * BLOCK)));
    let disks = [(); 2].map(|()| disk_on(&budget, &reclaim, SIZE, TestStore::default()));
    let [(base, disk), (_, other)] = &disks;
    trim(base, disk, 9, 1).expect("there is room");
    // Two blocks of the other disk wait to be punched out, for which there is no space yet.
    let hook = |hook| *other.store().before_punch.lock().expect("no panic") = Some(hook);
    let full = || Err(Error::new(libc::ENOSPC, "a hole needs space"));
    hook(Box::new(move |_| full()));
    let far = AREA / BLOCK;
    for block in [0, far] {
        write(base, other, block, 1).expect("there is room");
        trim(base, other, block, 1).expect("a good trim");
    }
    // The rest is that of another client, who gives a block back and takes one at once.
    let account = Account::new(&budget);
    account.take(2 * BLOCK, Share::All).expect("there is room");
    let tries = Arc::new(AtomicUsize::new(0));
    hook(Box::new({
        let tries = Arc::clone(&tries);
        move |range| {
            if range.start == 0 {
                return Ok(());
            }
            account.give_back(BLOCK);
            if tries.fetch_add(1, Ordering::Relaxed) < 5 {
                account.take(BLOCK, Share::All).expect("it was given back");
            }
            full()
        }
    }));
    write(base, disk, 100, 2).expect("it may try again");
    assert_eq!(tries.load(Ordering::Relaxed), 6);
    assert_eq!(budget.used(), budget.limit());
}

/// Each has a block at a time, and there is room for all of them.
#[test]
fn nobody_who_trims_before_he_writes_is_ever_refused() {
    let reclaim = Arc::new(Reclaim::default());
    let budget = Arc::new(Budget::new(2 * SMALL + THREADS * BLOCK));
    let disks = [(); 2].map(|()| disk_on(&budget, &reclaim, SIZE, TestStore::default()));
    with_thread(&reclaim, || {
        on_threads(|thread| {
            let (base, disk) = &disks[thread as usize % 2];
            for i in 0..100 {
                // In the same area, and in the same block of the map.
                let block = thread + THREADS * (i % 7);
                write(base, disk, block, 1).expect("there is room");
                assert!(budget.used() <= budget.limit(), "{}", budget.used());
                trim(base, disk, block, 1).expect("a good trim");
            }
        });
    });
    for (_, disk) in &disks {
        disk.give_back();
    }
    assert_eq!(budget.used(), 2 * SMALL);
}

/// What is counted and what is in the store, after all kinds of requests of all threads
/// to the same blocks, of which some fail.
#[test]
fn what_is_counted_is_what_is_stored() {
    let reclaim = Arc::new(Reclaim::default());
    let budget = Arc::new(Budget::new(SMALL + 40 * BLOCK));
    let (base, disk) = disk_on(&budget, &reclaim, SIZE, TestStore::default());
    let refused = AtomicUsize::new(0);
    with_thread(&reclaim, || {
        on_threads(|thread| {
            let mut random = thread * 2 + 1;
            for _ in 0..300 {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(99);
                let (block, count) = ((random >> 33) % 64, (random >> 50) % 3 + 1);
                let at = block * BLOCK;
                let done = match (random >> 57) % 8 {
                    0 => trim(&base, &disk, block, count),
                    1 => disk.zero(&base, at, count * BLOCK, KEEP),
                    2 => disk.write(&base, b"a part", at + BLOCK - 3),
                    3 => disk.write(&base, &[0; BLOCK as usize], at),
                    4 => disk.read(&base, &mut [0; BLOCK as usize], at, true),
                    5 if random % 5 == 0 => {
                        disk.store().fail_next(libc::EIO);
                        Ok(())
                    }
                    _ => write(&base, &disk, block, count),
                };
                match done {
                    Err(e) if e.is_over_limit() => refused.fetch_add(1, Ordering::Relaxed),
                    _ => 0,
                };
                assert!(budget.used() <= budget.limit(), "{}", budget.used());
            }
        });
    });
    assert_ne!(refused.load(Ordering::Relaxed), 0, "the limit was met");
    trim(&base, &disk, 0, 70).expect("a good trim");
    disk.give_back();
    // A hole that has failed has left what it was to give back: that stays counted.
    let count = ((budget.limit() - budget.used()) / BLOCK).min(8);
    if count > 0 {
        write(&base, &disk, 0, count).expect("there is room");
    }
    disk.give_back();
    let stored = disk.store().stored().len() as u64 * 512;
    let counted = budget.used() - SMALL;
    assert!(stored <= counted, "{stored} stored, {counted} counted");
    let data = (0..64).filter(|block| state(&disk, *block) == State::Data);
    assert_eq!(data.count() as u64, count);
}

#[test]
fn copies_take_no_more_than_half() {
    let copies: [fn(&TestBase, &Disk, u64); 2] = [
        |base, disk, block| {
            let mut bytes = [0; BLOCK as usize];
            disk.read(base, &mut bytes, block * BLOCK, true)
                .expect("a good read");
            assert_eq!(bytes[..], base_bytes(base, block * BLOCK, BLOCK));
        },
        |base, disk, block| {
            disk.cache(base, block * BLOCK, BLOCK, true)
                .expect("a good cache");
        },
    ];
    for copy in copies {
        let budget = Arc::new(Budget::new(2 * (SMALL + 4 * BLOCK)));
        let (base, disk) = disk_on(&budget, &Arc::default(), SIZE, TestStore::default());
        // All of them find that there is room, and then store what they have read.
        base.gate.close();
        thread::scope(|scope| {
            scope.spawn(|| {
                on_threads(|thread| {
                    copy(&base, &disk, 2 * thread);
                    copy(&base, &disk, 2 * thread + 1);
                });
            });
            base.gate.wait_for(THREADS as usize);
            base.gate.open();
        });
        assert_eq!(budget.used(), budget.limit() / 2);
        let copied = (0..32).filter(|block| state(&disk, *block) == State::Data);
        assert_eq!(copied.count(), 4);
        // The base is asked for no more than the client has asked for.
        base.reads.lock().expect("no panic").clear();
        let mut part = [0; 10];
        disk.read(&base, &mut part, 50 * BLOCK + 5, true)
            .expect("a good read");
        assert_eq!(base.read_calls(), [(50 * BLOCK + 5, 50 * BLOCK + 15)]);
        // The rest is there for what is asked for.
        let room = budget.limit() - budget.used();
        write(&base, &disk, 100, room / BLOCK).expect("there is room");
        assert_refused(write(&base, &disk, 200, 1));
    }
}

#[test]
fn what_an_overlay_has_taken_is_given_back_when_it_is_dropped() {
    let budget = Arc::new(Budget::new(2 * SMALL + 4 * BLOCK));
    let disk = || disk_on(&budget, &Arc::default(), SIZE, TestStore::default());
    let (base, one) = disk();
    let (_, other) = disk();
    write(&base, &one, 0, 3).expect("there is room");
    write(&base, &other, 0, 1).expect("there is room");
    assert_refused(write(&base, &other, 1, 1));
    trim(&base, &one, 0, 1).expect("a good trim");
    drop(one);
    assert_eq!(budget.used(), SMALL + BLOCK);
    write(&base, &other, 1, 3).expect("there is room");
    drop(other);
    assert_eq!(budget.used(), 0);
}

/// One of which all is zeroes needs no map, and lasts all the same.
#[test]
fn an_overlay_that_was_changed_counts_by_itself() {
    let budget = Arc::new(Budget::new(2 * OVERLAY_LEN + LEAF));
    let disks = [(); 4].map(|()| disk_on(&budget, &Arc::default(), SIZE, TestStore::default()));
    let [(base, one), (_, other), (_, third), (_, untouched)] = &disks;
    let all = SIZE / BLOCK;
    for disk in [one, one, other] {
        trim(base, disk, 0, all).expect("there is room");
    }
    assert_eq!(budget.used(), 2 * OVERLAY_LEN);
    assert_refused(trim(base, third, 0, all));
    assert_refused(write(base, third, 0, 1));
    assert_refused(third.zero(base, 0, BLOCK, KEEP));
    assert_eq!(state(third, 0), State::Base);
    let mut copied = [0; BLOCK as usize];
    untouched
        .read(base, &mut copied, 0, true)
        .expect("a good read");
    assert_eq!(state(untouched, 0), State::Base, "it is not copied");
    assert_eq!(budget.used(), 2 * OVERLAY_LEN);
}

/// All of them begin at once: none may take a part of the room and then lack the rest.
#[test]
fn of_new_overlays_as_many_are_written_to_as_there_is_room_for() {
    for fit in [1, 3] {
        for _ in 0..100 {
            let budget = Arc::new(Budget::new(fit * (SMALL + BLOCK) + OVERLAY_LEN));
            let disks = [(); THREADS as usize]
                .map(|()| disk_on(&budget, &Arc::default(), SIZE, TestStore::default()));
            let stored = AtomicU64::new(0);
            let start = Barrier::new(THREADS as usize);
            on_threads(|thread| {
                let (base, disk) = &disks[thread as usize];
                start.wait();
                match write(base, disk, thread, 1) {
                    Ok(()) => _ = stored.fetch_add(1, Ordering::Relaxed),
                    refused => assert_refused(refused),
                }
            });
            assert_eq!(stored.into_inner(), fit);
            assert_eq!(budget.used(), fit * (SMALL + BLOCK));
        }
    }
}

/// On the largest disk a block needs four levels of nodes.
#[test]
fn a_first_write_that_lacks_a_byte_takes_nothing() {
    let size = 7 << 60;
    let needed = |limit| {
        let budget = Arc::new(Budget::new(limit));
        let (base, disk) = disk_on(&budget, &Arc::default(), size, TestStore::default());
        let written = write(&base, &disk, 5, 1);
        (written, budget.used(), disk.is_untouched())
    };
    let (written, used, _) = needed(u64::MAX);
    written.expect("there is room");
    let (written, exactly, _) = needed(used);
    written.expect("there is room");
    assert_eq!(exactly, used);
    let (refused, used, is_untouched) = needed(used - 1);
    assert_refused(refused);
    assert_eq!(used, 0);
    assert!(is_untouched);
}

/// On a disk so large that trims alone could take all memory.
#[test]
fn a_trim_that_has_no_memory_does_what_needs_none_and_is_refused() {
    const PART: u64 = 2048;
    let large = 1 << 40;
    let budget = Arc::new(Budget::new(OVERLAY_LEN + 100_000));
    // Of one that can punch holes the first part of a trim makes room for the rest.
    let store = TestStore::with(false, true);
    let (base, disk) = disk_on(&budget, &Arc::default(), large, store);
    write(&base, &disk, 10, 3).expect("there is room");
    let mut refused = 0;
    for part in 2..1000 {
        match trim(&base, &disk, 2 * part * PART + 1, 1) {
            Ok(()) => assert_eq!(refused, 0, "and then nothing fits"),
            done => {
                assert_refused(done);
                refused += 1;
            }
        }
        assert!(budget.used() <= budget.limit(), "{}", budget.used());
    }
    assert!(refused > 800, "{refused}");
    let memory = budget.used();
    // From data, over whole parts, into a part that needs a leaf.
    let last = 3 * PART;
    assert_refused(trim(&base, &disk, 11, last + 1 - 11));
    for (block, expected) in [
        (10, State::Data),
        (11, State::Zero),
        (12, State::Zero),
        (PART, State::Zero),
        (2 * PART + 7, State::Zero),
        (last, State::Base),
        (last + 1, State::Base),
    ] {
        assert_eq!(state(&disk, block), expected, "block {block}");
    }
    assert_eq!(budget.used(), memory);
    // What comes first needs a leaf, and what follows needs nothing.
    assert_refused(trim(&base, &disk, 5 * PART + 7, 3 * PART - 7));
    for (block, expected) in [
        (5 * PART + 7, State::Base),
        (6 * PART + 7, State::Zero),
        (7 * PART + 7, State::Zero),
    ] {
        assert_eq!(state(&disk, block), expected, "block {block}");
    }
    assert_eq!(budget.used(), memory);
    // Who is told by an error that a trim failed can do something about it. Zeroes that
    // must be zeroes are refused in the same way.
    let zeroes = Zeroing::Zero {
        may_trim: true,
        fast: false,
    };
    assert_refused(disk.zero(&base, (last + 1) * BLOCK, BLOCK, zeroes));
}

/// Of a group of 64 clusters of 32 blocks: 16 bytes and 2 bytes for each.
const TABLES: u64 = 64 * 18;

fn kept_on(budget: &Arc<Budget>, recorder: &Recorder) -> Kept {
    let account = Account::new(budget);
    let (image, _) = Image::open(recorder.clone(), Path::new("kept")).expect("an image");
    kept::resume(image.limited(Some(&account)), true).expect("sound")
}

#[test]
fn the_tables_of_an_image_count() {
    let recorder = Recorder::holding(new_image(2 * SIZE, BLOCK));
    let base = TestBase::new(2 * SIZE);
    let per_part = LEAF + TABLES;
    // Two leaves need a node above them.
    let budget = Arc::new(Budget::new(u64::MAX));
    let disk = kept_on(&budget, &recorder);
    on_threads(|thread| {
        write(&base, &disk, thread, 1).expect("there is room");
        write(&base, &disk, SIZE / BLOCK + thread, 1).expect("there is room");
    });
    let used = budget.used();
    drop(disk);
    assert_eq!(budget.used(), 0);
    let node = used - OVERLAY_LEN - 2 * per_part - 2 * THREADS * BLOCK;
    assert!((4096..5000).contains(&node), "{used}");

    let recorder = Recorder::holding(new_image(2 * SIZE, BLOCK));
    let budget = Arc::new(Budget::new(
        OVERLAY_LEN + node + per_part + BLOCK + LEAF + TABLES - 1,
    ));
    let disk = kept_on(&budget, &recorder);
    write(&base, &disk, 0, 1).expect("there is room");
    assert_refused(trim(&base, &disk, SIZE / BLOCK + 9, 1));
    assert_eq!(state(&disk, SIZE / BLOCK + 9), State::Base);
    disk.flush().expect("a good flush");
}

/// Of the image's tables, which both find missing.
#[test]
fn of_two_who_need_the_same_tables_none_is_refused_and_they_count_once() {
    const BLOCK: u64 = 512;
    const SIZE: u64 = AREA;
    let needed = SMALL + TABLES + 2 * BLOCK;
    // There is room for what both have in flight, or the second has to wait for the first.
    for (room, at_once) in [(needed + TABLES, 2), (needed, 1)] {
        let recorder = Recorder::holding(new_image(SIZE, BLOCK));
        let base = TestBase::new(SIZE);
        let budget = Arc::new(Budget::new(room));
        let disk = kept_on(&budget, &recorder);
        let write = |block| disk.write(&base, &[7; BLOCK as usize], block * BLOCK);
        recorder.reserve_gate().close();
        thread::scope(|scope| {
            let first = scope.spawn(|| write(0));
            recorder.reserve_gate().wait_for(1);
            let second = tempt(scope, || write(1));
            recorder.reserve_gate().wait_for(at_once);
            recorder.reserve_gate().open();
            first.join().expect("no panic").expect("there is room");
            second.join().expect("no panic").expect("there is room");
        });
        assert_eq!(budget.used(), needed);
    }
}

#[test]
fn an_image_that_is_over_the_limit_is_served_and_grows_no_further() {
    let recorder = Recorder::holding(new_image(2 * SIZE, BLOCK));
    let base = TestBase::new(2 * SIZE);
    let budget = Arc::new(Budget::new(u64::MAX));
    let disk = kept_on(&budget, &recorder);
    for block in [0, 3, 4, 5, SIZE / BLOCK + 100] {
        write(&base, &disk, block, 1).expect("there is room");
    }
    trim(&base, &disk, 7, 2).expect("a good trim");
    disk.flush().expect("a good flush");
    let before = read_all(&base, &disk);
    let used = budget.used();
    drop(disk);

    let budget = Arc::new(Budget::new(used - BLOCK));
    let disk = kept_on(&budget, &recorder);
    assert_eq!(budget.used(), used, "all of it is counted");
    assert!(read_all(&base, &disk) == before);
    assert_refused(write(&base, &disk, 1, 1));
    assert_refused(write(&base, &disk, 8, 1));
    write(&base, &disk, 3, 3).expect("it takes nothing");
    disk.write(&base, b"in place", 5).expect("it takes nothing");
    let mut bytes = [0; BLOCK as usize];
    disk.read(&base, &mut bytes, 2 * BLOCK, true)
        .expect("a good read");
    assert_eq!(state(&disk, 2), State::Base, "nothing is copied");
    disk.flush().expect("a good flush");
    trim(&base, &disk, 0, 1).expect("it needs nothing");
    disk.give_back();
    assert_eq!(budget.used(), budget.limit());
    assert_refused(write(&base, &disk, 1, 1));
    trim(&base, &disk, 3, 1).expect("it needs nothing");
    write(&base, &disk, 1, 1).expect("there is room");
    disk.flush().expect("a good flush");
    assert_eq!(budget.used(), budget.limit());
}

/// Where the file system says of zeroes that keep their space that they are a hole.
#[test]
fn zeroes_of_a_resumed_image_that_look_like_a_hole_are_given_back() {
    let recorder = Recorder::holding(new_image(SIZE, BLOCK));
    recorder.tell_holes();
    let base = TestBase::new(SIZE);
    let budget = Arc::new(Budget::new(u64::MAX));
    let disk = kept_on(&budget, &recorder);
    disk.zero(&base, 20 * BLOCK, 4 * BLOCK, KEEP)
        .expect("a good zero");
    let used = budget.used();
    trim(&base, &disk, 0, 100).expect("a good trim");
    disk.give_back();
    assert_eq!(budget.used(), used - 4 * BLOCK);
}

/// A kept overlay is published in parts, and a part may need a node of the map that all of it
/// would not need.
#[test]
fn a_trim_of_an_image_that_has_no_memory_gives_its_data_back() {
    const BLOCK: u64 = 512;
    // Two nodes below that of the root.
    const SIZE: u64 = 516 << 20;
    const DATA: u64 = 1 << 20;
    let groups = SIZE.div_ceil(64 * 32 * BLOCK);
    // A leaf and the nodes above it, and less than another node.
    let map = OVERLAY_LEN + LEAF + 2 * 4104 + 4000;
    let recorder = Recorder::holding(new_image(SIZE, BLOCK));
    let base = TestBase::new(SIZE);
    let budget = Arc::new(Budget::new(DATA + map + groups * TABLES));
    let account = Account::new(&budget);
    let (image, _) = Image::open(recorder, Path::new("new")).expect("an image");
    // As one that was made in this run, of which all that is stored is known.
    let store = KeptStore::new(image.limited(Some(&account)), true);
    let disk = Overlay::new(SIZE, block_size(BLOCK), store).limited(Some(account));
    disk.write(&base, &vec![7; DATA as usize], 0)
        .expect("there is room");
    disk.zero(&base, 0, SIZE, Zeroing::Trim)
        .expect("what it gives back is room");
    let usage = disk.usage();
    assert_eq!((usage.data, usage.unused), (0, 0));
    disk.write(&base, &vec![8; (DATA - BLOCK) as usize], 0)
        .expect("there is room, beside that node");
}

/// As [`tempt`], but nobody waits for the thread, which may hang for ever.
fn begin(request: impl FnOnce() -> Result<()> + Send + 'static) -> mpsc::Receiver<Result<()>> {
    let (begun, has_begun) = mpsc::channel();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        begun.send(()).expect("received");
        // Who has given up waiting for it is about to fail.
        let _ = sender.send(request());
    });
    has_begun.recv().expect("sent");
    thread::sleep(TEMPTATION);
    receiver
}

/// Who publishes in an image holds a lock of it. Who waits for room may not hold that: what
/// is in his way may need it to be settled.
#[test]
fn who_waits_for_room_keeps_nobody_from_publishing() {
    const BLOCK: u64 = 512;
    // Four leaves lie below a second node, which is not needed if all of them are marked at
    // once. (The image publishes the first of them under the same lock as the first of all.)
    const SIZE: u64 = (512 + 4) << 20;
    const NODE: u64 = 4104;
    let start = SMALL + 2 * NODE + TABLES + BLOCK;
    let in_flight = (1 << 20) - 2 * BLOCK;
    // What the four need beside the node; and the node.
    for fits in [4 * TABLES, NODE] {
        for fails in [false, true] {
            let budget = Arc::new(Budget::new(start + in_flight + fits));
            let recorder = Recorder::holding(new_image(SIZE, BLOCK));
            let disk = Arc::new(kept_on(&budget, &recorder));
            let write = |at: u64, bytes: Vec<u8>| {
                let disk = Arc::clone(&disk);
                move || disk.write(&TestBase::new(SIZE), &bytes, at)
            };
            // The next one in this part needs room for its blocks only.
            write(0, vec![1; BLOCK as usize])().expect("there is room");
            assert_eq!(budget.used(), start);
            let next = recorder.step_count();
            recorder.hold(Hold::Before(next));
            recorder.fail(fails.then_some(Fault {
                at: next,
                errno: libc::EIO,
                portion: Portion::Half,
                stays: false,
            }));
            let first = begin(write(2 * BLOCK, vec![2; in_flight as usize]));
            recorder.gate().wait_for(1);
            assert_eq!(budget.used(), start + in_flight);
            let second = begin(write(512 << 20, vec![0; 4 << 20]));
            assert!(second.try_recv().is_err(), "it was refused too early");
            recorder.gate().open();
            let first = first.recv_timeout(PATIENCE).expect("it can publish");
            let second = second.recv_timeout(PATIENCE).expect("it waits no more");
            if fails {
                assert_eq!(first.expect_err("a fault").errno(), libc::EIO);
                second.expect("there is room");
            } else {
                first.expect("there is room");
                assert_refused(second);
            }
        }
    }
}
