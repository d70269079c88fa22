//! Flushes beside each other where the file fails one of them, once.

use loom::model::Builder;
use loom::sync::Arc;
use loom::thread;

use super::super::image_file::Step;
use super::{Kept, Request, check_to, kept, nothing};

impl Kept {
    /// A flush that the fault may hit: tells whether it was good. What is asked for
    /// after the fault must be good again, unless a sync has failed: then nothing is.
    fn flush_beside_fault(&self) -> bool {
        let failed_before = self.file.metadata(|metadata| metadata.failed);
        let is_good = self.disk.flush().is_ok();
        if !is_good {
            self.file.metadata(|metadata| metadata.told += 1);
        }
        if failed_before.is_some_and(|step| is_good == (step == Step::Sync)) {
            self.mistake(format!(
                "after a failure of {failed_before:?}, was a flush good: {is_good}"
            ));
        }
        is_good
    }

    fn check_end_after_fault(&self) {
        let (failed, told) = self
            .file
            .metadata(|metadata| (metadata.failed, metadata.told));
        assert_ne!(told, 0, "flushes were told of the failure");
        match failed.expect("the fault has happened") {
            Step::WriteTables => self.check_end(),
            Step::Sync => {
                assert!(!self.flush_beside_fault(), "good after a failed sync");
                self.expect_no_mistake();
            }
        }
    }
}

/// Lets each step of the first flush that has something to write fail in turn.
/// `writes` and `syncs`: how many it has of them.
///
/// Each is a model of its own, so threads are stopped less often than elsewhere (see
/// [`super::check`]).
fn check_faults(
    (writes, syncs): (usize, usize),
    prepare: Request,
    main: Request,
    others: &[Request],
) {
    let writes = (0..writes).map(|before| (Step::WriteTables, before));
    let syncs = (0..syncs).map(|before| (Step::Sync, before));
    for fault in writes.chain(syncs) {
        let prepare = move |kept: &Kept| {
            prepare(kept);
            kept.file.metadata(|metadata| metadata.fault = Some(fault));
        };
        check_to(Kept::check_end_after_fault, Some(2), prepare, main, others);
    }
}

/// The marks of a flush that fails go back beside those of a write.
#[test]
fn what_was_written_before_a_good_flush_is_safe_though_another_fails() {
    fn write_and_flush<const NUMBER: usize>(kept: &Kept) {
        kept.write(NUMBER, 1);
        if kept.flush_beside_fault() {
            kept.expect_safe(NUMBER, &[1]);
        }
    }
    check_faults(
        (2, 2),
        nothing,
        write_and_flush::<0>,
        &[write_and_flush::<1>],
    );
}

#[test]
fn each_of_many_flushes_is_told_what_became_of_what_was_written_before_it() {
    /// Then a flush writes a refcount, the entries, and the other refcount.
    fn write_and_discard(kept: &Kept) {
        kept.write(1, 9);
        kept.flush();
        kept.trim(1);
        kept.write(0, 9);
    }
    fn flush(kept: &Kept) {
        if kept.flush_beside_fault() {
            kept.expect_safe(0, &[9, 5]);
            kept.expect_safe(1, &[0]);
        }
    }
    fn write_in_place_and_flush(kept: &Kept) {
        kept.write_in_place(0, 5);
        if kept.flush_beside_fault() {
            kept.expect_safe(0, &[5]);
            kept.expect_safe(1, &[0]);
        }
    }
    for (main, other) in [
        (write_in_place_and_flush as Request, flush as Request),
        (flush, write_in_place_and_flush),
    ] {
        check_faults((3, 2), write_and_discard, main, &[other, flush]);
    }
}

/// Who waits when a good flush begins is served by that one, if not by one before it,
/// however late he wakes.
#[test]
fn no_flush_is_told_of_the_failure_of_one_after_a_good_one() {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(|| {
        let kept = kept();
        let others = [(); 2].map(|()| {
            let kept = Arc::clone(&kept);
            thread::spawn(move || kept.disk.flush().is_ok())
        });
        kept.flush();
        let waiting = kept.disk.store().image().flushes_waiting();
        kept.flush();
        let fault = Some((Step::WriteTables, 0));
        kept.file.metadata(|metadata| metadata.fault = fault);
        kept.write(0, 1);
        // Another, which came later, may be the one that fails.
        let _ = kept.disk.flush();
        let served = others
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .filter(|&is_good| is_good)
            .count();
        assert!(served >= waiting, "{waiting} waited, {served} were served");
    });
}
