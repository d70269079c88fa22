//! The parallel code under a model checker: block map, stripes, and the requests
//! on top of them, in every order in which two threads may take their steps, and
//! with every value that the memory model lets a load see.
//!
//! Runs in a build with `RUSTFLAGS="--cfg loom"` (`packaging/model-check.sh`).
//! That script also puts known bugs into a copy of the tree, by the patches beside
//! this file, and looks that the checker finds each. One is the lost-write bug of
//! other filters.
//!
//! The disk is small: a request's pieces are halves of a block, and the store
//! holds each half in one atomic that is only ever accessed *relaxed*. So nothing
//! but the block map and the stripes orders one thread's bytes before another's
//! look at them, as it should be.

#![cfg(loom)]

mod image_file;
mod kept;
mod limit;
mod map;
mod order;
mod reclaim;

use std::ops::Range;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU8, Ordering};
use loom::thread;

use nbdkit_cow_filter::base::{Allocation, Base, Extent};
use nbdkit_cow_filter::block::{BlockSize, ByteRange};
use nbdkit_cow_filter::error::Result;
use nbdkit_cow_filter::overlay::{Overlay, State, Store, Zeroing};

const BLOCK: u64 = 512;
const HALF: u64 = BLOCK / 2;
/// Two leaves of the block map, as small as they are here, and so two nodes' worth
/// of slots to race for.
const BLOCKS: u64 = 128;
const SIZE: u64 = BLOCKS * BLOCK;

const OF_BASE: u8 = 0xba;
/// What the store holds where nothing was ever written.
const GARBAGE: u8 = 0xee;

struct ModelBase;

impl Base for ModelBase {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
        buf.fill(OF_BASE);
        Ok(())
    }

    fn cache(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    fn extents(&self, bytes: ByteRange, _only_first: bool, list: &mut Vec<Extent>) -> Result<()> {
        list.push(Extent {
            bytes,
            allocation: Allocation::DATA,
        });
        Ok(())
    }
}

/// The halves of the first block and of one that is far away from it.
struct ModelStore {
    near: [AtomicU8; 2],
    far: [AtomicU8; 2],
}

impl ModelStore {
    fn halves(&self, range: ByteRange) -> impl Iterator<Item = (u64, &AtomicU8)> {
        (range.start / HALF..range.end.div_ceil(HALF)).map(|half| {
            let halves = match half / 2 {
                0 => &self.near,
                _ => &self.far,
            };
            (half * HALF, &halves[(half % 2) as usize])
        })
    }

    fn put(&self, range: ByteRange, byte: impl Fn(u64) -> u8) {
        for (start, half) in self.halves(range) {
            half.store(byte(start), Ordering::Relaxed);
        }
    }
}

fn range(start: u64, len: usize) -> ByteRange {
    ByteRange {
        start,
        end: start + len as u64,
    }
}

impl Store for ModelStore {
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        for (start, half) in self.halves(range(offset, buf.len())) {
            buf[(start - offset) as usize..][..HALF as usize].fill(half.load(Ordering::Relaxed));
        }
        Ok(())
    }

    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.put(range(offset, buf.len()), |at| buf[(at - offset) as usize]);
        Ok(())
    }

    fn punch(&self, range: ByteRange) -> Result<bool> {
        self.put(range, |_| 0);
        Ok(true)
    }

    fn zero_range(&self, range: ByteRange) -> Result<bool> {
        self.punch(range)
    }

    fn can_zero_range(&self) -> bool {
        true
    }
}

type Disk = Overlay<ModelStore>;

fn disk() -> Disk {
    let garbage = || [AtomicU8::new(GARBAGE), AtomicU8::new(GARBAGE)];
    let store = ModelStore {
        near: garbage(),
        far: garbage(),
    };
    let block_size = BlockSize::new(BLOCK).expect("a block size");
    Overlay::new(SIZE, block_size, store)
}

/// The two halves of the first block, each of which must be of one byte.
fn halves(disk: &Disk) -> (u8, u8) {
    let mut block = [0; BLOCK as usize];
    disk.read(&ModelBase, &mut block, 0, false)
        .expect("a good read");
    let (first, second) = block.split_at(HALF as usize);
    for half in [first, second] {
        assert!(half.iter().all(|byte| *byte == half[0]));
    }
    (first[0], second[0])
}

fn write(disk: &Disk, byte: u8, offset: u64, len: u64) {
    disk.write(&ModelBase, &vec![byte; len as usize], offset)
        .expect("a good write");
}

fn write_first_half(disk: &Disk) {
    write(disk, 1, 0, HALF);
}

fn write_second_half(disk: &Disk) {
    write(disk, 2, HALF, HALF);
}

fn write_block(disk: &Disk) {
    write(disk, 3, 0, BLOCK);
}

fn write_zeroes(disk: &Disk) {
    write(disk, 0, 0, BLOCK);
}

fn read_and_copy(disk: &Disk) {
    let mut half = [0; HALF as usize];
    disk.read(&ModelBase, &mut half, HALF, true)
        .expect("a good read");
}

fn cache(disk: &Disk) {
    disk.cache(&ModelBase, 0, 1, true).expect("a good cache");
}

fn trim(disk: &Disk) {
    disk.zero(&ModelBase, 0, BLOCK, Zeroing::Trim)
        .expect("a good trim");
}

fn zero_and_keep(disk: &Disk) {
    let how = Zeroing::Zero {
        may_trim: false,
        fast: false,
    };
    disk.zero(&ModelBase, 0, BLOCK, how).expect("a good zero");
}

/// What was written before the requests that race.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Prepared {
    Nothing,
    /// The block beside: the word of the map is there, and making it can't be
    /// what orders the racing threads.
    Neighbour,
    /// The block itself.
    Data,
}

const PREPARED: [Prepared; 3] = [Prepared::Nothing, Prepared::Neighbour, Prepared::Data];

fn prepared_disk(state: Prepared) -> Arc<Disk> {
    Arc::new(prepared(state))
}

fn prepared(state: Prepared) -> Disk {
    let disk = disk();
    match state {
        Prepared::Nothing => {}
        Prepared::Neighbour => write(&disk, 8, BLOCK, BLOCK),
        Prepared::Data => write(&disk, 9, 0, BLOCK),
    }
    disk
}

/// What the first block may hold after `one` and `other` were in flight together,
/// where it was of the base and where it held data already.
fn check(
    one: fn(&Disk),
    other: fn(&Disk),
    on_base: &'static [(u8, u8)],
    on_data: &'static [(u8, u8)],
) {
    for prepared in PREPARED {
        let allowed = if prepared == Prepared::Data {
            on_data
        } else {
            on_base
        };
        for (one, other) in [(one, other), (other, one)] {
            loom::model(move || {
                let disk = prepared_disk(prepared);
                let thread = spawn(&disk, one);
                other(&disk);
                thread.join().expect("no panic");
                let found = halves(&disk);
                assert!(
                    allowed.contains(&found),
                    "{found:x?} is none of {allowed:x?}, prepared: {prepared:?}"
                );
            });
        }
    }
}

/// Runs `request` in a thread of its own.
///
/// The checker remembers only the last access to an atomic, so that it does not
/// see that one thread's look at a word of the map matters to another's change of
/// it, if that one has looked itself before changing it. It does see it the other
/// way round. So every pair is tried with either of the two in the main thread,
/// which runs first.
fn spawn(disk: &Arc<Disk>, request: fn(&Disk)) -> thread::JoinHandle<()> {
    let disk = Arc::clone(disk);
    thread::spawn(move || request(&disk))
}

#[test]
fn partial_writes_to_one_block_both_survive() {
    check(write_first_half, write_second_half, &[(1, 2)], &[(1, 2)]);
}

#[test]
fn a_partial_write_survives_fills() {
    for fill in [read_and_copy, cache] {
        check(fill, write_first_half, &[(1, OF_BASE)], &[(1, 9)]);
    }
}

#[test]
fn a_whole_write_survives_fills() {
    for fill in [read_and_copy, cache] {
        check(fill, write_block, &[(3, 3)], &[(3, 3)]);
    }
}

#[test]
fn zeroes_survive_fills() {
    for fill in [read_and_copy, cache] {
        for zero in [write_zeroes, trim, zero_and_keep] {
            check(fill, zero, &[(0, 0)], &[(0, 0)]);
        }
    }
}

#[test]
fn two_fills_leave_what_was_there() {
    check(read_and_copy, cache, &[(OF_BASE, OF_BASE)], &[(9, 9)]);
}

#[test]
fn a_partial_write_beside_zeroes_of_the_block_is_before_or_after_them() {
    for zero in [write_zeroes, trim, zero_and_keep] {
        check(zero, write_first_half, &[(0, 0), (1, 0)], &[(0, 0), (1, 0)]);
    }
}

#[test]
fn a_whole_write_beside_a_trim_is_before_or_after_it() {
    check(trim, write_block, &[(0, 0), (3, 3)], &[(0, 0), (3, 3)]);
}

#[test]
fn a_whole_write_beside_a_partial_one_is_before_or_after_it() {
    check(
        write_block,
        write_first_half,
        &[(3, 3), (1, 3)],
        &[(3, 3), (1, 3)],
    );
}

/// A read beside a change: each half is old or new, and never what the store held
/// before the block's bytes were there.
fn check_read_beside(change: fn(&Disk), new: (u8, u8), passing: &'static [u8]) {
    for prepared in PREPARED {
        let old = if prepared == Prepared::Data {
            9
        } else {
            OF_BASE
        };
        let check = move |(first, second): (u8, u8)| {
            let allowed = |found, new| found == old || found == new || passing.contains(&found);
            assert!(allowed(first, new.0), "first half: {first:x}");
            assert!(allowed(second, new.1), "second half: {second:x}");
        };
        loom::model(move || {
            let disk = prepared_disk(prepared);
            let thread = spawn(&disk, change);
            check(halves(&disk));
            thread.join().expect("no panic");
        });
        loom::model(move || {
            let disk = prepared_disk(prepared);
            let reader = {
                let disk = Arc::clone(&disk);
                thread::spawn(move || halves(&disk))
            };
            change(&disk);
            check(reader.join().expect("no panic"));
        });
    }
}

#[test]
fn a_read_sees_old_bytes_or_new_ones() {
    check_read_beside(write_block, (3, 3), &[]);
    check_read_beside(write_zeroes, (0, 0), &[]);
    check_read_beside(trim, (0, 0), &[]);
    check_read_beside(zero_and_keep, (0, 0), &[]);
    check_read_beside(
        |disk| {
            write_first_half(disk);
            write_second_half(disk);
        },
        (1, 2),
        &[],
    );
}

#[test]
fn a_block_that_is_zeroed_and_written_again_shows_no_third_value() {
    // Zeroes are there for a moment.
    check_read_beside(
        |disk| {
            trim(disk);
            write_block(disk);
        },
        (3, 3),
        &[0],
    );
}

/// Both hold the stripe shared, and change one word of the map.
#[test]
fn writes_of_two_neighbouring_blocks_both_survive() {
    for has_leaf in [false, true] {
        loom::model(move || {
            let disk = Arc::new(disk());
            if has_leaf {
                write(&disk, 0, 2 * BLOCK, BLOCK);
            }
            let thread = spawn(&disk, |disk| write(disk, 7, BLOCK, BLOCK));
            write_block(&disk);
            thread.join().expect("no panic");
            assert_eq!(halves(&disk), (3, 3));
            assert_eq!(disk.state_at(BLOCK).expect("in range"), State::Data);
        });
    }
}

/// All three stripes, and two of them that wrap around the end of the array.
#[test]
fn requests_that_need_several_stripes_do_not_wait_for_each_other_for_ever() {
    const AREA: u64 = SIZE / 4;
    fn trim_areas(disk: &Disk, areas: Range<u64>) {
        let len = (areas.end - areas.start) * AREA;
        disk.zero(&ModelBase, areas.start * AREA, len, Zeroing::Trim)
            .expect("a good trim");
    }
    loom::model(|| {
        let disk = Arc::new(disk());
        let thread = spawn(&disk, |disk| trim_areas(disk, 2..4));
        trim_areas(&disk, 0..3);
        thread.join().expect("no panic");
        for area in 0..4 {
            let state = disk.state_at(area * AREA).expect("in range");
            assert_eq!(state, State::Zero);
        }
    });
}

#[test]
fn threads_that_make_the_same_node_and_leaf_lose_no_block() {
    const FAR: u64 = SIZE - BLOCK;
    loom::model(|| {
        let disk = Arc::new(disk());
        let thread = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || write(&disk, 7, FAR, BLOCK))
        };
        write_block(&disk);
        thread.join().expect("no panic");
        assert_eq!(halves(&disk), (3, 3));
        assert_eq!(disk.state_at(FAR).expect("in range"), State::Data);
        assert_eq!(disk.state_at(BLOCK).expect("in range"), State::Base);
    });
    // The block beside it shares the leaf, which the trim of a whole leaf marks.
    loom::model(|| {
        let disk = Arc::new(disk());
        let thread = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || {
                disk.zero(&ModelBase, BLOCK, SIZE - BLOCK, Zeroing::Trim)
                    .expect("a good trim");
            })
        };
        write_block(&disk);
        thread.join().expect("no panic");
        assert_eq!(halves(&disk), (3, 3));
        assert_eq!(disk.state_at(BLOCK).expect("in range"), State::Zero);
        assert_eq!(disk.state_at(FAR).expect("in range"), State::Zero);
    });
}
