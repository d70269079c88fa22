//! Everything that the manual says QEMU may do to the image, done by QEMU's own programs
//! at random, between runs of the filter, with a model of the disk that goes through all
//! of it.
//!
//! After each thing that QEMU did the disk is read through QEMU: that it holds what it
//! should shows that the model is right. Then nbdkit is started on the image, has to give
//! the same bytes, is written to, and has to leave an image in which everything is where
//! the filter had put it at first.
//!
//! The deck has each thing once, in a random order. What one of two tests has done by one
//! version of QEMU, the other has done by the other. Where a process is killed it is chance how far it had come, so a seed alone need
//! not bring an error back. The directory of a test that fails is kept for that.

mod disk;
mod filter;
#[cfg(target_arch = "x86_64")]
mod guest;
mod steps;

#[path = "../../../core/kept/random.rs"]
mod random;

use std::env;

use disk::Disk;
use filter::End;
use random::Random;
use steps::STEPS;

use crate::harness::qemu::Qemu;

const ROUNDS: u64 = 10;

impl Random {
    fn shuffle<T>(&mut self, list: &mut [T]) {
        for place in (1..list.len()).rev() {
            list.swap(place, self.below(place as u64 + 1) as usize);
        }
    }
}

fn go_on_with_qemu(seed: u64, block: u64, guests: bool) {
    let mut random = Random::new(seed);
    // No whole number of clusters, and one in two no whole number of sectors.
    let size = (32 << 20) - random.below(40) * 65_536 - 512 * (1 + random.below(30));
    let size = size - [0, random.below(512)][random.below(2) as usize];
    let mut disk = Disk::new(size, block, seed);

    let qemus = Qemu::all();
    let mut deck: Vec<_> = STEPS
        .iter()
        // It takes QEMU minutes where a refcount block has many entries.
        .filter(|step| block == 512 || step.name != "refcount_bits")
        .enumerate()
        .map(|(number, step)| (step, &qemus[(number + seed as usize) % qemus.len()]))
        .collect();
    #[cfg(target_arch = "x86_64")]
    if guests {
        deck.extend(guest::STEPS.iter().map(|step| (step, &qemus[0])));
    }
    random.shuffle(&mut deck);
    disk.serve(&mut random, End::Clean);
    let mut round = 0;
    while round < ROUNDS || !deck.is_empty() {
        round += 1;
        for _ in 0..=random.below(4) {
            let Some((step, qemu)) = deck.pop() else {
                break;
            };
            disk.note(format!("{} ({})", step.name, qemu.name()));
            (step.run)(&mut disk, qemu, &mut random);
            disk.check_with(qemu);
        }
        let end = random.among(&[End::Clean, End::Clean, End::Killed]);
        disk.serve(&mut random, end);
    }
    disk.serve(&mut random, End::Clean);
}

fn go_on_for_ever() {
    let first = env::var("CRASH_SEED").map_or(0, |seed| seed.parse().expect("a number"));
    for seed in first.. {
        for block in [512, 4096, 65536] {
            go_on_with_qemu(seed, block, cfg!(target_arch = "x86_64"));
            println!("seed {seed}, blocks of {block}: passed");
        }
    }
}

/// `make crash PART=qemu` has no end, and begins with the seed that CRASH_SEED has.
#[test]
fn whatever_qemu_did_is_gone_on_with_in_blocks_of_4k() {
    if env::var_os("CRASH_FOREVER").is_some() {
        return go_on_for_ever();
    }
    go_on_with_qemu(1, 4096, false);
}

#[test]
fn whatever_qemu_did_is_gone_on_with_in_blocks_of_512() {
    go_on_with_qemu(2, 512, false);
}
