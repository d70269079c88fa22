//! Changes of the same bytes take effect in the order in which they came.
//!
//! An older change is held after it has taken its place in the order, and before it is
//! stored: while it reads the base, while it waits for space, or between the steps of a
//! long one. A newer change then runs to its end. What is on the disk at the end must be
//! what the two come to one after the other.

use std::cell::Cell;
use std::sync::Arc;
use std::thread;

use nbdkit_cow_filter::block::ByteRange;
use nbdkit_cow_filter::error::Result;
use nbdkit_cow_filter::overlay::{Overlay, Reclaim, State, Zeroing};

use crate::disk::{
    BLOCK, Call, TestBase, TestStore, assert_only_data_is_stored, block_size, test_disk,
};

type Disk = Overlay<TestStore>;

const AREA: u64 = 1 << 20;
const SIZE: u64 = 4 * AREA;
/// The block that both changes go to: the second of an area.
const TARGET: u64 = AREA + BLOCK;
/// It and its neighbours.
const WINDOW: ByteRange = ByteRange {
    start: TARGET - BLOCK,
    end: TARGET + 2 * BLOCK,
};

const KEEP: Zeroing = Zeroing::Zero {
    may_trim: false,
    fast: false,
};
const DISCARD: Zeroing = Zeroing::Zero {
    may_trim: true,
    fast: false,
};

#[derive(Debug, Clone, Copy)]
enum Change {
    Write { at: u64, len: u64, byte: u8 },
    Zero { at: u64, len: u64, how: Zeroing },
}
use Change::{Write, Zero};

impl Change {
    fn run(self, base: &TestBase, disk: &Disk) -> Result<()> {
        match self {
            Write { at, len, byte } => disk.write(base, &vec![byte; len as usize], at),
            Zero { at, len, how } => disk.zero(base, at, len, how),
        }
    }

    /// The same to the bytes of [`WINDOW`].
    fn apply(self, bytes: &mut [u8]) {
        let (at, len, byte) = match self {
            Write { at, len, byte } => (at, len, byte),
            Zero { at, len, .. } => (at, len, 0),
        };
        let end = at + len;
        let range = ByteRange { start: at, end }.clamp_to(WINDOW);
        bytes[range.in_buffer(WINDOW.start)].fill(byte);
    }
}

/// Where the older change is held.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Held {
    /// It has read the base.
    AtTheBase,
    /// The store was full, and it waits for what another gives back.
    ForSpace,
    /// In the first of its steps.
    InAStep,
}

const STATES: [State; 3] = [State::Base, State::Zero, State::Data];

/// A disk whose block at [`TARGET`] is in `state`, and what [`WINDOW`] has.
fn prepared(state: State) -> (TestBase, Disk, Vec<u8>) {
    let base = TestBase::new(SIZE);
    let disk = Overlay::new(SIZE, block_size(BLOCK), TestStore::default());
    let mut bytes = base.bytes(WINDOW);
    let (at, len) = (TARGET, BLOCK);
    let change = match state {
        State::Base => None,
        State::Zero => Some(Zero {
            at,
            len,
            how: Zeroing::Trim,
        }),
        State::Data => Some(Write { at, len, byte: 77 }),
    };
    if let Some(change) = change {
        change.run(&base, &disk).expect("a good change");
        change.apply(&mut bytes);
    }
    (base, disk, bytes)
}

fn window(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; WINDOW.len() as usize];
    disk.read(&TestBase::new(SIZE), &mut bytes, WINDOW.start, false)
        .expect("a good read");
    bytes
}

/// Runs `newer` while `older` is held.
fn race(held: Held, disk: Disk, older: Change, newer: &dyn Fn(&Disk)) -> Disk {
    let held_base = TestBase::new(SIZE);
    let reclaim = Arc::new(Reclaim::default());
    // Another overlay on the same file system, which has something to give back.
    let (other_base, other) = test_disk(BLOCK);
    let other = other.join(&reclaim);
    let disk = disk.join(&reclaim);
    thread::scope(|scope| {
        let start = || scope.spawn(|| older.run(&held_base, &disk));
        let (older, release): (_, &dyn Fn()) = match held {
            Held::AtTheBase => {
                held_base.gate.close();
                let older = start();
                held_base.gate.wait_for(1);
                (older, &|| held_base.gate.open())
            }
            Held::InAStep => {
                disk.store().write_gate.close();
                let older = start();
                disk.store().write_gate.wait_for(1);
                (older, &|| disk.store().write_gate.open())
            }
            Held::ForSpace => {
                other
                    .write(&other_base, &[1; BLOCK as usize], 0)
                    .expect("a good write");
                other.store().punch_gate.close();
                scope.spawn(|| other.zero(&other_base, 0, BLOCK, Zeroing::Trim));
                other.store().punch_gate.wait_for(1);
                disk.store().write_gate.close();
                let older = start();
                disk.store().write_gate.wait_for(1);
                disk.store().fail_next(libc::ENOSPC);
                let changes = disk.store().changes();
                disk.store().write_gate.open();
                // This needs the stripe alone, so it ends when the older change has let go.
                disk.zero(&held_base, AREA + 8 * BLOCK, BLOCK, Zeroing::Trim)
                    .expect("a good trim");
                assert!(disk.store().changes() > changes, "the store was full");
                (older, &|| other.store().punch_gate.open())
            }
        };
        if held == Held::InAStep {
            // Whoever writes elsewhere must not be held.
            disk.store().write_gate.hold_no_more();
        }
        newer(&disk);
        assert!(!older.is_finished(), "the older change was not held");
        release();
        older.join().expect("no panic").expect("a good change");
    });
    drop(other);
    Arc::into_inner(disk).expect("nobody else has it")
}

fn newer_changes() -> Vec<Change> {
    let (at, len) = (TARGET, BLOCK);
    let part = (TARGET + 600, 1000);
    let mut changes = vec![
        Write { at, len, byte: 2 },
        Write { at, len, byte: 0 },
        Write {
            at: WINDOW.start,
            len: WINDOW.len(),
            byte: 2,
        },
        Write {
            at: part.0,
            len: part.1,
            byte: 2,
        },
        Zero {
            at,
            len,
            how: Zeroing::Trim,
        },
    ];
    // By steps.
    changes.push(Zero {
        at: AREA,
        len: 2 * AREA,
        how: KEEP,
    });
    for how in [DISCARD, KEEP] {
        changes.push(Zero { at, len, how });
        let (at, len) = part;
        changes.push(Zero { at, len, how });
    }
    changes
}

/// The older changes that are held in this way, where the target is in this state.
fn older_changes(held: Held, state: State) -> Vec<Change> {
    let part = (TARGET + 100, 1000);
    // The end of the block before, which is *base*, and the start of the target.
    let two_parts = (TARGET - 500, 1500);
    let of = |(at, len): (u64, u64)| {
        [
            Write { at, len, byte: 1 },
            Zero { at, len, how: KEEP },
            Zero {
                at,
                len,
                how: DISCARD,
            },
        ]
    };
    let whole = (TARGET, BLOCK);
    match (held, state) {
        (Held::AtTheBase, State::Base) => [of(part), of(two_parts)].concat(),
        // What is not in the base is not read, so the block before has to hold it. Zeroes
        // in zeroes have nothing to wait for.
        (Held::AtTheBase, State::Zero) => of(two_parts)[..2].to_vec(),
        (Held::AtTheBase, State::Data) => vec![],
        (Held::ForSpace, State::Data) => [&of(part)[..], &of(whole)[..2]].concat(),
        (Held::ForSpace, _) => [&of(part)[..2], &of(whole)[..2]].concat(),
        (Held::InAStep, _) => vec![Zero {
            at: 10,
            len: 3 * AREA,
            how: KEEP,
        }],
    }
}

#[test]
fn the_newer_change_wins() {
    let mut count = 0;
    for held in [Held::AtTheBase, Held::ForSpace, Held::InAStep] {
        for state in STATES {
            for older in older_changes(held, state) {
                for newer in newer_changes() {
                    let (free, disk, mut expected) = prepared(state);
                    let disk = race(held, disk, older, &|disk| {
                        newer.run(&free, disk).expect("a good change");
                    });
                    older.apply(&mut expected);
                    newer.apply(&mut expected);
                    let what = format!("{held:?}, {state:?}, {older:?}, then {newer:?}");
                    assert!(window(&disk) == expected, "{what}");
                    assert_only_data_is_stored(&disk);
                    count += 1;
                }
            }
        }
    }
    assert!(count > 200, "{count}");
}

/// What was not stored has no place in the order.
#[test]
fn a_newer_change_that_fails_takes_nothing_away() {
    let mut count = 0;
    for held in [Held::AtTheBase, Held::ForSpace, Held::InAStep] {
        for state in STATES {
            for older in older_changes(held, state) {
                for newer in newer_changes() {
                    let (free, disk, mut expected) = prepared(state);
                    let has_failed = Cell::new(false);
                    let disk = race(held, disk, older, &|disk| {
                        disk.store().fail_next(libc::EIO);
                        has_failed.set(newer.run(&free, disk).is_err());
                        *disk.store().fail.lock().expect("no test thread died") = None;
                    });
                    if !has_failed.get() {
                        // It was a change of memory only.
                        continue;
                    }
                    older.apply(&mut expected);
                    let mut both = expected.clone();
                    newer.apply(&mut both);
                    let found = window(&disk);
                    let of_older = |at: &u64| match older {
                        Write { at: start, len, .. } | Zero { at: start, len, .. } => {
                            (start..start + len).contains(at)
                        }
                    };
                    for (at, byte) in (WINDOW.start..).zip(&found) {
                        let place = (at - WINDOW.start) as usize;
                        let is_known =
                            *byte == expected[place] || (!of_older(&at) && *byte == both[place]);
                        assert!(
                            is_known,
                            "{held:?}, {state:?}, {older:?}, then {newer:?}: byte {at}"
                        );
                    }
                    assert_only_data_is_stored(&disk);
                    count += 1;
                }
            }
        }
    }
    assert!(count > 100, "{count} have failed");
}

/// Both read the base; the one that came first may be the last to be stored.
#[test]
fn of_two_that_wait_for_the_base_the_newer_one_wins() {
    let of = |at, len, byte| {
        [
            Write { at, len, byte },
            Zero { at, len, how: KEEP },
            Zero {
                at,
                len,
                how: DISCARD,
            },
        ]
    };
    for older in of(TARGET + 100, 1000, 1) {
        for newer in [of(TARGET + 600, 1000, 2), of(TARGET + 200, 100, 2)].concat() {
            for newer_is_first in [false, true] {
                let (_, disk, mut expected) = prepared(State::Base);
                let bases = [TestBase::new(SIZE), TestBase::new(SIZE)];
                thread::scope(|scope| {
                    let threads = [(older, &bases[0]), (newer, &bases[1])].map(|(change, base)| {
                        base.gate.close();
                        let disk = &disk;
                        let thread = scope.spawn(move || change.run(base, disk));
                        base.gate.wait_for(1);
                        Some(thread)
                    });
                    let mut threads = threads;
                    let order = if newer_is_first { [1, 0] } else { [0, 1] };
                    for number in order {
                        bases[number].gate.open();
                        let thread = threads[number].take().expect("not joined yet");
                        thread.join().expect("no panic").expect("a good change");
                    }
                });
                older.apply(&mut expected);
                newer.apply(&mut expected);
                assert!(
                    window(&disk) == expected,
                    "{older:?}, then {newer:?}, stored first: {newer_is_first}"
                );
                assert_eq!(disk.state_at(TARGET).expect("in range"), State::Data);
            }
        }
    }
}

/// In the store too: what a newer one has stored is not written again.
#[test]
fn what_a_newer_change_has_stored_is_left_out() {
    let (free, disk, _) = prepared(State::Base);
    let (at, len, byte) = (TARGET + 100, 1000, 1);
    let disk = race(Held::AtTheBase, disk, Write { at, len, byte }, &|disk| {
        disk.write(&free, &[2; 100], TARGET + 200)
            .expect("a good write");
    });
    assert_eq!(
        disk.store().calls(),
        [
            Call::Write(TARGET, TARGET + BLOCK),
            Call::Write(TARGET + 100, TARGET + 200),
            Call::Write(TARGET + 300, TARGET + 1100)
        ]
    );
}

/// Areas that are not at hand yet, and those that are done.
#[test]
fn zeroes_that_take_space_hold_nobody_up_for_more_than_a_step() {
    let (free, disk, _) = prepared(State::Base);
    let (at, len, how) = (0, SIZE, KEEP);
    let disk = race(Held::InAStep, disk, Zero { at, len, how }, &|disk| {
        for area in 1..4 {
            disk.write(&free, &[2; 10], area * AREA + 5)
                .expect("a good write");
            disk.zero(&free, area * AREA + BLOCK, BLOCK, Zeroing::Trim)
                .expect("a good trim");
            disk.read(&free, &mut [0; 10], area * AREA + 2 * BLOCK, true)
                .expect("a good read");
        }
    });
    for area in 0..4 {
        let mut bytes = [9; 20];
        disk.read(&free, &mut bytes, area * AREA, false)
            .expect("a good read");
        let expected = if area == 0 { [0; 10] } else { [2; 10] };
        assert_eq!(bytes[5..15], expected);
        assert_eq!(bytes[..5], [0; 5]);
        let state = disk.state_at(area * AREA + BLOCK).expect("in range");
        let trimmed = if area == 0 { State::Data } else { State::Zero };
        assert_eq!(state, trimmed, "the newer trim wins, in area {area}");
    }
    assert_only_data_is_stored(&disk);
}
