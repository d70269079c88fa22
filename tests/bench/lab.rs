//! Where the rates are measured: a directory with a disk in it, and what makes a
//! cell of a load on that disk.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use tempfile::TempDir;

use super::fio::{Job, ON_ONE_CORE};
use super::machine;
use super::runner::{Cell, Effort, Kind, Measured};
use super::systems::{Server, Setup, System};
use super::targets::goals;

/// Two directories: on tmpfs only the processor counts; on the disk's file
/// system the first write of a block costs what it costs in use.
pub const MEMORY: &str = "/dev/shm";
pub const DISK: &str = "/var/tmp";

const GIB: f64 = (1u64 << 30) as f64;

/// How long a read of the slow base takes.
const DELAY: Duration = Duration::from_millis(5);

/// A directory of our own in `place`, removed with all that is in it. `make bench`
/// says how its name starts, to be able to remove it too.
pub fn scratch(place: &str) -> Result<TempDir, String> {
    let prefix = std::env::var("BENCH_SCRATCH").unwrap_or_else(|_| "cow-bench.".into());
    tempfile::Builder::new()
        .prefix(&prefix)
        .tempdir_in(place)
        .map_err(|error| format!("no directory in {place}: {error}"))
}

pub fn scratch_in_memory() -> Result<TempDir, String> {
    scratch(MEMORY)
}

/// How much can be written to `place`, in bytes. tmpfs promises what it is allowed,
/// whether the machine has so much memory left or not.
pub fn room(place: &str) -> Result<u64, String> {
    let about = statvfs(place).map_err(|error| format!("{place}: {error}"))?;
    let free = about.blocks_available() * about.fragment_size();
    Ok(match place {
        MEMORY => free.min(machine::available_memory().unwrap_or(free)),
        _ => free,
    })
}

/// Complains before anything is measured, and not in the middle of it.
pub fn need_room(effort: &Effort) -> Result<(), String> {
    for place in [MEMORY, DISK] {
        // The disk, one overlay that has all of it, and qemu-nbd's way to count.
        let needed = (effort.disk * 5 / 2) as f64 / GIB;
        let free = room(place)? as f64 / GIB;
        if free < needed {
            return Err(format!(
                "{needed:.1} GiB are needed in {place}, and there are {free:.1} GiB"
            ));
        }
    }
    Ok(())
}

/// A directory with a disk full of random bytes in it.
pub struct Lab {
    on_disk: bool,
    scratch: TempDir,
    pub disk: PathBuf,
    /// In bytes.
    pub size: u64,
    time: Duration,
    rounds: usize,
    more_time: Duration,
    more_rounds: usize,
}

impl Lab {
    pub fn new(place: &str, effort: &Effort) -> Result<Lab, String> {
        let scratch = scratch(place)?;
        let disk = scratch.path().join("disk.img");
        random_file(&disk, effort.disk).map_err(|error| format!("the disk in {place}: {error}"))?;
        Ok(Lab {
            on_disk: place == DISK,
            scratch,
            disk,
            size: effort.disk,
            time: effort.time,
            rounds: effort.rounds,
            more_time: effort.more_time,
            more_rounds: effort.more_rounds,
        })
    }

    pub fn place(&self) -> &Path {
        self.scratch.path()
    }

    pub fn job(&self, pattern: &'static str, block: u64, depth: u32) -> Job {
        Job {
            pattern,
            block,
            depth,
            connections: 1,
            size: self.size,
            time: self.time,
            flush_every: 0,
            one_core: false,
        }
    }

    pub fn setup(&self, job: &Job) -> Setup {
        let mut setup = Setup::disk(&self.disk);
        if job.one_core {
            setup.under = ON_ONE_CORE.map(String::from).to_vec();
        }
        if job.reads_only() {
            setup
        } else {
            setup.written()
        }
    }

    /// What a row is called, by the place of its files.
    fn named(&self, id: &str, title: &str) -> (String, String) {
        if self.on_disk {
            (format!("disk-{id}"), format!("{title}, on disk"))
        } else {
            (id.into(), title.into())
        }
    }

    pub fn cell(&self, id: &str, title: &str, job: Job) -> Cell<'_> {
        let setup = self.setup(&job);
        self.load(id, title, Kind::Rate, setup, job)
    }

    /// The rate of `job` on what `setup` starts.
    pub fn load(&self, id: &str, title: &str, kind: Kind, setup: Setup, job: Job) -> Cell<'_> {
        let job = self.timed(id, job);
        self.cell_with(id, title, kind, move |system| {
            let mut server = setup.start(system, self.place())?;
            load(&job, &mut server)
        })
    }

    /// The job with as much time as is due to the row.
    pub fn timed(&self, id: &str, job: Job) -> Job {
        let time = if goals(&self.named(id, "").0).is_empty() {
            self.time
        } else {
            self.more_time
        };
        Job { time, ..job }
    }

    pub fn cell_with<'a>(
        &'a self,
        id: &str,
        title: &str,
        kind: Kind,
        measure: impl FnMut(System) -> Measured + 'a,
    ) -> Cell<'a> {
        let (id, title) = self.named(id, title);
        Cell {
            // Two systems on two cores take turns at being lucky; one core is fair.
            rounds: if goals(&id).is_empty() || id.ends_with("-one-core") {
                self.rounds
            } else {
                self.more_rounds
            },
            id,
            title,
            kind,
            systems: System::ALL.to_vec(),
            measure: Box::new(measure),
        }
    }

    /// Over a base in which each read takes 5 ms: the rate can't be more than
    /// the requests in flight by the time that one takes.
    pub fn slow(&self, id: &str, title: &str, job: Job) -> Cell<'_> {
        let limit = f64::from(job.depth) / DELAY.as_secs_f64();
        let setup = self.setup(&job).slow();
        let mut cell = self.load(id, title, Kind::OfLimit(limit), setup, job);
        if !job.reads_only() {
            // Without a filter a write reads nothing, so the delay is not in it.
            cell.systems.retain(|system| *system != System::NoFilter);
        }
        cell
    }
}

pub fn load(job: &Job, server: &mut Server) -> Measured {
    job.run(&server.uri())
        .map_err(|error| server.explain(error).into())
}

/// Bytes that are neither zero nor alike from block to block; good enough not
/// to be compressed or merged by anything below.
fn random_file(path: &Path, size: u64) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut chunk = Vec::with_capacity(1 << 20);
    for _ in 0..size >> 20 {
        chunk.clear();
        while chunk.len() < 1 << 20 {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            chunk.extend(state.to_ne_bytes());
        }
        file.write_all(&chunk)?;
    }
    file.sync_all()
}
