//! Two requests to one block at once, in an order that is forced.
//!
//! One request is held at a gate between its read of the base and its write to
//! the overlay, where a careless fill loses what others write; the gate tells
//! that the request really is there. The other request then runs to its end
//! (which also shows that nothing is held across a call to the base), and the
//! first goes on. Each has a base of its own over the same bytes, so that only
//! the first is held.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nbdkit_cow_filter::block::ByteRange;
use nbdkit_cow_filter::overlay::{Overlay, Reclaim, State, Store, Zeroing};

use crate::disk::{
    BLOCK, Call, TestBase, TestStore, assert_only_data_is_stored, block_size, file_overlay,
    read_all, tempt, test_disk, with_thread,
};

type Disk = Overlay<TestStore>;

const SIZE: u64 = 3 * BLOCK;
/// The block that both requests go to.
const START: u64 = BLOCK;

const KEEP: Zeroing = Zeroing::Zero {
    may_trim: false,
    fast: false,
};

const DISCARD: Zeroing = Zeroing::Zero {
    may_trim: true,
    fast: false,
};

/// Holds `first` after it has read the base, runs `second` meanwhile, and returns
/// the bytes of the block at the end. The other blocks must be as they were.
fn interleave(
    first: impl Fn(&TestBase, &Disk) + Sync,
    second: impl Fn(&TestBase, &Disk),
) -> (Vec<u8>, Disk) {
    let (held, disk) = test_disk(SIZE);
    let free = TestBase::new(SIZE);
    held.gate.close();
    thread::scope(|scope| {
        let first = scope.spawn(|| first(&held, &disk));
        held.gate.wait_for(1);
        second(&free, &disk);
        assert!(!first.is_finished(), "the first request was not held");
        held.gate.open();
        first.join().expect("the first request ended well");
    });
    let bytes = read_all(&free, &disk);
    let whole = free.bytes(ByteRange {
        start: 0,
        end: SIZE,
    });
    let (start, end) = (START as usize, (START + BLOCK) as usize);
    assert_eq!(bytes[..start], whole[..start]);
    assert_eq!(bytes[end..], whole[end..]);
    (bytes[start..end].to_vec(), disk)
}

fn base_block() -> Vec<u8> {
    TestBase::new(SIZE).bytes(ByteRange {
        start: START,
        end: START + BLOCK,
    })
}

/// The block's bytes with those at `at` replaced.
fn with(mut block: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    block[at..at + bytes.len()].copy_from_slice(bytes);
    block
}

type Fill = fn(&TestBase, &Disk);

/// The requests that fill a block with what the base has.
fn fills() -> [(&'static str, Fill); 3] {
    fn check_read(disk: &Disk, base: &TestBase, offset: u64, len: usize) {
        let mut buf = vec![0; len];
        disk.read(base, &mut buf, offset, true)
            .expect("a good read");
        let range = ByteRange {
            start: offset,
            end: offset + len as u64,
        };
        // In flight together with a change: old bytes are right, and at the gate
        // the old bytes are what it has.
        assert_eq!(buf, base.bytes(range));
    }
    [
        ("cow-on-read of a part", |base, disk| {
            check_read(disk, base, START + 5000, 4096);
        }),
        ("cow-on-read of the block", |base, disk| {
            check_read(disk, base, START, BLOCK as usize);
        }),
        ("cow-on-cache", |base, disk| {
            disk.cache(base, START + 1, 2, true).expect("a good cache");
        }),
    ]
}

#[test]
fn a_partial_write_survives_a_fill() {
    for (name, fill) in fills() {
        let (block, _) = interleave(fill, |base, disk| {
            disk.write(base, b"written", START + 100)
                .expect("a good write");
        });
        assert!(block == with(base_block(), 100, b"written"), "{name}");
    }
}

#[test]
fn a_whole_write_survives_a_fill() {
    let new = vec![0x55; BLOCK as usize];
    for (name, fill) in fills() {
        let (block, disk) = interleave(fill, |base, disk| {
            disk.write(base, &new, START).expect("a good write");
        });
        assert!(block == new, "{name}");
        assert_eq!(
            disk.store().changes(),
            1,
            "{name}: what was filled is dropped, not written"
        );
    }
}

#[test]
fn a_write_of_zeroes_survives_a_fill() {
    for (name, fill) in fills() {
        let (block, disk) = interleave(fill, |base, disk| {
            disk.write(base, &vec![0; BLOCK as usize], START)
                .expect("a good write");
        });
        assert!(block.iter().all(|byte| *byte == 0), "{name}");
        assert_eq!(disk.state_at(START).expect("in range"), State::Zero);
    }
}

#[test]
fn a_trim_and_a_zero_survive_a_fill() {
    for (name, fill) in fills() {
        for how in [Zeroing::Trim, DISCARD, KEEP] {
            let (block, _) = interleave(fill, |base, disk| {
                disk.zero(base, START, BLOCK, how).expect("a good zero");
            });
            assert!(block.iter().all(|byte| *byte == 0), "{name}, {how:?}");

            let (block, _) = interleave(fill, |base, disk| {
                disk.zero(base, START + 10, 20, how).expect("a good zero");
            });
            let expected = match how {
                // Of a part of a block of the base it does nothing.
                Zeroing::Trim => base_block(),
                Zeroing::Zero { .. } => with(base_block(), 10, &[0; 20]),
            };
            assert!(block == expected, "{name}, part, {how:?}");
        }
    }
}

#[test]
fn two_fills_of_one_block_store_it_once() {
    for (name, fill) in fills() {
        for (other_name, other) in fills() {
            let (block, disk) = interleave(fill, other);
            assert!(block == base_block(), "{name}, {other_name}");
            assert_eq!(
                disk.store().calls()[..1],
                [Call::Write(START, START + BLOCK)]
            );
            assert_eq!(disk.store().changes(), 1, "{name}, {other_name}");
        }
    }
}

#[test]
fn two_partial_writes_to_one_block_both_survive() {
    let (block, _) = interleave(
        |base, disk| {
            disk.write(base, b"first", START + 10)
                .expect("a good write")
        },
        |base, disk| {
            disk.write(base, b"second", START + 4000)
                .expect("a good write")
        },
    );
    assert!(block == with(with(base_block(), 10, b"first"), 4000, b"second"));
}

#[test]
fn zeroes_and_a_write_in_parts_of_a_block_both_survive() {
    for how in [DISCARD, KEEP] {
        let (block, _) = interleave(
            |base, disk| disk.zero(base, START + 10, 90, how).expect("a good zero"),
            |base, disk| {
                disk.write(base, b"second", START + 4000)
                    .expect("a good write")
            },
        );
        let expected = with(with(base_block(), 10, &[0; 90]), 4000, b"second");
        assert!(block == expected, "zeroes first, {how:?}");

        let (block, _) = interleave(
            |base, disk| {
                disk.write(base, b"second", START + 4000)
                    .expect("a good write")
            },
            |base, disk| disk.zero(base, START + 10, 90, how).expect("a good zero"),
        );
        assert!(block == expected, "write first, {how:?}");
    }
}

#[test]
fn a_write_waits_for_the_hole_of_a_trim() {
    // If it did not, its bytes would be published and then punched out.
    for (offset, new) in [(START, vec![7; BLOCK as usize]), (START + 10, vec![7; 100])] {
        let (base, disk) = test_disk(SIZE);
        disk.write(&base, &vec![1; BLOCK as usize], START)
            .expect("a good write");
        disk.store().punch_gate.close();
        thread::scope(|scope| {
            let trim = scope.spawn(|| disk.zero(&base, START, BLOCK, Zeroing::Trim));
            disk.store().punch_gate.wait_for(1);
            let write = tempt(scope, || disk.write(&base, &new, offset));
            assert!(!write.is_finished(), "a write went on during the trim");
            disk.store().punch_gate.open();
            trim.join().expect("no panic").expect("a good trim");
            write.join().expect("no panic").expect("a good write");
        });
        let at = (offset - START) as usize;
        let expected = with(vec![0; BLOCK as usize], at, &new);
        let block = &read_all(&base, &disk)[START as usize..(START + BLOCK) as usize];
        assert!(block == expected);
    }
}

#[test]
fn a_trim_waits_for_a_write_that_is_under_way() {
    for (offset, new) in [(START, vec![7; BLOCK as usize]), (START + 10, vec![7; 100])] {
        let (base, disk) = test_disk(SIZE);
        disk.write(&base, &vec![1; BLOCK as usize], START)
            .expect("a good write");
        disk.store().write_gate.close();
        thread::scope(|scope| {
            let write = scope.spawn(|| disk.write(&base, &new, offset));
            disk.store().write_gate.wait_for(1);
            let trim = tempt(scope, || disk.zero(&base, START, BLOCK, Zeroing::Trim));
            assert!(!trim.is_finished(), "a trim went on during the write");
            disk.store().write_gate.open();
            trim.join().expect("no panic").expect("a good trim");
            write.join().expect("no panic").expect("a good write");
        });
        assert_eq!(disk.state_at(START).expect("in range"), State::Zero);
    }
}

#[test]
fn reads_and_whole_writes_wait_for_nobody_but_a_trim() {
    let (base, disk) = test_disk(SIZE);
    let whole = vec![3; BLOCK as usize];
    disk.store().write_gate.close();
    thread::scope(|scope| {
        let writes = [(); 3].map(|()| scope.spawn(|| disk.write(&base, &whole, START)));
        // All three are in the store at once, in the same block.
        disk.store().write_gate.wait_for(3);
        let mut buf = [0; 100];
        disk.read(&base, &mut buf, START, false)
            .expect("a good read");
        assert_eq!(buf[..], base_block()[..100], "not published yet");
        disk.store().write_gate.open();
        for write in writes {
            write.join().expect("no panic").expect("a good write");
        }
    });
}

#[test]
fn a_read_goes_on_while_a_trim_has_the_block_alone() {
    let (base, disk) = test_disk(SIZE);
    disk.write(&base, &vec![1; BLOCK as usize], START)
        .expect("a good write");
    disk.store().punch_gate.close();
    thread::scope(|scope| {
        let trim = scope.spawn(|| disk.zero(&base, START, BLOCK, Zeroing::Trim));
        disk.store().punch_gate.wait_for(1);
        let mut buf = [9; 100];
        disk.read(&base, &mut buf, START, false)
            .expect("a good read");
        assert_eq!(buf, [0; 100], "published already");
        disk.store().punch_gate.open();
        trim.join().expect("no panic").expect("a good trim");
    });
}

/// How many bytes in a row belong to one of the writers below.
const SLOT: u64 = 64;
const WRITERS: u64 = 4;
/// Where they write.
const SHARED_SIZE: u64 = (1 << 20) + 100;
/// That of the disk.
const LARGE_SIZE: u64 = (2 << 20) + 100;

/// Requests that write to the store while they have the block alone: they bring
/// bytes that their client did not send.
fn fills_in_the_store() -> [(&'static str, Fill); 3] {
    [
        ("a partial write", |base, disk| {
            disk.write(base, b"first", START + 10)
                .expect("a good write");
        }),
        ("cow-on-read", |base, disk| {
            disk.read(base, &mut [0; 10], START + 500, true)
                .expect("a good read");
        }),
        ("cow-on-cache", |base, disk| {
            disk.cache(base, START, 1, true).expect("a good cache");
        }),
    ]
}

#[test]
fn nothing_else_is_written_to_a_block_while_a_fill_writes_to_it() {
    // A fill that has looked at the state and is writing what it found would
    // overwrite whatever came in between.
    let others: [(&str, Fill); 4] = [
        ("a whole write", |base, disk| {
            disk.write(base, &[7; BLOCK as usize], START)
                .expect("a good write");
        }),
        ("a partial write", |base, disk| {
            disk.write(base, &[7; 100], START + 4000)
                .expect("a good write");
        }),
        ("zeroes that keep their space", |base, disk| {
            disk.zero(base, START, BLOCK, KEEP).expect("a good zero");
        }),
        ("a trim", |base, disk| {
            disk.zero(base, START, BLOCK, Zeroing::Trim)
                .expect("a good trim");
        }),
    ];
    for (name, fill) in fills_in_the_store() {
        for (other_name, other) in others {
            let (base, disk) = test_disk(SIZE);
            disk.store().write_gate.close();
            thread::scope(|scope| {
                let fill = scope.spawn(|| fill(&base, &disk));
                disk.store().write_gate.wait_for(1);
                let changes = disk.store().changes();
                let other = tempt(scope, || other(&base, &disk));
                assert!(!other.is_finished(), "{other_name} went on beside {name}");
                disk.store().write_gate.assert_waiting(1);
                assert_eq!(disk.store().changes(), changes);
                disk.store().write_gate.open();
                fill.join().expect("no panic");
                other.join().expect("no panic");
            });
            let block = &read_all(&base, &disk)[START as usize..(START + BLOCK) as usize];
            // The other came last, so all of its bytes are there.
            let range = 4000..4100;
            let expected = match other_name {
                "a whole write" | "a partial write" => [7; 100],
                _ => [0; 100],
            };
            assert_eq!(block[range], expected, "{other_name} after {name}");
        }
    }
}

#[test]
fn zeroes_that_keep_their_space_wait_for_a_trim() {
    let (base, disk) = test_disk(SIZE);
    disk.write(&base, &[1; BLOCK as usize], START)
        .expect("a good write");
    disk.store().punch_gate.close();
    thread::scope(|scope| {
        let trim = scope.spawn(|| disk.zero(&base, START, BLOCK, Zeroing::Trim));
        disk.store().punch_gate.wait_for(1);
        let zero = tempt(scope, || disk.zero(&base, START, BLOCK, KEEP));
        assert!(!zero.is_finished(), "its space would be punched out");
        disk.store().punch_gate.open();
        trim.join().expect("no panic").expect("a good trim");
        zero.join().expect("no panic").expect("a good zero");
    });
    assert_eq!(disk.state_at(START).expect("in range"), State::Data);
}

/// Fills all of the disk, again and again, until it is told to stop.
fn keep_filling<S: Store>(
    overlay: &Overlay<S>,
    stop: &AtomicBool,
    fill: impl Fn(&Overlay<S>, &TestBase, u64),
) {
    let base = TestBase::new(LARGE_SIZE);
    let mut at = 0;
    while !stop.load(Ordering::SeqCst) {
        at = (at + 7919) % (SHARED_SIZE - 3000);
        fill(overlay, &base, at);
    }
}

/// Changes every n-th slot, in random order; then looks whether every one of them holds
/// what was put there last. No other writer changes these bytes.
fn write_to_own_slots<S: Store>(overlay: &Overlay<S>, writer: u64) {
    let base = TestBase::new(LARGE_SIZE);
    let slots = SHARED_SIZE / SLOT / WRITERS;
    let place = |slot: u64| (slot * WRITERS + writer) * SLOT;
    let mut seed = writer + 1;
    let mut expected = vec![None; slots as usize];
    for round in 0..3000 {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
        let slot = (seed >> 33) % slots;
        let at = place(slot);
        let zero = |how| overlay.zero(&base, at, SLOT, how).expect("a good zero");
        let bytes = match round % 10 {
            4 => {
                // Nobody makes data of the base meanwhile but others, and then it is
                // either: the trim did nothing, or made zeroes.
                zero(Zeroing::Trim);
                let mut found = [0; SLOT as usize];
                overlay
                    .read(&base, &mut found, at, false)
                    .expect("a good read");
                let end = at + SLOT;
                let before = expected[slot as usize].unwrap_or_else(|| {
                    base.bytes(ByteRange { start: at, end })
                        .try_into()
                        .expect("a slot")
                });
                assert!(found == [0; SLOT as usize] || found == before, "at {at}");
                found
            }
            6 => {
                zero(DISCARD);
                [0; SLOT as usize]
            }
            8 => {
                zero(KEEP);
                [0; SLOT as usize]
            }
            _ => {
                let bytes = [round as u8; SLOT as usize];
                overlay.write(&base, &bytes, at).expect("a good write");
                bytes
            }
        };
        expected[slot as usize] = Some(bytes);
    }
    for (slot, expected) in (0..).zip(expected) {
        let start = place(slot);
        let end = start + SLOT;
        let mut found = [0; SLOT as usize];
        overlay
            .read(&base, &mut found, start, false)
            .expect("a good read");
        let untouched = base.bytes(ByteRange { start, end });
        let expected = expected.map_or(untouched, |bytes: [u8; SLOT as usize]| bytes.to_vec());
        assert!(found[..] == expected, "lost, at {start}");
    }
}

/// Writes and trims whole areas behind those that the others write to, so that a thread
/// has much to give back.
fn keep_trimming<S: Store>(overlay: &Overlay<S>, stop: &AtomicBool) {
    let base = TestBase::new(LARGE_SIZE);
    let range = (SHARED_SIZE / 65536 + 1) * 65536..LARGE_SIZE;
    let (start, len) = (range.start, range.end - range.start);
    // A byte that is never 0, however long the others take.
    for round in (1..=200_u8).cycle() {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        overlay
            .write(&base, &vec![round; len as usize], start)
            .expect("a good write");
        overlay
            .zero(&base, start, len, Zeroing::Trim)
            .expect("a good trim");
        let bytes = [round; 100];
        let at = start + u64::from(round) * 1000;
        overlay.write(&base, &bytes, at).expect("a good write");
        let mut found = vec![9; 3000];
        overlay
            .read(&base, &mut found, at - 1000, false)
            .expect("a good read");
        assert!(found[1000..1100] == bytes && found[..1000].iter().all(|byte| *byte == 0));
        assert!(found[1100..].iter().all(|byte| *byte == 0), "punched");
    }
}

/// Nothing is forced here: many requests to the same blocks, for the interleavings
/// that nobody thought of.
#[test]
fn threads_that_write_to_all_blocks_at_once_lose_nothing() {
    for block in [512, 4096, 65536] {
        for has_thread in [false, true] {
            let reclaim = Arc::new(Reclaim::default());
            let files = file_overlay(LARGE_SIZE, block).join(&reclaim);
            let store = TestStore::default();
            let memory = Overlay::new(LARGE_SIZE, block_size(block), store).join(&reclaim);
            let work = || {
                change_at_once(&files);
                change_at_once(&memory);
            };
            if has_thread {
                with_thread(&reclaim, work);
            } else {
                work();
            }
            memory.give_back();
            assert_only_data_is_stored(&memory);
        }
    }
}

fn change_at_once<S: Store>(overlay: &Overlay<S>) {
    let stop = &AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            keep_filling(overlay, stop, |overlay, base, at| {
                overlay
                    .read(base, &mut [0; 3000], at, true)
                    .expect("a good read");
            });
        });
        scope.spawn(|| {
            keep_filling(overlay, stop, |overlay, base, at| {
                overlay.cache(base, at, 3000, true).expect("a good cache");
            });
        });
        let trimmer = scope.spawn(|| keep_trimming(overlay, stop));
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| scope.spawn(move || write_to_own_slots(overlay, writer)))
            .collect();
        let ends: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        stop.store(true, Ordering::SeqCst);
        for end in ends {
            end.expect("no write was lost");
        }
        trimmer.join().expect("no write was lost");
    });
}
