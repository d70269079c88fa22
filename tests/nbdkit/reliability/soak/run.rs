//! One nbdkit, from its start to its end or its death, with all the clients.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::Places;
use super::client::{Client, Halt};
use super::mix::{Kind, Mix, OnRead, Random};
use super::region::{Disk, Region};
use super::tally::Tally;
use super::wire::Target;
use crate::harness::command::{eventually, signal};
use crate::harness::{Server, Setup};

pub struct Run<'a> {
    pub mix: &'a Mix,
    pub disk: &'a Disk,
    pub places: &'a Places,
    /// Of the runs of its round, from 1.
    pub number: u64,
    pub duration: Duration,
    /// At the end nbdkit is killed, in the midst of everything.
    pub kill: bool,
}

/// Those of the filter, which may not have been started when it was looked at first.
const OWN_THREADS: u64 = 3;

/// What a process has.
#[derive(Clone, Copy, Debug)]
struct Holds {
    memory: u64,
    threads: u64,
    files: u64,
}

impl Holds {
    fn of(pid: u32) -> Holds {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("nbdkit's status");
        let number = |key: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            let word = line.and_then(|line| line.split_whitespace().next());
            word.and_then(|word| word.parse().ok()).expect("a number")
        };
        let files = fs::read_dir(format!("/proc/{pid}/fd")).expect("nbdkit's files");
        Holds {
            memory: number("VmRSS:") << 10,
            threads: number("Threads:"),
            files: files.count() as u64,
        }
    }
}

impl Run<'_> {
    /// The regions go on from what the run before has left.
    pub fn run(&self, regions: &mut [Region], tally: &mut Tally) -> Result<(), String> {
        let server = self.start();
        let at_start = Holds::of(server.pid());
        let target = Target::new(server.pid(), server.socket());
        let result = thread::scope(|scope| {
            let clients: Vec<_> = regions
                .iter_mut()
                .map(|region| {
                    let target = &target;
                    scope.spawn(move || self.client(target, region))
                })
                .collect();
            self.watch(&target);
            if self.kill && !target.stops() {
                target.killed.store(true, Ordering::Release);
                signal(server.pid(), libc::SIGKILL);
            }
            target.stop.store(true, Ordering::Release);
            let mut faults = Vec::new();
            for client in clients {
                match client.join() {
                    Ok((done, fault)) => {
                        tally.add(done);
                        faults.extend(fault);
                    }
                    Err(_) => faults.push("a client has panicked".into()),
                }
            }
            match faults.is_empty() {
                true => Ok(()),
                false => Err(faults.join("\n")),
            }
        });
        let result = result.and_then(|()| match target.is_killed() {
            true => Ok(()),
            false => self.look_at_what_is_held(server.pid(), at_start),
        });
        match result {
            Ok(()) if target.is_killed() => server.kill(),
            Ok(()) => server.stop(),
            Err(fault) => {
                self.keep_overlay_files(&server);
                let log = self.places.directory.path().join("nbdkit.log");
                fs::write(log, server.stderr()).expect("a copy of nbdkit's log");
                server.kill();
                return Err(format!("run {}: {fault}", self.number));
            }
        }
        Ok(())
    }

    fn start(&self) -> Server {
        let mut setup = Setup::new()
            .option(&format!("--threads={}", self.mix.threads))
            .tmpdir(&self.places.overlays())
            // Of freed memory, the C library keeps little then.
            .env("MALLOC_MMAP_THRESHOLD_", "65536");
        if self.mix.base_takes.is_some() {
            setup = setup.below("delay");
        }
        let base = self.places.base();
        let mut words = vec!["file".into(), format!("file={}", base.display())];
        words.extend(self.mix.parameters());
        let (switch, image) = (self.places.switch(), self.places.image());
        let stats = self.places.stats();
        words.extend(self.mix.parameters_of_places(&switch, &image, &stats));
        setup.start(&words.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// A client from its start to its end: what it did, and what was wrong.
    fn client(&self, target: &Target, region: &mut Region) -> (Tally, Option<String>) {
        let number = region.number;
        let mut client = Client::new(self.mix, self.disk, target, region, self.number);
        let fault = match client.run() {
            Ok(()) | Err(Halt::Killed) => None,
            Err(Halt::Fault(fault)) => {
                target.fault.store(true, Ordering::Release);
                target.stop.store(true, Ordering::Release);
                Some(fault)
            }
        };
        // The reason may be what a neighbour has sent, or be found after the kill.
        if target.is_killed() || target.fault.load(Ordering::Acquire) {
            let file = self
                .places
                .directory
                .path()
                .join(format!("requests-{number}"));
            write_steps(&client, &file).expect("a file for the requests");
        }
        (std::mem::take(&mut client.tally), fault)
    }

    /// Switches cow-on-read on and off until the time is over or something is wrong.
    fn watch(&self, target: &Target) {
        let end = Instant::now() + self.duration;
        let mut random = Random::new(self.mix.seed ^ (self.number << 8));
        let switch = self.places.switch();
        while Instant::now() < end && !target.stops() {
            if self.mix.on_read == OnRead::Switched {
                let _ = match random.once_in(2) {
                    true => fs::write(&switch, ""),
                    false => fs::remove_file(&switch),
                };
            }
            thread::sleep(Duration::from_millis(1 + random.below(200)));
        }
    }

    /// When the clients have gone, nbdkit holds what the overlay needs and no more: 2 bits
    /// for each block that was written, and a slot of 8 bytes for 2048 blocks.
    fn look_at_what_is_held(&self, pid: u32, at_start: Holds) -> Result<(), String> {
        // A file of the overlay, and one to spare.
        let files = match self.mix.kind {
            Kind::PerConnection => at_start.files,
            _ => at_start.files + 2,
        };
        // Of the library that allocates memory, mostly; seen were 8 MiB.
        const ROOM: u64 = 32 << 20;
        let memory = at_start.memory + ROOM + self.mix.size / self.mix.block / 64;
        let mut now = at_start;
        let fits = eventually(Duration::from_secs(30), || {
            now = Holds::of(pid);
            now.threads <= at_start.threads + OWN_THREADS
                && now.files <= files
                && now.memory <= memory
        });
        if !fits {
            return Err(format!(
                "nbdkit keeps {now:?}, and had {at_start:?} at its start"
            ));
        }
        Ok(())
    }

    /// Copies the overlay's files, which have no name.
    fn keep_overlay_files(&self, server: &Server) {
        let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", server.pid())) else {
            return;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            let is_overlay =
                fs::read_link(&path).is_ok_and(|to| to.starts_with(self.places.overlays()));
            if is_overlay {
                let name = format!("overlay-{}", entry.file_name().to_string_lossy());
                let from = path.to_str().expect("a path in /proc");
                let to = self.places.directory.path().join(name);
                let to = to.to_str().expect("a path of our own making");
                crate::harness::run(&["cp", "--sparse=always", from, to]);
            }
        }
    }
}

fn write_steps(client: &Client<'_>, file: &Path) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(file)?);
    for step in &client.steps {
        writeln!(file, "{step}")?;
    }
    file.flush()
}
