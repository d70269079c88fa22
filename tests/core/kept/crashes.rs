//! Crashes at every step of runs of requests.

use std::collections::BTreeSet;
use std::env;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::check::{Qemu, assert_settled, check_all, check_with};
use super::content::Content;
use super::crash::Bound;
use super::disk::{Disk, Request};
use super::homecoming;
use super::random::Random;
use super::scripts::{HUGE, LARGE_BLOCKS, SMALL_BLOCKS, at_random, by_hand};

/// For `cargo test`. `make crash` has no end, begins with the seed that CRASH_SEED has,
/// and tries more of each.
const SHORT: Bound = Bound {
    all_of: 4,
    combinations: 8,
    every: 1,
};
const LONG: Bound = Bound {
    all_of: 8,
    combinations: 64,
    every: 1,
};

fn run_by_hand(disk: (u64, u64), bound: Bound) {
    let mut random = Random::new(disk.0);
    let mut qemu = Qemu::new(600);
    for (name, script) in by_hand(disk) {
        println!("{name}");
        let mut disk = Disk::new(disk.0, disk.1);
        disk.run(&script);
        check_all(&disk, bound, &mut random, &mut qemu);
        assert_settled(&disk, &qemu);
    }
    assert!(qemu.shown > 0);
}

#[test]
fn scripts_for_each_rule_survive_a_crash_at_every_step_with_small_blocks() {
    run_by_hand(SMALL_BLOCKS, SHORT);
}

#[test]
fn scripts_for_each_rule_survive_a_crash_at_every_step_with_large_blocks() {
    run_by_hand(LARGE_BLOCKS, SHORT);
}

#[test]
fn tables_of_a_large_disk_survive_a_crash_at_every_step() {
    let few = Bound {
        all_of: 2,
        combinations: 4,
        every: 1,
    };
    let mut qemu = Qemu::new(100);
    let script = &by_hand(HUGE)[2].1;
    let mut disk = Disk::new(HUGE.0, HUGE.1);
    disk.run(script);
    check_all(&disk, few, &mut Random::new(1), &mut qemu);
    assert_settled(&disk, &qemu);
}

/// Says which seed it was when the test fails.
pub struct Seed<'a> {
    pub seed: u64,
    pub failed: &'a AtomicBool,
}

impl Drop for Seed<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.failed.store(true, Ordering::SeqCst);
            eprintln!("the seed is {}", self.seed);
        }
    }
}

/// Random requests, a crash, others on what it left, and so on; at every step of all
/// of it each file that a crash could leave is looked at.
fn run_at_random(seed: u64, bound: Bound, qemu: &mut Qemu) -> usize {
    let mut random = Random::new(seed);
    let size = random.among(&[SMALL_BLOCKS, SMALL_BLOCKS, LARGE_BLOCKS]);
    let mut disk = Disk::new(size.0, size.1);
    let mut count = 0;
    for _ in 0..3 {
        let length = 6 + random.below(12) as usize;
        disk.run(&at_random(size, length, &mut random));
        // One of the files, each with the same chance, is the one to go on with.
        let mut choice = Random::new(random.next());
        let mut seen = 0;
        let mut left: Option<(Content, BTreeSet<u64>)> = None;
        count += check_with(
            &disk,
            bound,
            &mut random,
            qemu,
            |_| 0,
            &mut |content, allowed| {
                seen += 1;
                if choice.below(seen) == 0 {
                    left = Some((content.clone(), allowed.numbers().collect()));
                }
            },
        );
        if let Some((content, numbers)) = left {
            disk = disk.after_crash(&content, numbers.into_iter());
        }
        // Whatever the crash has leaked, the next flush puts right.
        disk.run(&[Request::Flush]);
        assert_settled(&disk, qemu);
    }
    count
}

#[test]
fn random_requests_survive_a_crash_at_every_step() {
    if env::var_os("CRASH_FOREVER").is_some() {
        return run_for_ever();
    }
    let mut qemu = Qemu::new(1500);
    let failed = &AtomicBool::new(false);
    for seed in 0..24 {
        let _seed = Seed { seed, failed };
        run_at_random(seed, SHORT, &mut qemu);
    }
}

/// Until it is stopped, or fails. Threads have seeds of their own.
fn run_for_ever() {
    let failed = &AtomicBool::new(false);
    let first = env::var("CRASH_SEED").map_or(0, |seed| seed.parse().expect("a number"));
    let threads = thread::available_parallelism().map_or(1, |n| n.get() as u64);
    thread::scope(|scope| {
        for turn in 0..threads {
            scope.spawn(move || {
                for seed in (first + turn..).step_by(threads as usize) {
                    if failed.load(Ordering::SeqCst) {
                        return;
                    }
                    let _seed = Seed { seed, failed };
                    let mut qemu = Qemu::new(usize::MAX);
                    let count = run_at_random(seed, LONG, &mut qemu)
                        + homecoming::run_long_at_random(seed, &mut qemu);
                    println!("seed {seed}: {count} files, {} shown to QEMU", qemu.shown);
                }
            });
        }
    });
}
