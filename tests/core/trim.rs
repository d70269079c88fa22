//! Trims and zeroes: what becomes of parts of blocks, and when a block's space comes back.

use nbdkit_cow_filter::block::ByteRange;
use nbdkit_cow_filter::overlay::{Overlay, State, Zeroing};

use crate::disk::{
    BLOCK, Call, TestBase, TestStore, assert_only_data_is_stored, block_size, read_all, test_disk,
};

const SIZE: u64 = 4 * BLOCK + 1000;

const DISCARD: Zeroing = Zeroing::Zero {
    may_trim: true,
    fast: false,
};

fn whole_base() -> Vec<u8> {
    let (start, end) = (0, SIZE);
    TestBase::new(SIZE).bytes(ByteRange { start, end })
}

fn state(disk: &Overlay<TestStore>, at: u64) -> State {
    disk.state_at(at).expect("in range")
}

#[test]
fn a_trim_of_parts_of_blocks_of_the_base_does_nothing() {
    let (base, disk) = test_disk(SIZE);
    for (offset, len) in [
        (0, 1),
        (BLOCK - 100, 200),
        (BLOCK + 1, BLOCK - 1),
        (4 * BLOCK + 5, 995),
        (4 * BLOCK, 999),
    ] {
        disk.zero(&base, offset, len, Zeroing::Trim)
            .expect("a good trim");
    }
    assert!(disk.is_untouched());
    assert_eq!(base.read_calls(), []);
    assert_eq!(disk.store().calls(), []);
    // Whole blocks become zeroes, the short one at the end too.
    disk.zero(&base, BLOCK - 100, SIZE - BLOCK + 100, Zeroing::Trim)
        .expect("a good trim");
    assert_eq!(base.read_calls(), []);
    let mut expected = whole_base();
    expected[BLOCK as usize..].fill(0);
    assert!(read_all(&base, &disk) == expected);
}

#[test]
fn a_trim_of_parts_of_data_makes_zeroes_of_them() {
    let (base, disk) = test_disk(SIZE);
    disk.write(&base, &[7; 2 * BLOCK as usize], BLOCK)
        .expect("a good write");
    disk.zero(&base, 2 * BLOCK - 5, 10, Zeroing::Trim)
        .expect("a good trim");
    let mut expected = whole_base();
    expected[BLOCK as usize..3 * BLOCK as usize].fill(7);
    expected[2 * BLOCK as usize - 5..][..10].fill(0);
    assert!(read_all(&base, &disk) == expected);
    // They keep their space.
    assert_only_data_is_stored(&disk);
    assert_eq!(state(&disk, BLOCK), State::Data);
    assert_eq!(state(&disk, 2 * BLOCK), State::Data);
}

/// Zeroes were asked for, not a trim: they must be there.
#[test]
fn zeroes_in_parts_of_blocks_of_the_base_are_stored() {
    let (base, disk) = test_disk(SIZE);
    disk.zero(&base, BLOCK - 5, 10, DISCARD)
        .expect("a good zero");
    let mut expected = whole_base();
    expected[BLOCK as usize - 5..][..10].fill(0);
    assert!(read_all(&base, &disk) == expected);
    assert_eq!(state(&disk, 0), State::Data);
}

#[test]
fn a_block_that_is_trimmed_piece_by_piece_is_freed() {
    for block in [512, 4096, 65536] {
        for how in [Zeroing::Trim, DISCARD] {
            let size = 4 * block + 100;
            let base = TestBase::new(size);
            let disk = Overlay::new(size, block_size(block), TestStore::default());
            disk.write(&base, &vec![7; size as usize], 0)
                .expect("a good write");
            // In pieces of which some lie in two blocks, and from the end.
            let piece = block / 8 + 3;
            for at in (0..size)
                .step_by(piece as usize)
                .collect::<Vec<_>>()
                .iter()
                .rev()
            {
                assert_eq!(state(&disk, 0), State::Data, "{block}, {how:?}");
                disk.zero(&base, *at, piece.min(size - at), how)
                    .expect("a good zero");
                assert_only_data_is_stored(&disk);
            }
            assert!(disk.store().stored().is_empty(), "{block}, {how:?}");
            for at in (0..size).step_by(block as usize) {
                assert_eq!(state(&disk, at), State::Zero, "{block}, {how:?}");
            }
            assert!(read_all(&base, &disk).iter().all(|byte| *byte == 0));
        }
    }
}

#[test]
fn a_block_with_a_byte_in_it_is_not_freed() {
    let (base, disk) = test_disk(SIZE);
    disk.write(&base, &[7; BLOCK as usize], BLOCK)
        .expect("a good write");
    disk.zero(&base, BLOCK, BLOCK - 1, Zeroing::Trim)
        .expect("a good trim");
    assert_eq!(state(&disk, BLOCK), State::Data);
    // Zeroes whose client wants their space are not freed by themselves.
    let keep = Zeroing::Zero {
        may_trim: false,
        fast: false,
    };
    disk.zero(&base, 2 * BLOCK - 1, 1, keep)
        .expect("a good zero");
    assert_eq!(state(&disk, BLOCK), State::Data);
    disk.zero(&base, BLOCK + 9, 1, Zeroing::Trim)
        .expect("a good trim");
    assert_eq!(state(&disk, BLOCK), State::Zero);
    assert!(disk.store().stored().is_empty());
}

/// It would take too long.
#[test]
fn a_large_block_is_not_looked_through() {
    let block = 2 * BLOCK;
    let size = 2 * block;
    let base = TestBase::new(size);
    let disk = Overlay::new(size, block_size(block), TestStore::default());
    disk.write(&base, &vec![7; block as usize], 0)
        .expect("a good write");
    for at in [0, BLOCK] {
        disk.zero(&base, at, BLOCK, Zeroing::Trim)
            .expect("a good trim");
    }
    let is_read = |call: &Call| matches!(call, Call::Read(..));
    assert!(!disk.store().calls().iter().any(is_read));
    assert_eq!(state(&disk, 0), State::Data);
}

/// Nobody has asked for it, so nobody hears of it.
#[test]
fn a_block_that_can_not_be_freed_fails_no_request() {
    let (base, disk) = test_disk(SIZE);
    disk.write(&base, &[7; BLOCK as usize], 0)
        .expect("a good write");
    disk.zero(&base, 0, BLOCK - 1, Zeroing::Trim)
        .expect("a good trim");
    let next = disk.store().changes() + 1;
    *disk.store().fail.lock().expect("no test thread died") = Some((next, libc::EIO));
    disk.zero(&base, BLOCK - 1, 1, Zeroing::Trim)
        .expect("a good trim");
    assert_eq!(disk.store().changes(), next + 1, "the hole was tried");
    assert_eq!(state(&disk, 0), State::Zero);
}

/// The map of a disk of 7 EiB, in bytes, after `requests`.
fn map_memory(requests: impl FnOnce(&TestBase, &Overlay<TestStore>)) -> u64 {
    let (base, disk) = test_disk(7 << 60);
    requests(&base, &disk);
    disk.give_back();
    disk.usage().memory
}

#[test]
fn zeroing_the_largest_disk_takes_no_memory() {
    for how in [Zeroing::Trim, DISCARD] {
        let memory = map_memory(|base, disk| {
            disk.zero(base, 0, disk.size(), how).expect("a good zero");
            assert_eq!(state(disk, disk.size() - 1), State::Zero);
        });
        assert_eq!(memory, 0);
        // With something in it, and not at the bounds of a block.
        let memory = map_memory(|base, disk| {
            disk.write(base, &[7; 10], 3 << 60).expect("a good write");
            disk.zero(base, 5, disk.size() - 10, how)
                .expect("a good zero");
            assert_eq!(state(disk, 3 << 60), State::Zero);
            assert_eq!(state(disk, 6 << 60), State::Zero);
        });
        assert!(memory < 100 << 10, "{memory} bytes");
    }
}

#[test]
fn a_part_that_was_written_and_trimmed_piece_by_piece_takes_no_memory() {
    // What a leaf of the map is in charge of.
    const LEAF: u64 = 2048 * BLOCK;
    let memory = map_memory(|base, disk| {
        for part in 0..20 {
            let start = part * LEAF;
            disk.write(base, &[7; 10], start + LEAF / 2)
                .expect("a good write");
            for piece in (0..LEAF).step_by(BLOCK as usize) {
                disk.zero(base, start + piece, BLOCK, Zeroing::Trim)
                    .expect("a good trim");
            }
        }
    });
    // One leaf, and the nodes above it.
    assert!(memory < 40 << 10, "{memory} bytes");
}

#[test]
fn a_block_is_stored_until_it_was_punched_out() {
    for block in [512, 4096, 64 << 10, 1 << 20, 4 << 20] {
        let size = 8 << 20;
        let base = TestBase::new(size);
        let disk = Overlay::new(size, block_size(block), TestStore::default());
        let usage = || {
            let usage = disk.usage();
            (usage.data * block, usage.unused * block)
        };
        disk.write(&base, &vec![7; 4 << 20], 0)
            .expect("a good write");
        assert_eq!(usage(), (4 << 20, 0));
        // Without a thread, what is trimmed is punched out at once.
        disk.zero(&base, 0, 4 << 20, Zeroing::Trim)
            .expect("a good trim");
        assert_eq!(usage(), (0, 0), "{block}");
    }
}
