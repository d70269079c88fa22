//! Every step fails once, or it and all after it.

use nbdkit_cow_filter::error::Result;
use nbdkit_cow_filter::overlay::State;
use nbdkit_cow_filter::qcow2::file::ImageFile;
use nbdkit_cow_filter::qcow2::layout::GuestCluster;

use super::check::{Qemu, assert_settled, check_all};
use super::crash::Bound;
use super::disk::{DISCARD, Disk, Request, layout, new_image, resume};
use super::random::Random;
use super::reader::Reader;
use super::recorder::{Fault, Portion, Recorder, Step};
use super::scripts::{SMALL_BLOCKS, by_hand};
use crate::disk::TestBase;

/// There are many runs, so few files of each.
const FEW: Bound = Bound {
    all_of: 1,
    combinations: 2,
    every: 4,
};

fn is_sync(step: Step) -> bool {
    matches!(step, Step::Sync | Step::WriteSynced)
}

/// What a run with a fault came to.
struct Ended {
    disk: Disk,
    failed: Vec<(Request, i32)>,
    /// The step that failed first.
    step: Step,
}

/// Runs all of `script`, whatever fails, and one flush more.
fn run_with(script: &[Request], fault: Fault) -> Ended {
    let mut disk = Disk::new(SMALL_BLOCKS.0, SMALL_BLOCKS.1);
    disk.recorder.fail(Some(fault));
    let mut failed = Vec::new();
    for request in script.iter().chain([&Request::Flush]) {
        let done: Result<()> = disk.request(request);
        if let Err(error) = done {
            failed.push((request.clone(), error.errno()));
            // Reads go on, whatever has failed.
            disk.settle();
        }
    }
    let step = disk.recorder.steps(fault.at)[0];
    Ended { disk, failed, step }
}

/// The scripts, and how many steps each takes. Without a new process, which would know
/// nothing of the fault, and without reads, which don't fail with what they save.
fn scripts() -> Vec<(&'static str, Vec<Request>, usize)> {
    let mut scripts = by_hand(SMALL_BLOCKS);
    let is_left_out =
        |request: &Request| matches!(request, Request::Kill | Request::CopyingRead { .. });
    scripts.retain(|(_, script)| !script.iter().any(is_left_out));
    let counted = scripts.into_iter().map(|(name, script)| {
        let mut disk = Disk::new(SMALL_BLOCKS.0, SMALL_BLOCKS.1);
        disk.run(&script);
        (name, script, disk.recorder.step_count())
    });
    counted.collect()
}

#[test]
fn a_step_that_fails_once_is_told_and_a_later_flush_makes_up_for_it() {
    let mut random = Random::new(1);
    let mut qemu = Qemu::new(600);
    let mut syncs = 0;
    for (name, script, steps) in scripts() {
        for at in 0..steps {
            for (errno, portion) in [
                (libc::ENOSPC, Portion::Nothing),
                (libc::ENOSPC, Portion::Half),
                (libc::EIO, Portion::All),
            ] {
                let stays = false;
                let fault = Fault {
                    at,
                    errno,
                    portion,
                    stays,
                };
                let Ended { disk, failed, step } = run_with(&script, fault);
                let told = format!("{name}: {fault:?}, {step:?}: {failed:?}");
                // A hole is punched when the client has its answer. Its error may be that
                // of an earlier write, so flushes tell of it.
                let is_untold = step == Step::Punch && errno == libc::EIO;
                if is_sync(step) || is_untold {
                    syncs += usize::from(!is_untold);
                    assert!(failed.len() > usize::from(!is_untold), "{told}");
                    let is_flush = |request: &Request| matches!(request, Request::Flush);
                    let are_flushes = failed
                        .iter()
                        .all(|(request, errno)| is_flush(request) && *errno == libc::EIO);
                    assert!(are_flushes, "{told}");
                    let first = script
                        .iter()
                        .chain([&Request::Flush])
                        .filter(|r| is_flush(r));
                    let good = disk.recorder.flushes();
                    assert_eq!(good + failed.len(), first.count(), "{told}");
                } else {
                    let expected = usize::from(step != Step::Punch);
                    assert_eq!(failed.len(), expected, "{told}");
                    assert!(failed.iter().all(|(_, told)| *told == errno), "{told}");
                    assert_settled(&disk, &qemu);
                }
                check_all(&disk, FEW, &mut random, &mut qemu);
            }
        }
    }
    assert!(syncs > 0 && qemu.shown > 0);
}

#[test]
fn after_all_has_stopped_nothing_is_claimed_and_the_next_process_goes_on() {
    let mut random = Random::new(2);
    let mut qemu = Qemu::new(300);
    for (name, script, steps) in scripts() {
        for at in 0..steps {
            let fault = Fault {
                at,
                errno: libc::EIO,
                portion: Portion::Half,
                stays: true,
            };
            let mut ended = run_with(&script, fault);
            let last = ended
                .failed
                .last()
                .map(|(request, errno)| (request, *errno));
            assert!(
                matches!(last, Some((Request::Flush, libc::EIO))),
                "{name}, from step {at}"
            );
            ended.disk.recorder.fail(None);
            ended.disk.run(&[Request::Kill, Request::Flush]);
            assert_settled(&ended.disk, &qemu);
            check_all(&ended.disk, FEW, &mut random, &mut qemu);
        }
    }
}

/// A refcount of 0 that was told to have failed, and is in the file nevertheless,
/// must not be taken for the 1 that was there.
#[test]
fn a_cluster_whose_refcount_is_not_known_is_counted_before_it_is_used() {
    let (size, block) = SMALL_BLOCKS;
    let cluster = 32 * block;
    let write = |n: u64| Request::Write {
        at: n * cluster,
        len: block,
        byte: 1,
    };
    for portion in [Portion::Nothing, Portion::Half, Portion::All] {
        let mut disk = Disk::new(size, block);
        disk.run(&(0..16).map(write).collect::<Vec<_>>());
        disk.run(&[Request::Flush]);
        let discard = Request::Zero {
            at: 0,
            len: 16 * cluster,
            how: DISCARD,
        };
        disk.run(&[discard]);
        let before = disk.recorder.step_count();
        disk.recorder.fail(Some(Fault {
            // Sync, entries, entries, refcounts.
            at: before + 3,
            errno: libc::ENOSPC,
            portion,
            stays: false,
        }));
        disk.request(&Request::Flush).expect_err("no space");
        let steps = [Step::Sync, Step::Write, Step::WriteSynced, Step::Write];
        assert_eq!(disk.recorder.steps(before), steps);
        disk.run(&(0..8).map(write).collect::<Vec<_>>());
        disk.run(&[Request::Flush]);
        let mut qemu = Qemu::new(10);
        assert_settled(&disk, &qemu);
        check_all(&disk, FEW, &mut Random::new(3), &mut qemu);
    }
}

/// A flush takes so many clusters at once and no more; one that fails in the middle
/// of them has made the first safe.
#[test]
fn a_flush_of_many_clusters_that_fails_half_way_is_finished_by_the_next() {
    let (size, block) = ((17 << 30) + 512, 512);
    let base = TestBase::new(size);
    let recorder = Recorder::holding(new_image(size, block));
    let overlay = resume(&recorder).expect("resumable");
    overlay.zero(&base, 0, size, DISCARD).expect("a good zero");
    let one = [Step::Sync, Step::Write, Step::WriteSynced];
    let before = recorder.step_count();
    recorder.fail(Some(Fault {
        at: before + 4,
        errno: libc::ENOSPC,
        portion: Portion::Half,
        stays: false,
    }));
    let error = overlay.flush().expect_err("no space");
    assert_eq!(error.errno(), libc::ENOSPC);
    assert_eq!(recorder.steps(before), [&one[..], &one[..2]].concat());
    overlay.flush().expect("there is space again");
    // Only what is missing.
    assert_eq!(recorder.steps(before + 5), one);
    let again = resume(&Recorder::holding(recorder.content())).expect("resumable");
    for at in [0, 16 << 30, size - 1] {
        assert_eq!(again.state_at(at).expect("in range"), State::Zero, "{at}");
    }
    let content = recorder.content();
    let reader = Reader::open(&content).expect("an image");
    assert_eq!(reader.check(), Default::default());
    assert_eq!(reader.subclusters().count() as u64, size / block);
}

/// The bytes of a block that no flush has told of are in the file all the same, and
/// nothing in the image says so.
#[test]
fn what_a_crash_left_behind_gives_its_space_back_when_it_is_discarded() {
    let (size, block) = (4 << 20, 4096);
    let base = TestBase::new(size);
    let recorder = Recorder::holding(new_image(size, block));
    let overlay = resume(&recorder).expect("resumable");
    overlay.write(&base, &[7; 4096], block).expect("a write");
    let crashed = Recorder::holding(recorder.content());
    let overlay = resume(&crashed).expect("resumable");
    assert_eq!(overlay.state_at(block).expect("in range"), State::Base);
    overlay.zero(&base, 0, size, DISCARD).expect("a discard");
    // In pieces of 1 MiB at most.
    let steps = crashed.steps(0);
    assert!(steps.len() >= 4, "{steps:?}");
    assert!(steps.iter().all(|step| *step == Step::Punch), "{steps:?}");
}

/// So that it can be done where there is no space; and after a sync, because the entry
/// that led there may be gone from memory only.
#[test]
fn a_leak_is_given_up_without_another_entry() {
    let recorder = Recorder::holding(new_image(4 << 20, 4096));
    let refcount = layout(4 << 20, 4096).refcount_at(GuestCluster(3));
    recorder.write_at(&[0, 1], refcount).expect("a leak");
    let crashed = Recorder::holding(recorder.content());
    let overlay = resume(&crashed).expect("resumable");
    overlay.flush().expect("a good flush");
    let expected = [Step::Sync, Step::Mark, Step::Write, Step::Sync];
    assert_eq!(crashed.steps(0), expected);
    let content = crashed.content();
    let reader = Reader::open(&content).expect("an image");
    assert_eq!(reader.check(), Default::default());
    // That it fails is nobody's loss.
    let crashed = Recorder::holding(recorder.content());
    let overlay = resume(&crashed).expect("resumable");
    crashed.fail(Some(Fault {
        at: 2,
        errno: libc::ENOSPC,
        portion: Portion::Nothing,
        stays: false,
    }));
    overlay.flush().expect("a good flush");
    assert_eq!(crashed.steps(0), expected);
}
