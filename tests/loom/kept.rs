//! The overlay that is kept: changes of blocks beside flushes, and flushes beside
//! each other.

mod faults;

use std::path::Path;

use loom::model::Builder;
use loom::sync::Arc;
use loom::thread;

use nbdkit_cow_filter::kept::KeptStore;
use nbdkit_cow_filter::overlay::{Overlay, State, Zeroing};
use nbdkit_cow_filter::qcow2::header::Header;
use nbdkit_cow_filter::qcow2::image::Image;

use super::image_file::{BLOCKS, Handle, layout};
use super::{BLOCK, ModelBase, OF_BASE, SIZE};

struct Kept {
    file: Handle,
    disk: Overlay<KeptStore<Handle>>,
}

fn kept() -> Arc<Kept> {
    let file = Handle::new();
    let layout = layout();
    let mut header = Header::new(layout, b"disk.img".to_vec(), None);
    // As version 1.0 had it: what sets the mark of a run would make the orders too many.
    header.in_use = None;
    let image = Image::create(file.clone(), Path::new("diff.qcow2"), &header).expect("an image");
    let store = KeptStore::new(image, true);
    let disk = Overlay::new(SIZE, layout.block_size(), store);
    Arc::new(Kept { file, disk })
}

impl Kept {
    fn write(&self, number: usize, byte: u8) {
        let block = vec![byte; BLOCK as usize];
        self.disk
            .write(&ModelBase, &block, BLOCKS[number] * BLOCK)
            .expect("a good write");
    }

    /// In place, if the block is *data*.
    fn write_part(&self, number: usize, byte: u8) {
        self.disk
            .write(&ModelBase, &[byte; 10], BLOCKS[number] * BLOCK)
            .expect("a good write");
    }

    /// What a write into a block that is *data* comes to, without the steps before
    /// it, which make the orders too many.
    fn write_in_place(&self, number: usize, byte: u8) {
        let at = layout().data + BLOCKS[number] * BLOCK;
        self.file.put(at..at + 1, byte);
    }

    fn trim(&self, number: usize) {
        self.disk
            .zero(&ModelBase, BLOCKS[number] * BLOCK, BLOCK, Zeroing::Trim)
            .expect("a good trim");
    }

    fn flush(&self) {
        self.disk.flush().expect("a good flush");
    }

    /// What a power loss would leave of a block.
    fn safe(&self, number: usize) -> u8 {
        let tables = self.file.metadata(|metadata| metadata.safe);
        match (tables.has_data(number), tables.has_zeroes(number)) {
            (true, _) => self.file.safe_byte(number),
            (false, true) => 0,
            (false, false) => OF_BASE,
        }
    }

    /// Told at the end: the checker does not survive a panic while other threads of
    /// the model hold something.
    fn mistake(&self, what: String) {
        self.file.metadata(|metadata| metadata.mistake = Some(what));
    }

    fn expect_safe(&self, number: usize, allowed: &[u8]) {
        let found = self.safe(number);
        if !allowed.contains(&found) {
            self.mistake(format!("{number} is {found:x}, none of {allowed:x?}"));
        }
    }

    fn read(&self, number: usize) -> u8 {
        let mut byte = [0xee];
        self.disk
            .read(&ModelBase, &mut byte, BLOCKS[number] * BLOCK, false)
            .expect("a good read");
        byte[0]
    }

    fn expect_no_mistake(&self) {
        assert_eq!(self.file.metadata(|metadata| metadata.mistake.take()), None);
    }

    /// After a last flush the file has what the overlay has.
    fn check_end(&self) {
        self.flush();
        self.expect_no_mistake();
        for (number, block) in BLOCKS.into_iter().enumerate() {
            assert_eq!(self.safe(number), self.read(number), "block {block}");
            let state = self.disk.state_at(block * BLOCK).expect("in range");
            let tables = self.file.metadata(|metadata| metadata.written);
            let is_data = state == State::Data;
            assert_eq!(tables.has_data(number), is_data, "block {block}");
            assert_eq!(tables.refcounts[number], [0, u8::from(is_data)]);
        }
    }
}

type Request = fn(&Kept);

/// Runs `others` in threads of their own beside `main`, in every order that matters.
///
/// With more than one there are too many orders: then only those in which no more
/// than three times in all a thread is stopped that could go on. (Two are enough
/// for the mistakes that `packaging/model-check.sh` puts in.)
fn check(prepare: Request, main: Request, others: &[Request]) {
    let bound = (others.len() > 1).then_some(3);
    check_to(Kept::check_end, bound, prepare, main, others);
}

/// As [`check`], with what is asked at the end, and how often a thread is stopped.
fn check_to(
    end: Request,
    bound: Option<usize>,
    prepare: impl Fn(&Kept) + Send + Sync + 'static,
    main: Request,
    others: &[Request],
) {
    let others = others.to_vec();
    let mut builder = Builder::new();
    builder.preemption_bound = bound;
    builder.check(move || {
        let kept = kept();
        prepare(&kept);
        let threads: Vec<_> = others
            .iter()
            .map(|&request| {
                let kept = Arc::clone(&kept);
                thread::spawn(move || request(&kept))
            })
            .collect();
        main(&kept);
        for thread in threads {
            thread.join().expect("no panic");
        }
        end(&kept);
    });
}

fn nothing(_kept: &Kept) {}

fn flush(kept: &Kept) {
    kept.flush();
}

fn write_and_flush<const NUMBER: usize>(kept: &Kept) {
    kept.write(NUMBER, 1);
    kept.flush();
    kept.expect_safe(NUMBER, &[1]);
}

fn write_data(kept: &Kept) {
    kept.write(0, 9);
}

fn write_data_and_flush(kept: &Kept) {
    write_data(kept);
    kept.flush();
}

#[test]
fn what_was_written_before_a_flush_is_safe_after_it() {
    check(nothing, write_and_flush::<0>, &[flush]);
    check(nothing, flush, &[write_and_flush::<0>]);
    // Stopped as often as with more threads: without a bound it takes minutes.
    let (main, other) = (write_and_flush::<0>, write_and_flush::<1>);
    check_to(Kept::check_end, Some(3), nothing, main, &[other]);
}

/// The second request finds the block in the state that it wants, and marks nothing.
#[test]
fn a_change_that_another_request_has_made_is_safe_after_a_flush() {
    fn write_part_and_flush(kept: &Kept) {
        kept.write_part(0, 2);
        kept.flush();
        kept.expect_safe(0, &[1, 2]);
    }
    fn write(kept: &Kept) {
        kept.write(0, 1);
    }
    for same in [write_and_flush::<0>, write_part_and_flush as Request] {
        check(nothing, same, &[write]);
    }
    check(nothing, write, &[write_and_flush::<0>]);
}

#[test]
fn each_of_many_flushes_covers_what_was_written_before_it() {
    fn write_in_place_and_flush<const NUMBER: usize>(kept: &Kept) {
        kept.write_in_place(NUMBER, 5);
        kept.flush();
        kept.expect_safe(NUMBER, &[5]);
    }
    fn two_blocks(kept: &Kept) {
        kept.write(0, 9);
        kept.write(1, 9);
        kept.flush();
    }
    const OTHERS: &[Request] = &[write_in_place_and_flush::<1>, flush];
    check(two_blocks, write_in_place_and_flush::<0>, OTHERS);
    check(
        two_blocks,
        flush,
        &[write_in_place_and_flush::<0>, write_in_place_and_flush::<1>],
    );
}

/// Three wait for one that is under way, then for the next: each is woken.
#[test]
fn no_flush_waits_for_ever() {
    check(nothing, flush, &[flush, flush, flush]);
}

#[test]
fn a_discard_and_a_rewrite_beside_a_flush() {
    fn discard(kept: &Kept) {
        kept.trim(0);
    }
    fn discard_and_rewrite(kept: &Kept) {
        kept.trim(0);
        kept.write(0, 3);
    }
    fn discard_rewrite_and_flush(kept: &Kept) {
        discard_and_rewrite(kept);
        kept.flush();
        kept.expect_safe(0, &[3]);
    }
    for prepare in [write_data, write_data_and_flush as Request] {
        for change in [
            discard,
            discard_and_rewrite,
            discard_rewrite_and_flush as Request,
        ] {
            check(prepare, change, &[flush]);
            check(prepare, flush, &[change]);
        }
    }
}

#[test]
fn a_discard_beside_a_rewrite_and_its_flush() {
    fn discard(kept: &Kept) {
        kept.trim(0);
    }
    fn rewrite_and_flush(kept: &Kept) {
        kept.write(0, 3);
        kept.flush();
        kept.expect_safe(0, &[0, 3]);
    }
    for prepare in [write_data, write_data_and_flush as Request] {
        check(prepare, discard, &[rewrite_and_flush]);
        check(prepare, rewrite_and_flush, &[discard]);
    }
}
