//! Many threads, each with sectors of its own in the blocks and clusters that all of
//! them write to, and with its own flushes: what was answered before a flush was asked
//! for is there after a crash.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;

use super::check::{Qemu, assert_settled, check_with};
use super::content::{SECTOR, Sector};
use super::crash::Bound;
use super::disk::{DISCARD, Disk, Kept};
use super::random::Random;
use super::recorder::Recorder;
use super::scripts::LARGE_BLOCKS;
use crate::disk::TestBase;

const THREADS: u64 = 4;
const PER_BLOCK: u64 = LARGE_BLOCKS.1 / SECTOR;
/// The sectors of these blocks belong to one thread after the other; of those from
/// there on whole blocks do.
const MIXED_BLOCKS: u64 = 40;
const BLOCKS: u64 = 120;

fn owner(sector: u64) -> u64 {
    if sector < MIXED_BLOCKS * PER_BLOCK {
        sector % THREADS
    } else {
        sector / PER_BLOCK % THREADS
    }
}

/// Writes a sector, or writes or discards a block; flushes at times.
fn work(thread: u64, seed: u64, overlay: &Kept, recorder: &Recorder) {
    let base = TestBase::new(LARGE_BLOCKS.0);
    let mut random = Random::new(seed * THREADS + thread);
    for _ in 0..30 {
        let byte = 1 + random.below(255) as u8;
        let ask = |sectors: std::ops::Range<u64>, byte: u8| {
            let sector: Arc<Sector> = Arc::new([byte; SECTOR as usize]);
            recorder.ask(sectors.map(|n| (n, Arc::clone(&sector))).collect());
        };
        match random.below(8) {
            0..=2 => {
                let sector = random.below(MIXED_BLOCKS * PER_BLOCK / THREADS) * THREADS + thread;
                ask(sector..sector + 1, byte);
                overlay
                    .write(&base, &[byte; SECTOR as usize], sector * SECTOR)
                    .expect("a good write");
            }
            number @ 3..=6 => {
                let blocks = (BLOCKS - MIXED_BLOCKS) / THREADS;
                let block = MIXED_BLOCKS + random.below(blocks) * THREADS + thread;
                let (at, len) = (block * LARGE_BLOCKS.1, LARGE_BLOCKS.1);
                let sectors = block * PER_BLOCK..(block + 1) * PER_BLOCK;
                if number < 5 {
                    ask(sectors, byte);
                    overlay
                        .write(&base, &vec![byte; len as usize], at)
                        .expect("a good write");
                } else {
                    ask(sectors, 0);
                    overlay.zero(&base, at, len, DISCARD).expect("a good zero");
                }
            }
            _ => {
                let asked = recorder.asked();
                overlay.flush().expect("a good flush");
                recorder.flushed(asked, Some(thread));
            }
        }
    }
}

#[test]
fn what_threads_have_flushed_is_there_after_a_crash() {
    let some = Bound {
        all_of: 1,
        combinations: 3,
        every: 5,
    };
    let mut qemu = Qemu::new(200);
    for seed in 0..6 {
        let mut disk = Disk::new(LARGE_BLOCKS.0, LARGE_BLOCKS.1);
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let disk = &disk;
                scope.spawn(move || work(thread, seed, &disk.overlay, &disk.recorder));
            }
        });
        let mut random = Random::new(seed);
        let mut touched = BTreeMap::new();
        check_with(
            &disk,
            some,
            &mut random,
            &mut qemu,
            owner,
            &mut |_, allowed| {
                touched.extend(allowed.numbers().map(|number| (number, Arc::new([0; 512]))));
            },
        );
        disk.model = touched;
        disk.settle();
        disk.run(&[super::disk::Request::Flush]);
        assert_settled(&disk, &qemu);
    }
}
