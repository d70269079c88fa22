//! Flushes beside others: which requests a flush is good for, and how many rounds of
//! syncs they take. The one under way is held at each of its steps in turn.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nbdkit_cow_filter::error::Result;
use nbdkit_cow_filter::qcow2::image::Image;
use nbdkit_cow_filter::qcow2::layout::GuestCluster;

use super::check::{Qemu, assert_settled, check_all};
use super::crash::Bound;
use super::disk::{DISCARD, Disk, KEEP, Request, flush, new_image};
use super::random::Random;
use super::reader::Reader;
use super::recorder::{Fault, Hold, Portion, Recorder, Step};
use super::scripts::SMALL_BLOCKS;
use crate::disk::{Gate, TEMPTATION};
use Request::{Flush, Write, Zero};

const BLOCK: u64 = SMALL_BLOCKS.1;
const CLUSTER: u64 = 32 * BLOCK;

/// Returns once `is_so`: the interleaving that a test is about has happened then.
fn wait_until(is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        let is_patient = start.elapsed() < Duration::from_secs(20);
        assert!(is_patient, "it does not come to wait");
        thread::yield_now();
    }
}

fn write(at: u64, len: u64, byte: u8) -> Request {
    Write { at, len, byte }
}

fn zero(at: u64, len: u64) -> Request {
    let how = DISCARD;
    Zero { at, len, how }
}

/// Begins a flush and holds it at `hold`; then `meanwhile`; then `count` flushes more,
/// which are all asked for before the first goes on. The outcome of each.
fn flush_beside(
    disk: &mut Disk,
    hold: Hold,
    count: usize,
    meanwhile: impl FnOnce(&mut Disk),
) -> (Result<()>, Vec<Result<()>>) {
    let (overlay, recorder) = (Arc::clone(&disk.overlay), disk.recorder.clone());
    recorder.hold(hold);
    thread::scope(|scope| {
        let first = scope.spawn(|| flush(&overlay, &recorder));
        recorder.gate().wait_for(1);
        meanwhile(disk);
        let others: Vec<_> = (0..count)
            .map(|_| scope.spawn(|| flush(&overlay, &recorder)))
            .collect();
        wait_until(|| overlay.store().image().flushes_waiting() == count);
        recorder.gate().assert_waiting(1);
        recorder.gate().open();
        let first = first.join().expect("no panic");
        let others = others.into_iter().map(|other| other.join());
        (
            first,
            others.map(|other| other.expect("no panic")).collect(),
        )
    })
}

#[test]
fn flushes_that_are_asked_for_while_one_is_under_way_share_the_next() {
    let mut disk = Disk::new(SMALL_BLOCKS.0, BLOCK);
    disk.run(&[write(0, BLOCK, 1)]);
    let one = [Step::Write, Step::Sync, Step::Write, Step::WriteSynced];
    let (first, others) = flush_beside(&mut disk, Hold::Before(3), 8, |disk| {
        disk.run(&[write(CLUSTER, BLOCK, 2)]);
    });
    first.expect("no fault");
    for other in others {
        other.expect("no fault");
    }
    let (write, rest) = ([Step::Write], [Step::Sync, Step::Write, Step::WriteSynced]);
    // The mark, the first write, one flush up to its sync, the second write, the rest of
    // it, and one flush more.
    let mark = [Step::Mark];
    let expected = [&mark[..], &write, &one[..2], &write, &rest[1..], &one].concat();
    assert_eq!(disk.recorder.steps(0), expected);
    let mut qemu = Qemu::new(100);
    assert_settled(&disk, &qemu);
    check_all(&disk, SOME, &mut Random::new(1), &mut qemu);
}

#[test]
fn those_who_share_a_flush_are_told_of_its_failure_and_no_others() {
    for (failing, first_fails) in [(5, true), (7, false)] {
        let mut disk = Disk::new(SMALL_BLOCKS.0, BLOCK);
        disk.run(&[write(0, BLOCK, 1)]);
        disk.recorder.fail(Some(Fault {
            at: failing,
            errno: libc::ENOSPC,
            portion: Portion::Nothing,
            stays: false,
        }));
        let (first, others) = flush_beside(&mut disk, Hold::Before(3), 5, |disk| {
            disk.run(&[write(CLUSTER, BLOCK, 2)]);
        });
        let errno = |done: Result<()>| done.err().map(|error| error.errno());
        let failed = Some(libc::ENOSPC);
        assert_eq!(errno(first), failed.filter(|_| first_fails));
        for other in others {
            assert_eq!(errno(other), failed.filter(|_| !first_fails));
        }
        disk.run(&[Flush]);
        let mut qemu = Qemu::new(100);
        assert_settled(&disk, &qemu);
        check_all(&disk, SOME, &mut Random::new(2), &mut qemu);
    }
}

/// A request that finds its block in the state that it wants does not mark it. So a
/// change that others can see and that is not marked yet must not be passed by.
#[test]
fn a_flush_waits_for_a_change_that_is_being_made() {
    let recorder = Recorder::holding(new_image(SMALL_BLOCKS.0, BLOCK));
    let (image, _) = Image::open(recorder.clone(), Path::new("kept")).expect("an image");
    image.load(|_, _| Ok(())).expect("an empty image");
    let word = AtomicU64::new(0);
    let gate = Gate::default();
    gate.close();
    thread::scope(|scope| {
        let change = scope.spawn(|| {
            image.publish(GuestCluster(0)..GuestCluster(1), || {
                word.store(1, Ordering::SeqCst);
                gate.pass();
                Ok(true)
            })
        });
        gate.wait_for(1);
        let sizes = recorder.sizes();
        let flush = scope.spawn(|| image.flush(&|_| word.load(Ordering::SeqCst)));
        // It asks for the size when it has the image to itself, right before it fetches
        // the marks: what it can wait for after that is their locks.
        wait_until(|| recorder.sizes() > sizes);
        thread::sleep(TEMPTATION);
        let waits = !flush.is_finished();
        gate.open();
        assert!(waits, "a flush did not wait");
        change.join().expect("no panic").expect("a good change");
        flush.join().expect("no panic").expect("a good flush");
    });
    let content = recorder.content();
    let blocks: Vec<u64> = Reader::open(&content)
        .expect("ours")
        .subclusters()
        .collect();
    assert_eq!(blocks, [0]);
}

const SOME: Bound = Bound {
    all_of: 3,
    combinations: 6,
    every: 1,
};

/// What is flushed, and what there is to flush: new clusters and some that are given
/// up. In one piece of the tables, and in several.
fn starts() -> [[Vec<Request>; 2]; 2] {
    let one = [
        vec![write(0, 4 * BLOCK, 1), write(CLUSTER, 4 * BLOCK, 1), Flush],
        vec![
            zero(CLUSTER, 4 * BLOCK),
            write(4 * BLOCK, BLOCK, 2),
            write(2 * CLUSTER, 2 * BLOCK, 2),
        ],
    ];
    let far = 70 * CLUSTER;
    let several = [
        [one[0].clone(), vec![write(far, BLOCK, 1), Flush]].concat(),
        [one[1].clone(), vec![zero(far, BLOCK), write(2 * far, 9, 2)]].concat(),
    ];
    [one, several]
}

/// Requests that come in between.
fn meanwhile() -> Vec<Vec<Request>> {
    let keep = |at, len| Zero { at, len, how: KEEP };
    vec![
        vec![write(6 * BLOCK, BLOCK, 9)],
        vec![write(3 * CLUSTER, BLOCK, 9)],
        // In place: what was flushed, what is being flushed.
        vec![write(BLOCK + 5, 20, 9)],
        vec![write(2 * CLUSTER, 2 * BLOCK, 9)],
        // Discards of what was flushed, and of what is being flushed.
        vec![zero(0, 2 * BLOCK)],
        vec![zero(0, 8 * BLOCK)],
        vec![zero(2 * CLUSTER, 2 * BLOCK)],
        vec![keep(2 * CLUSTER, 4 * BLOCK)],
        // New data where a discard is being flushed, or has just been.
        vec![write(CLUSTER, BLOCK, 9)],
        vec![write(CLUSTER + BLOCK + 9, 7, 9)],
        vec![zero(2 * CLUSTER, 2 * BLOCK), write(2 * CLUSTER + 9, 7, 9)],
        vec![write(CLUSTER, BLOCK, 9), zero(CLUSTER, BLOCK)],
    ]
}

#[test]
fn a_flush_is_good_for_all_that_was_answered_before_it_wherever_an_older_one_is() {
    let mut qemu = Qemu::new(400);
    let mut random = Random::new(3);
    for [flushed, dirty] in starts() {
        let begin = || {
            let mut disk = Disk::new(SMALL_BLOCKS.0, BLOCK);
            disk.run(&flushed);
            disk.run(&dirty);
            disk
        };
        let mut dry = begin();
        let first = dry.recorder.step_count();
        dry.run(&[Flush]);
        let steps = dry.recorder.steps(first);
        // Refcounts, data, entries, again to be safe, refcounts.
        let is_sync = |step: &Step| matches!(step, Step::Sync | Step::WriteSynced);
        assert_eq!(steps.iter().filter(|step| is_sync(step)).count(), 2);
        assert_eq!((steps[0], steps.last()), (Step::Write, Some(&Step::Write)));
        for number in first..first + steps.len() {
            for requests in meanwhile() {
                for hold in [Hold::Before(number), Hold::After(number)] {
                    let mut disk = begin();
                    let (first, others) =
                        flush_beside(&mut disk, hold, 1, |disk| disk.run(&requests));
                    first.expect("no fault");
                    for other in others {
                        other.expect("no fault");
                    }
                    assert_settled(&disk, &qemu);
                    check_all(&disk, LAST, &mut random, &mut qemu);
                }
            }
        }
    }
}

/// Little of what comes before the flushes, and something of what comes after them.
const LAST: Bound = Bound {
    all_of: 1,
    combinations: 2,
    every: 2,
};
