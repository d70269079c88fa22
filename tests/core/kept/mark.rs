//! The mark of a run: safe before anything else changes, and taken away last.

use std::sync::Arc;
use std::thread;

use nbdkit_cow_filter::error::Result;
use nbdkit_cow_filter::overlay::Zeroing;

use super::check::{Qemu, check_with};
use super::content::Content;
use super::crash::Bound;
use super::disk::{Disk, Request, resume, sector};
use super::random::Random;
use super::recorder::{Fault, Hold, Portion, Recorder, Step};
use super::scripts::{SMALL_BLOCKS, by_hand};
use crate::disk::{TestBase, tempt};
use Request::{CopyingRead, Flush, Kill, Write, Zero};

const BLOCK: u64 = SMALL_BLOCKS.1;
/// So much of the disk has its tables in one piece.
const GROUP: u64 = 64 * 32 * BLOCK;
/// Behind the header, the extension that names the format of the base, the kind and the
/// length of ours, and 32 bytes of it.
const MARK_AT: u64 = 112 + 16 + 8 + 32;

const FEW: Bound = Bound {
    all_of: 4,
    combinations: 8,
    every: 1,
};

fn disk() -> Disk {
    Disk::new(SMALL_BLOCKS.0, BLOCK)
}

fn is_marked(content: &Content) -> bool {
    content.bytes(MARK_AT..MARK_AT + 4) == [0, 0, 0, 1]
}

fn is_same(a: &Content, b: &Content) -> bool {
    a.size == b.size && a.present(0..a.size).eq(b.present(0..b.size))
}

/// The run comes to its end as nbdkit does, and another goes on with the file.
fn end(disk: &mut Disk) {
    disk.run(&[Flush]);
    disk.overlay.store().image().end_run().expect("a clean end");
    disk.run(&[Kill]);
}

/// Looks at every file that a crash could leave. How many have no mark, and how many do.
fn look(disk: &Disk, mut each_without: impl FnMut(&Content)) -> [usize; 2] {
    let mut counts = [0, 0];
    let mut qemu = Qemu::new(20);
    check_with(
        disk,
        FEW,
        &mut Random::new(7),
        &mut qemu,
        |_| 0,
        &mut |content, _| {
            let is_marked = is_marked(content);
            counts[usize::from(is_marked)] += 1;
            if !is_marked {
                each_without(content);
            }
        },
    );
    counts
}

#[test]
fn a_crash_leaves_a_file_with_the_mark_or_one_that_has_not_changed() {
    for (name, script) in by_hand(SMALL_BLOCKS) {
        let mut disk = disk();
        disk.run(&script);
        let [_, marked] = look(&disk, |content| {
            assert!(is_same(content, &disk.start), "{name}: changed, no mark");
        });
        assert!(marked > 0, "{name}");
    }
}

/// What is *data* needs no space for its tables when it is changed in place, and leaks no
/// request.
#[test]
fn whatever_changes_the_file_first_sets_the_mark() {
    let at = GROUP + 2 * BLOCK;
    let len = BLOCK;
    let zero = |how| Zero { at, len, how };
    let fast = |may_trim| Zeroing::Zero {
        may_trim,
        fast: true,
    };
    for first in [
        vec![Write {
            at: at + 9,
            len: 7,
            byte: 3,
        }],
        vec![Write { at, len, byte: 0 }],
        vec![Write {
            at: 9 * GROUP,
            len,
            byte: 0,
        }],
        vec![zero(Zeroing::Trim)],
        vec![zero(fast(true))],
        vec![zero(fast(false))],
        vec![CopyingRead {
            at: 5 * GROUP,
            len: 20,
        }],
    ] {
        let mut disk = disk();
        disk.run(&[Write { at, len, byte: 1 }]);
        end(&mut disk);
        assert!(!is_marked(&disk.recorder.content()));
        let count = disk.recorder.step_count();
        disk.run(&first);
        disk.run(&[Flush]);
        let steps = disk.recorder.steps(count);
        assert_eq!(steps.first(), Some(&Step::Mark), "{first:?}: {steps:?}");
        let marks = steps.iter().filter(|step| **step == Step::Mark);
        assert_eq!(marks.count(), 1, "{first:?}: {steps:?}");
    }
}

#[test]
fn a_run_that_changes_nothing_sets_no_mark() {
    let disk = disk();
    disk.overlay.flush().expect("a good flush");
    let mut bytes = [0; 100];
    disk.overlay
        .read(&disk.base, &mut bytes, 50, false)
        .expect("a good read");
    let image = disk.overlay.store().image();
    image.end_run().expect("a clean end");
    assert_eq!(disk.recorder.steps(0), [Step::Sync]);
}

#[test]
fn nothing_changes_while_another_sets_the_mark() {
    let disk = disk();
    let write = |at| {
        let overlay = Arc::clone(&disk.overlay);
        move || overlay.write(&TestBase::new(SMALL_BLOCKS.0), &[1; BLOCK as usize], at)
    };
    disk.recorder.hold(Hold::Before(0));
    thread::scope(|scope| {
        let first = scope.spawn(write(0));
        disk.recorder.gate().wait_for(1);
        // One in the same group, one in another.
        let others = [BLOCK, 9 * GROUP].map(|at| tempt(scope, write(at)));
        let steps = disk.recorder.steps(0);
        let content = disk.recorder.content();
        disk.recorder.gate().open();
        assert_eq!(steps, [Step::Mark]);
        assert!(is_same(&content, &disk.start));
        first.join().expect("no panic").expect("a good write");
        for other in others {
            other.join().expect("no panic").expect("a good write");
        }
    });
    let write = Step::Write;
    assert_eq!(disk.recorder.steps(0), [Step::Mark, write, write, write]);
}

#[test]
fn a_mark_that_can_not_be_set_fails_the_request_and_nothing_has_changed() {
    for portion in [Portion::Nothing, Portion::All] {
        let mut disk = disk();
        disk.recorder.fail(Some(Fault {
            at: 0,
            errno: libc::EIO,
            portion,
            stays: false,
        }));
        let write = Write {
            at: 0,
            len: BLOCK,
            byte: 1,
        };
        let failed: Result<()> = disk.request(&write);
        assert_eq!(failed.map_err(|e| e.errno()), Err(libc::EIO));
        let in_data = disk.layout().data..disk.layout().end;
        assert_eq!(disk.recorder.content().present(in_data).count(), 0);
        disk.settle();
        disk.run(&[write, Flush]);
        assert_eq!(disk.recorder.steps(0)[..2], [Step::Mark, Step::Mark]);
        disk.assert_as_model();
        look(&disk, |content| assert!(is_same(content, &disk.start)));
    }
}

/// What a flush has left unsynced, a refcount at most, is of no harm.
#[test]
fn a_clean_end_takes_the_mark_away_when_all_else_is_safe() {
    for (name, script) in by_hand(SMALL_BLOCKS) {
        let mut disk = disk();
        disk.run(&script);
        end(&mut disk);
        assert_eq!(disk.recorder.steps(0).last(), Some(&Step::Mark));
        assert!(!is_marked(&disk.recorder.content()), "{name}");
        let mut ended = 0;
        look(&disk, |content| {
            if is_same(content, &disk.start) {
                return;
            }
            ended += 1;
            let recorder = Recorder::holding(content.clone());
            let again = resume(&recorder).expect("resumable");
            for (number, expected) in &disk.model {
                let found = sector(&disk.base, &again, *number);
                assert!(found == **expected, "{name}: sector {number} was lost");
            }
        });
        assert!(ended > 0, "{name}");
    }
}

/// The next one that opens it finds out what is there: until then it is not known.
#[test]
fn a_mark_that_was_left_is_not_set_again_and_goes_with_a_clean_end() {
    let mut disk = disk();
    let write = Write {
        at: 0,
        len: BLOCK,
        byte: 1,
    };
    disk.run(&[write.clone(), Kill]);
    assert!(is_marked(&disk.recorder.content()));
    let count = disk.recorder.step_count();
    disk.run(&[write, Flush]);
    assert!(!disk.recorder.steps(count).contains(&Step::Mark));
    end(&mut disk);
    assert!(!is_marked(&disk.recorder.content()));
}
