//! A file system that has no space for tables left: who is told, and who suffers.

use nbdkit_cow_filter::overlay::{State, Zeroing};

use super::check::{Qemu, assert_settled};
use super::disk::{DISCARD, Disk, KEEP, Request};
use super::reader::Reader;
use super::recorder::{Fault, Portion, Step};
use super::scripts::SMALL_BLOCKS;
use Request::{Flush, Write, Zero};

const BLOCK: u64 = SMALL_BLOCKS.1;
/// So much of the disk has its tables in one piece.
const GROUP: u64 = 64 * 32 * BLOCK;

fn write(at: u64, byte: u8) -> Request {
    let len = BLOCK;
    Write { at, len, byte }
}

fn errno(disk: &mut Disk, request: &Request) -> Option<i32> {
    disk.request(request).err().map(|error| error.errno())
}

fn state(disk: &Disk, at: u64) -> State {
    disk.overlay.state_at(at).expect("in range")
}

#[test]
fn what_finds_no_space_for_its_tables_is_refused_before_it_can_spoil_a_flush() {
    let mut disk = Disk::new(SMALL_BLOCKS.0, BLOCK);
    disk.run(&[write(9 * GROUP, 1)]);
    disk.recorder.fill_up();
    let no_space = Some(libc::ENOSPC);
    for len in [BLOCK, 3 * GROUP, BLOCK / 2] {
        for how in [DISCARD, KEEP] {
            let at = 0;
            assert_eq!(errno(&mut disk, &Zero { at, len, how }), no_space);
        }
        // A trim may do nothing.
        let how = Zeroing::Trim;
        assert_eq!(errno(&mut disk, &Zero { at: 0, len, how }), None);
    }
    for byte in [0, 7] {
        assert_eq!(errno(&mut disk, &write(0, byte)), no_space);
    }
    assert_eq!(state(&disk, 0), State::Base);
    disk.settle();

    // Where there are tables all goes on.
    disk.run(&[write(9 * GROUP + BLOCK, 2), write(9 * GROUP + 5 * BLOCK, 0)]);
    disk.run(&[Flush]);
    assert_settled(&disk, &Qemu::new(1));
}

/// Each time it is two calls of the file system, which nearly every write goes without.
#[test]
fn space_for_tables_is_taken_once() {
    let mut disk = Disk::new(SMALL_BLOCKS.0, BLOCK);
    let mut taken = 0;
    let last = (SMALL_BLOCKS.0 - 1) / GROUP;
    for group in [0, 1, 63, 64, last] {
        for at in [0, BLOCK, GROUP / 2, 0] {
            let at = group * GROUP + at;
            if at + BLOCK <= SMALL_BLOCKS.0 {
                disk.run(&[write(at, 1)]);
            }
        }
        taken += 2;
        assert_eq!(disk.recorder.reserves(), taken, "group {group}");
    }
    // Of all that lies between two groups at once.
    let (at, len, how) = (0, SMALL_BLOCKS.0, DISCARD);
    disk.run(&[Zero { at, len, how }]);
    let words = last / 64 + 1;
    assert_eq!(disk.recorder.reserves(), taken + 2 * words as usize);
    disk.run(&[write(GROUP * 40, 1), write(GROUP * 100, 1), Flush]);
    assert_eq!(disk.recorder.reserves(), taken + 2 * words as usize);
}

#[test]
fn a_request_for_much_does_what_there_is_space_for() {
    for how in [DISCARD, Zeroing::Trim] {
        let mut disk = Disk::new(SMALL_BLOCKS.0, BLOCK);
        disk.run(&[write(3 * GROUP, 1), write(70 * GROUP, 1)]);
        disk.recorder.fill_up();
        let (at, len) = (0, SMALL_BLOCKS.0);
        let refused = errno(&mut disk, &Zero { at, len, how });
        assert_eq!(refused, (how == DISCARD).then_some(libc::ENOSPC));
        for at in [3 * GROUP, 70 * GROUP] {
            assert_eq!(state(&disk, at), State::Zero, "its space is given back");
        }
        assert_eq!(state(&disk, 0), State::Base);
        disk.settle();
        disk.run(&[Flush]);
        assert_settled(&disk, &Qemu::new(1));
    }
}

#[test]
fn what_is_data_can_be_overwritten_though_tables_can_not_be_given_space() {
    let mut disk = Disk::new(SMALL_BLOCKS.0, BLOCK);
    disk.run(&[write(GROUP, 1), write(GROUP + BLOCK, 1), Flush]);
    disk.request(&Request::Kill).expect("resumable");
    disk.recorder.fill_up();
    let (at, len, how) = (GROUP, BLOCK, KEEP);
    disk.run(&[write(GROUP + BLOCK, 2), Zero { at, len, how }, Flush]);
    assert_settled(&disk, &Qemu::new(1));
}

/// A program that was killed before its flush has left bytes that nobody can read.
#[test]
fn what_a_crash_has_left_makes_room_for_the_rest() {
    for how in [DISCARD, Zeroing::Trim] {
        let mut disk = Disk::new(SMALL_BLOCKS.0, BLOCK);
        let places = [3 * GROUP, 70 * GROUP];
        disk.run(&[write(3 * GROUP, 1), write(70 * GROUP, 1)]);
        disk.request(&Request::Kill).expect("resumable");
        let left = |disk: &Disk, at| {
            let mut bytes = [0; BLOCK as usize];
            let content = disk.recorder.content();
            content.read(&mut bytes, disk.layout().data + at);
            bytes != [0; BLOCK as usize]
        };
        assert!(places.iter().all(|at| left(&disk, *at)));
        disk.recorder.fill_up();
        let (at, len) = (0, SMALL_BLOCKS.0);
        let refused = errno(&mut disk, &Zero { at, len, how });
        assert_eq!(refused, (how == DISCARD).then_some(libc::ENOSPC));
        assert!(!places.iter().any(|at| left(&disk, *at)));
        disk.settle();
        disk.run(&[Flush]);
        assert_settled(&disk, &Qemu::new(1));
    }
}

/// What the image had when it was opened has tables, but they can be shared with a copy
/// of the file, and then they do need space when they are written.
#[test]
fn a_discard_that_can_not_be_flushed_keeps_nothing_else_from_being_safe() {
    let (shared, own) = (GROUP, 0);
    let mut disk = Disk::new(SMALL_BLOCKS.0, BLOCK);
    disk.run(&[write(shared, 1), Flush]);
    disk.request(&Request::Kill).expect("resumable");
    disk.run(&[write(own, 2)]);
    disk.recorder.fill_up();
    assert_eq!(
        errno(&mut disk, &write(shared + BLOCK, 2)),
        Some(libc::ENOSPC)
    );
    disk.settle();
    let how = DISCARD;
    let (at, len) = (shared, BLOCK);
    disk.run(&[Zero { at, len, how }]);
    assert_eq!(state(&disk, shared), State::Zero);

    let one = [Step::Write, Step::Sync, Step::Write, Step::WriteSynced];
    let first = disk.recorder.step_count();
    disk.recorder.fail(Some(Fault {
        // After the flush of `own`: a sync, and the entry of `shared`.
        at: first + one.len() + 1,
        errno: libc::ENOSPC,
        portion: Portion::Nothing,
        stays: true,
    }));
    assert_eq!(errno(&mut disk, &Flush), Some(libc::ENOSPC));
    let expected = [&one[..], &[Step::Sync, Step::Write]].concat();
    assert_eq!(disk.recorder.steps(first), expected);
    let content = disk.recorder.content();
    let reader = Reader::open(&content).expect("an image");
    let sector = reader.sector(own / 512).expect("the overlay has it");
    assert_eq!(sector, [2; 512]);

    disk.recorder.fail(None);
    disk.run(&[Flush]);
    assert_settled(&disk, &Qemu::new(1));
}
