//! Images of other programs that are made ours, crashed at every step of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use nbdkit_cow_filter::error::Result as Outcome;
use nbdkit_cow_filter::qcow2::home::{self, Progress};
use nbdkit_cow_filter::qcow2::layout::{GuestCluster, Layout};

use super::check::Qemu;
use super::content::{Content, SECTOR, Sector};
use super::crash::{Allowed, Bound, base_sector, explore};
use super::crashes::Seed;
use super::disk::{resume, sector};
use super::foreign::{Foreign, data};
use super::moved::{at_random, by_hand};
use super::random::Random;
use super::reader::Reader;
use super::recorder::{Event, Fault, Portion, Recorder, Step};
use crate::disk::TestBase;

/// For `cargo test`. `make crash` tries more of each.
const SHORT: Bound = Bound {
    all_of: 3,
    combinations: 3,
    every: 1,
};
const LONG: Bound = Bound {
    all_of: 6,
    combinations: 24,
    every: 1,
};

/// An image that is to be made ours.
struct Arrival {
    start: Content,
    layout: Layout,
    /// What the disk has in the clusters that are not in the backing file as a whole.
    clusters: BTreeMap<u64, Vec<Option<Sector>>>,
    /// It lacks the bit COPIED in places, which QEMU takes for an error.
    is_uncopied: bool,
    /// How many clusters there are to be moved, and how many bytes they have.
    away: (u64, u64),
}

fn bring_home(recorder: &Recorder) -> Outcome<Vec<Progress>> {
    let mut told = Vec::new();
    let survey = home::survey(recorder, Path::new("kept"))?;
    let longest = survey.longest().max(recorder.content().size);
    let ended = survey.bring_home(&mut |progress| {
        assert!(recorder.content().size <= longest, "longer than was said");
        assert_eq!(progress.of, survey.to_move());
        told.push(progress);
    });
    told.push(ended?);
    Ok(told)
}

impl Arrival {
    fn new(image: &Foreign) -> Self {
        let start = image.content();
        let reader = Reader::open(&start).expect("an image");
        let clusters = reader.clusters().map(|n| (n, reader.cluster(n))).collect();
        Arrival {
            layout: image.layout(),
            clusters,
            is_uncopied: !image.uncopied.is_empty(),
            away: away(image),
            start,
        }
    }

    /// There is no error in it, and the disk is what it was.
    fn expect_sound(&self, content: &Content, qemu: &mut Qemu) -> Result<(), String> {
        let reader = Reader::open(content)?;
        let mut report = reader.check();
        if reader.is_dirty {
            report.miscounted.clear();
        }
        if self.is_uncopied {
            report.uncopied.clear();
        }
        let errors = report.all_errors();
        if !errors.is_empty() {
            return Err(errors);
        }
        if !reader.is_dirty && !self.is_uncopied {
            qemu.check(content, &reader.metadata())?;
        }
        self.expect_disk(&reader)
    }

    fn expect_disk(&self, reader: &Reader<'_>) -> Result<(), String> {
        for number in reader.clusters().chain(self.clusters.keys().copied()) {
            let found = reader.cluster(number);
            let is_as_before = match self.clusters.get(&number) {
                Some(expected) => found == *expected,
                None => found.iter().all(Option::is_none),
            };
            if !is_as_before {
                return Err(format!("cluster {number} of the disk has changed"));
            }
        }
        Ok(())
    }

    /// It is as the filter leaves its own, and the disk is what it was.
    fn expect_ours(&self, content: &Content) -> Result<(), String> {
        let reader = Reader::open(content)?;
        let report = reader.check();
        if report != Default::default() || reader.is_dirty {
            return Err(format!("at home: {}, {report:?}", report.all_errors()));
        }
        if reader.other_features != (0, 0) || content.size != self.layout.end {
            let features = reader.other_features;
            return Err(format!("at home: {features:?}, {} bytes", content.size));
        }
        for (guest, host) in reader.places() {
            if host != self.layout.data + guest * self.layout.cluster_size() {
                return Err(format!("cluster {guest} is at {host:#x}"));
            }
        }
        self.expect_disk(&reader)?;
        let recorder = Recorder::holding(content.clone());
        resume(&recorder).map_err(|e| format!("at home: {e}"))?;
        Ok(())
    }

    /// As another reader finds the disk, so does the filter.
    fn expect_served(&self, content: &Content) {
        let base = TestBase::new(self.layout.disk_size());
        let overlay = resume(&Recorder::holding(content.clone())).expect("ours");
        let per_cluster = self.layout.cluster_size() / SECTOR;
        for (cluster, sectors) in &self.clusters {
            for (number, expected) in (cluster * per_cluster..).zip(sectors) {
                if number * SECTOR >= base.size {
                    continue;
                }
                let mut expected = expected.unwrap_or_else(|| base_sector(&base, number));
                // Nobody sees the rest of a last sector.
                let len = (base.size - number * SECTOR).min(SECTOR) as usize;
                expected[len..].fill(0);
                let found = sector(&base, &overlay, number);
                assert!(found == expected, "sector {number}");
            }
        }
    }

    /// The next start does the rest.
    fn expect_gone_on_with(&self, content: &Content) -> Result<(), String> {
        let recorder = Recorder::holding(content.clone());
        bring_home(&recorder).map_err(|e| format!("the next start: {e}"))?;
        self.expect_ours(&recorder.content())
            .map_err(|e| format!("the next start: {e}"))
    }

    /// Every file that a crash could leave of what was recorded from `start` on.
    fn expect_all_sound(
        &self,
        start: &Content,
        recorder: &Recorder,
        bound: Bound,
        random: &mut Random,
        qemu: &mut Qemu,
        each: &mut dyn FnMut(&Content),
    ) -> usize {
        let base = TestBase::new(0);
        let nothing = BTreeMap::new();
        let allowed = Allowed::new(&base, SECTOR, &nothing);
        let mut count = 0;
        explore(
            start,
            allowed,
            &recorder.events(),
            bound,
            random,
            |_| 0,
            &mut |content, _| {
                count += 1;
                self.expect_sound(content, qemu)?;
                self.expect_gone_on_with(content)?;
                each(content);
                Ok(())
            },
        );
        count
    }

    /// A step fails. So is it told, but for space that can't be given back.
    fn fail(&self, fault: Fault, random: &mut Random, qemu: &mut Qemu) -> usize {
        let recorder = Recorder::holding(self.start.clone());
        recorder.fail(Some(fault));
        let ended = bring_home(&recorder);
        let step = recorder.steps(fault.at)[0];
        let content = recorder.content();
        let told = match ended {
            Err(e) if e.errno() == fault.errno => Ok(()),
            Ok(_) if step == Step::Punch => self.expect_ours(&content),
            ended => Err(format!("it ends with {ended:?}")),
        };
        let sound = told
            .and_then(|()| self.expect_sound(&content, qemu))
            .and_then(|()| self.expect_gone_on_with(&content));
        sound.unwrap_or_else(|e| panic!("{fault:?}, {step:?}: {e}"));
        // After the last event; those before are as without a fault.
        let bound = Bound {
            all_of: 1,
            combinations: 1,
            every: recorder.events().len().saturating_sub(1).max(1),
        };
        self.expect_all_sound(&self.start, &recorder, bound, random, qemu, &mut |_| {})
    }

    /// Killed before step `at`, and begun anew by another process: what the first one did
    /// not sync is in the file as long as the machine runs, and may be lost when that ends.
    fn killed(&self, at: usize) -> Recorder {
        let recorder = Recorder::holding(self.start.clone());
        recorder.fail(Some(Fault {
            at,
            errno: libc::EIO,
            portion: Portion::Nothing,
            stays: true,
        }));
        // (Space that can't be given back is no error.)
        let _ = bring_home(&recorder);
        recorder.fail(None);
        bring_home(&recorder).expect("it can be brought home");
        self.expect_ours(&recorder.content()).expect("it is ours");
        recorder
    }

    /// All of it, without a fault.
    fn brought_home(&self, start: &Content) -> (Recorder, Progress) {
        let recorder = Recorder::holding(start.clone());
        let mut told = bring_home(&recorder).expect("it can be brought home");
        self.expect_ours(&recorder.content()).expect("it is ours");
        expect_in_order(&told);
        let events = recorder.events();
        let is_unsafe = |event: &Event| matches!(event, Event::Changed(_));
        let last = events.iter().rposition(is_unsafe).unwrap_or(0);
        let is_its_sync =
            |event: &Event| matches!(event, Event::Synced { before } if *before > last);
        assert!(events.iter().any(is_its_sync), "the end is not on the disk");
        (recorder, told.pop().expect("the end"))
    }
}

fn away(image: &Foreign) -> (u64, u64) {
    let mut away = (0, 0);
    for (guest, cluster) in &image.clusters {
        let valid = image.layout().valid_bits(GuestCluster(*guest));
        let blocks = (cluster.bitmap & valid) as u32;
        if blocks != 0 && cluster.host != Some(image.home(*guest)) {
            away.0 += 1;
            away.1 += u64::from(blocks.count_ones()) * image.block;
        }
    }
    away
}

/// What is told gets there, and never goes back.
fn expect_in_order(told: &[Progress]) {
    for pair in told.windows(2) {
        let (old, new) = (pair[0], pair[1]);
        assert!(old.clusters <= new.clusters && old.bytes <= new.bytes);
    }
    let last = told.last().expect("the end is told");
    assert_eq!(last.clusters, last.of, "{told:?}");
}

/// What the disk in `image` holds, over a base of zeroes.
fn disk(image: &Foreign) -> Content {
    let mut disk = Content::default();
    disk.size = image.layout().virtual_size();
    let per_cluster = image.cluster_size() / SECTOR;
    for (guest, cluster) in &image.clusters {
        for sector in 0..per_cluster {
            let number = guest * per_cluster + sector;
            let bit = sector * SECTOR / image.block;
            if (cluster.bitmap >> bit) & 1 != 0 && number * SECTOR < disk.size {
                disk.write(&data(number), number * SECTOR);
            }
        }
    }
    disk
}

/// Else the tests that begin with them would show nothing.
#[test]
fn qemu_takes_the_images_for_what_they_are_meant_to_be() {
    let mut qemu = Qemu::new(usize::MAX);
    let mut random = Random::new(1);
    let random = (0..60).map(|_| ("at random", at_random(&mut random)));
    for (name, image) in by_hand().into_iter().chain(random) {
        let content = image.content();
        let reader = Reader::open(&content).expect(name);
        let mut report = reader.check();
        assert_eq!(report.uncopied.len(), image.uncopied.len(), "{name}");
        report.uncopied.clear();
        if image.is_dirty {
            report.miscounted.clear();
        }
        assert_eq!(report.all_errors(), "", "{name}: {image:?}");
        let leaks: Vec<u64> = image.leaks.iter().copied().collect();
        assert!(image.is_dirty || report.leaks == leaks, "{name}: {image:?}");
        // QEMU takes a missing bit for an error, and refcounts that are wrong.
        if image.uncopied.is_empty() && !image.is_dirty {
            let checked = qemu.check(&content, &reader.metadata());
            checked.unwrap_or_else(|e| panic!("{name}: {e}: {image:?}"));
        }
        let compared = qemu.compare(&content, &disk(&image));
        compared.unwrap_or_else(|e| panic!("{name}: {e}: {image:?}"));
    }
}

/// Of attempts that all fail when they move data.
#[test]
fn attempts_that_fail_do_not_make_the_file_longer_and_longer() {
    for (name, image) in by_hand() {
        let arrival = Arrival::new(&image);
        let (recorder, _) = arrival.brought_home(&arrival.start);
        let syncs = recorder.steps(0).into_iter().enumerate();
        let syncs: Vec<_> = syncs.filter(|(_, step)| *step == Step::Sync).collect();
        let failing = Recorder::holding(arrival.start.clone());
        let mut sizes = Vec::new();
        for _ in 0..5 {
            // Late, when there are tables for the time of the move.
            let at = failing.step_count() + syncs[syncs.len() / 2].0;
            failing.fail(Some(Fault {
                at,
                errno: libc::ENOSPC,
                portion: Portion::Nothing,
                stays: true,
            }));
            let _ = bring_home(&failing);
            failing.fail(None);
            sizes.push(failing.content().size);
        }
        assert!(
            sizes[3].max(sizes[4]) <= sizes[1].max(sizes[2]),
            "{name}: {sizes:?}"
        );
        arrival.expect_gone_on_with(&failing.content()).expect(name);
    }
}

#[test]
fn images_made_by_hand_survive_a_crash_at_every_step_of_moving_home() {
    let mut random = Random::new(1);
    for (name, image) in by_hand() {
        println!("{name}");
        let mut qemu = Qemu::new(10);
        let arrival = Arrival::new(&image);
        let (recorder, told) = arrival.brought_home(&arrival.start);
        // Some are copied twice.
        let (clusters, bytes) = arrival.away;
        assert_eq!(told.of, clusters);
        assert!((bytes..=2 * bytes).contains(&told.bytes), "{told:?}");
        arrival.expect_served(&recorder.content());
        let (start, nothing) = (&arrival.start, &mut |_: &Content| {});
        arrival.expect_all_sound(start, &recorder, SHORT, &mut random, &mut qemu, nothing);
        assert!(qemu.shown > 0 || image.is_dirty || arrival.is_uncopied);
    }
}

/// Brought home, crashed, brought home from what that left, crashed.
fn run_at_random(seed: u64, bound: Bound, qemu: &mut Qemu) -> usize {
    let mut random = Random::new(seed);
    let image = at_random(&mut random);
    let arrival = Arrival::new(&image);
    let mut start = arrival.start.clone();
    let mut count = 0;
    let steps = arrival.brought_home(&start).0.step_count();
    for _ in 0..2 {
        let (recorder, _) = arrival.brought_home(&start);
        // One of the files, each with the same chance, is the one to go on with.
        let mut choice = Random::new(random.next());
        let mut seen = 0;
        let mut left = start.clone();
        count += arrival.expect_all_sound(
            &start,
            &recorder,
            bound,
            &mut random,
            qemu,
            &mut |content| {
                seen += 1;
                if choice.below(seen) == 0 {
                    left = content.clone();
                }
            },
        );
        start = left;
    }
    for _ in 0..2 {
        let at = random.below(steps as u64) as usize;
        let recorder = arrival.killed(at);
        let (start, nothing) = (&arrival.start, &mut |_: &Content| {});
        count += arrival.expect_all_sound(start, &recorder, bound, &mut random, qemu, nothing);
        let stays = random.below(3) == 0;
        count += arrival.fail(fault(at, stays, &mut random), &mut random, qemu);
    }
    count
}

/// More of them than `cargo test` has time for, for `make crash`.
pub fn run_long_at_random(seed: u64, qemu: &mut Qemu) -> usize {
    run_at_random(seed, LONG, qemu)
}

#[test]
fn images_that_were_brought_home_half_way_survive_a_kill_and_then_a_crash() {
    let mut random = Random::new(1);
    for (name, image) in by_hand() {
        println!("{name}");
        let arrival = Arrival::new(&image);
        let steps = arrival.brought_home(&arrival.start).0.step_count();
        let recorder = arrival.killed(random.below(steps as u64) as usize);
        // (Few of each: there are the crashes of the first process among them.)
        let bound = Bound {
            every: 1 + steps / 32,
            ..SHORT
        };
        let (start, nothing) = (&arrival.start, &mut |_: &Content| {});
        let mut qemu = Qemu::new(2);
        arrival.expect_all_sound(start, &recorder, bound, &mut random, &mut qemu, nothing);
    }
}

#[test]
fn random_images_survive_a_crash_at_every_step_of_moving_home() {
    let mut qemu = Qemu::new(300);
    let failed = &AtomicBool::new(false);
    for seed in 0..12 {
        let _seed = Seed { seed, failed };
        run_at_random(seed, SHORT, &mut qemu);
    }
    assert!(qemu.shown > 0);
}

fn fault(at: usize, stays: bool, random: &mut Random) -> Fault {
    let (errno, portion) = random.among(&[
        (libc::ENOSPC, Portion::Nothing),
        (libc::ENOSPC, Portion::Half),
        (libc::EIO, Portion::Half),
        (libc::EIO, Portion::All),
    ]);
    Fault {
        at,
        errno,
        portion,
        stays,
    }
}

#[test]
fn a_step_of_moving_home_that_fails_is_told_and_the_next_start_gets_there() {
    let mut random = Random::new(1);
    for (name, image) in by_hand() {
        println!("{name}");
        let mut qemu = Qemu::new(6);
        let arrival = Arrival::new(&image);
        // Where there are many, most are as others are.
        let steps = arrival.brought_home(&arrival.start).0.step_count();
        for at in (0..steps).step_by(1 + steps / 32) {
            let fault = fault(at, false, &mut random);
            arrival.fail(fault, &mut random, &mut qemu);
        }
    }
}
