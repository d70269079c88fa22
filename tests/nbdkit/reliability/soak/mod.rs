//! Everything at once, for minutes or hours: many connections with requests of every kind
//! in flight, and a model of every byte. `make soak` runs it.
//!
//! A round has a disk, and parameters that follow from its seed ([`mix`]). The disk is cut
//! into regions, and each region has a client that knows what it wrote there ([`client`],
//! [`requests`]). Reads by others are held against tags: who may have written a byte is
//! seen from the byte ([`bytes`]). A round has several runs of nbdkit ([`run`]). One with a
//! temporary overlay starts with the base again. One with an overlay that is kept goes on
//! with what the run before has left, which was killed or not ([`region`]).
//!
//! The same seed gives the same rounds, but not the same interleaving.

mod bytes;
mod client;
mod doubts;
mod mix;
mod places;
mod region;
mod requests;
mod run;
mod tally;
mod tears;
mod wire;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tempfile::TempDir;

use crate::harness::command::{Outcome, command, outcome};
use crate::harness::mount::Mount;
use crate::harness::{run as run_program, scratch};
use mix::{Mix, Random};
use region::{Disk, Region};
use run::Run;
use tally::Tally;

/// Where the files of a round are.
struct Places {
    directory: TempDir,
    /// A small file system, for a round with an overlay that finds no space.
    mount: Option<Mount>,
}

impl Places {
    fn new(mix: &Mix) -> Places {
        Places {
            directory: scratch(),
            mount: mix.room.map(|room| Mount::tmpfs(&room.to_string())),
        }
    }

    fn base(&self) -> PathBuf {
        self.directory.path().join("base")
    }

    /// What turns cow-on-read on.
    fn switch(&self) -> PathBuf {
        self.directory.path().join("switch")
    }

    /// The file of cow-stats.
    fn stats(&self) -> PathBuf {
        self.directory.path().join("stats")
    }

    fn overlays(&self) -> PathBuf {
        self.overlay_place().join("overlays")
    }

    fn image(&self) -> PathBuf {
        self.overlay_place().join("image")
    }

    fn overlay_place(&self) -> &Path {
        match &self.mount {
            Some(mount) => mount.path(),
            None => self.directory.path(),
        }
    }
}

/// `COW_SOAK_SEED=SEED` or `SEED/ROUND`, to begin with that round.
fn seed_and_round() -> (u64, u64) {
    let Ok(text) = std::env::var("COW_SOAK_SEED") else {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        return (now.expect("a time after 1970").as_secs() % 1_000_000, 0);
    };
    let (seed, round) = text.split_once('/').unwrap_or((&text, "0"));
    let number = |text: &str| text.parse().expect("COW_SOAK_SEED=SEED or SEED/ROUND");
    (number(seed), number(round))
}

#[test]
#[ignore = "it takes minutes: make soak runs it"]
fn soak() {
    let minutes = std::env::var("COW_SOAK_MINUTES").unwrap_or_else(|_| "3".into());
    let minutes: u64 = minutes.parse().expect("COW_SOAK_MINUTES is a number");
    let (seed, mut number) = seed_and_round();
    let start = Instant::now();
    let end = start + Duration::from_secs(60 * minutes);
    let mut tally = Tally::default();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        // What is shorter has time for nothing.
        if left < Duration::from_secs(5) {
            break;
        }
        let mut mix = Mix::new(seed, number);
        mix.duration = mix.duration.min(left);
        println!("seed {seed}/{number}: {mix}");
        if let Err(fault) = round(&mix, &mut tally) {
            panic!(
                "after {:?}, in round {number} of seed {seed} (make soak SEED={seed}/{number}):\n\
                 {fault}",
                start.elapsed()
            );
        }
        number += 1;
    }
    println!(
        "soak: no fault in {:?}, seed {seed}\n{tally}",
        start.elapsed()
    );
}

/// One round, to its end or to the first fault, which is told with where the files are.
fn round(mix: &Mix, tally: &mut Tally) -> Result<(), String> {
    let places = Places::new(mix);
    fs::create_dir(places.overlays()).expect("a directory for overlays");
    let disk = Disk::new(mix, &mut Random::new(mix.seed));
    disk.make_base(&places.base()).expect("a base");
    let modified = |about: fs::Metadata| (about.mtime(), about.mtime_nsec());
    let before = modified(fs::metadata(places.base()).expect("the base"));
    let result = runs(mix, &disk, &places, tally).and_then(|()| {
        let after = modified(fs::metadata(places.base()).expect("the base"));
        match before == after {
            true => disk.look_at_base(&places.base()),
            false => Err("the base was written to".into()),
        }
    });
    result.map_err(|fault| {
        let directory = places.directory.keep();
        if let Some(mount) = places.mount {
            let from = mount.path().join("image");
            // A temporary overlay has left no file there.
            let _ = fs::copy(from, directory.join("image"));
        }
        format!("{fault}\nwhat is left of it is in {}", directory.display())
    })
}

/// The runs of a round.
fn runs(mix: &Mix, disk: &Disk, places: &Places, tally: &mut Tally) -> Result<(), String> {
    let end = Instant::now() + mix.duration;
    let mut random = Random::new(mix.seed ^ 1);
    let mut regions = disk.regions(mix);
    for number in 1.. {
        let left = end.saturating_duration_since(Instant::now());
        let duration = Duration::from_millis(3000 + random.below(4000));
        let is_last = left < duration + Duration::from_secs(3);
        let run = Run {
            mix,
            disk,
            places,
            number,
            duration: if is_last { left } else { duration },
            kill: mix.is_kept() && !is_last && !random.once_in(4),
        };
        run.run(&mut regions, tally)?;
        if mix.is_kept() {
            look_with_qemu(&run, &mut regions)?;
            tally.happened(if run.kill { "kills" } else { "clean ends" }, 1);
            tally.happened("resumes", u64::from(number > 1));
        } else {
            regions = disk.regions(mix);
        }
        if is_last {
            break;
        }
    }
    Ok(())
}

/// QEMU must find the image sound, and in it what clients have seen, or after a kill what
/// may be there. The regions go on from what QEMU has found.
fn look_with_qemu(run: &Run<'_>, regions: &mut [Region]) -> Result<(), String> {
    let image = run.places.image();
    let image = image.to_str().expect("a path of our own making");
    let check = ["check", "-f", "qcow2", image];
    let Outcome {
        status,
        stdout,
        stderr,
    } = outcome(command("qemu-img").args(check));
    // After a kill there may be leaks.
    if !(status.success() || run.kill && status.code() == Some(3)) {
        return Err(format!("qemu-img check: {status}\n{stdout}{stderr}"));
    }
    let raw = run.places.directory.path().join("as-qemu-sees-it");
    let path = raw.to_str().expect("a path of our own making");
    run_program(&[
        "qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, path,
    ]);
    let file = File::open(&raw).expect("what qemu-img has made");
    for region in regions {
        let judged = match run.kill {
            true => region.look_after_a_crash(&file),
            false => region.look_after_an_end(&file),
        };
        judged.map_err(|wrong| {
            let how = if run.kill { "a kill" } else { "a clean end" };
            let (number, range) = (region.number, &region.range);
            format!(
                "in the image after {how}, run {}, region {number} ({range:?}): {wrong}",
                run.number
            )
        })?;
    }
    fs::remove_file(raw).expect("our own file");
    Ok(())
}
