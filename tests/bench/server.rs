//! A running server, and what can be seen of its process from outside.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::command;
use super::nbd::Client;

/// How long a server may take until it answers; under callgrind it takes seconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where a server listens that has this directory.
pub fn socket_in(own: &Path) -> PathBuf {
    own.join("socket")
}

/// A running server; dropping it ends it and removes what it had written.
pub struct Server {
    child: Child,
    own: TempDir,
    /// From the start of the process until a client had connected.
    pub start_up: Duration,
    _below: Option<Box<Server>>,
}

impl Server {
    /// Starts a command as a server with a directory of its own, and waits until a client
    /// has connected. `below` goes with it.
    pub fn start(
        mut command: Command,
        own: TempDir,
        below: Option<Box<Server>>,
    ) -> Result<Server, String> {
        let said = |error: std::io::Error| format!("the server could not be started: {error}");
        command.stderr(File::create(own.path().join("stderr")).map_err(said)?);
        command.stdout(File::create(own.path().join("stdout")).map_err(said)?);
        let start = Instant::now();
        let child = command.spawn().map_err(said)?;
        let mut server = Server {
            child,
            own,
            start_up: Duration::ZERO,
            _below: below,
        };
        server.wait_until_it_answers(start)?;
        Ok(server)
    }

    fn wait_until_it_answers(&mut self, start: Instant) -> Result<(), String> {
        while start.elapsed() < PATIENCE {
            match Client::connect(&self.socket()) {
                Ok(_) => {
                    self.start_up = start.elapsed();
                    return Ok(());
                }
                // It answers, and says no.
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                    return Err(format!("refuses the client: {}", self.last_words()));
                }
                Err(_) => {}
            }
            if let Ok(Some(_)) = self.child.try_wait() {
                return Err(format!("does not start: {}", self.last_words()));
            }
            thread::sleep(Duration::from_micros(200));
        }
        Err("does not answer".into())
    }

    pub fn socket(&self) -> PathBuf {
        socket_in(self.own.path())
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    pub fn client(&self) -> Result<Client, String> {
        Client::connect(&self.socket()).map_err(|error| format!("no connection: {error}"))
    }

    /// If the server has died meanwhile, that is why a client failed.
    pub fn explain(&mut self, error: String) -> String {
        // A crash takes a moment to become an exit status.
        thread::sleep(Duration::from_millis(20));
        match self.child.try_wait() {
            Ok(Some(status)) => format!("ended with {status}: {}", self.last_words()),
            _ => error,
        }
    }

    /// What it said last, without the names of our directories.
    fn last_words(&self) -> String {
        let stderr = fs::read_to_string(self.own.path().join("stderr")).unwrap_or_default();
        let line = command::last_line(&stderr);
        let own = self.own.path();
        let place = own.parent().unwrap_or(own);
        let line = line
            .replace(&own.display().to_string(), "...")
            .replace(&place.display().to_string(), "...");
        // qemu's temporary overlay has another name each time.
        match line.find("vl.") {
            Some(at) if line.is_char_boundary(at + 9) => [&line[..at], &line[at + 9..]].concat(),
            _ => line,
        }
    }

    /// What is in memory of the process now, in bytes.
    pub fn memory(&self) -> Result<u64, String> {
        resident(&format!("/proc/{}/status", self.child.id()))
    }

    /// The processor time, of the user and of the system, that the kernel has charged the
    /// process for until now: all of its threads, those that have ended too.
    ///
    /// In nanoseconds, where `/proc/PID/stat` counts hundredths of a second. A thread that
    /// is running just now is charged when it sleeps, at the latest with the next tick.
    pub fn processor_time(&self) -> Result<Duration, String> {
        let pid = libc::pid_t::try_from(self.child.id()).expect("a process id");
        let mut clock = 0;
        // SAFETY: the clock's number is written to `clock`, which outlives the call.
        let errno = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
        if errno != 0 {
            let error = std::io::Error::from_raw_os_error(errno);
            return Err(format!("no clock of its processor time: {error}"));
        }
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the time is written to `time`, which outlives the call.
        if unsafe { libc::clock_gettime(clock, &raw mut time) } == -1 {
            let error = std::io::Error::last_os_error();
            return Err(format!("its processor time: {error}"));
        }
        Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
    }

    /// What the files take that the server has open for its overlays, in bytes.
    pub fn overlay_bytes(&self) -> Result<u64, String> {
        let unseen = |error: std::io::Error| format!("its open files can't be seen: {error}");
        let mut bytes = 0;
        for entry in fs::read_dir(format!("/proc/{}/fd", self.child.id())).map_err(unseen)? {
            let descriptor = entry.map_err(unseen)?.path();
            let target = match fs::read_link(&descriptor) {
                // A connection that was closed just now.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                target => target.map_err(unseen)?,
            };
            let log = target.ends_with("stderr") || target.ends_with("stdout");
            if target.starts_with(self.own.path()) && !log {
                bytes += fs::metadata(&descriptor).map_err(unseen)?.blocks() * 512;
            }
        }
        Ok(bytes)
    }

    /// Ends the process as its user would, so that a tool which runs it can report,
    /// and gives the time that it took.
    pub fn stop(mut self) -> Duration {
        let start = Instant::now();
        let pid = self.child.id();
        // perf runs it as a child, and tells nothing when it is ended itself.
        let below = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let below = below.ok().and_then(|pids| pids.trim().parse().ok());
        command::signal(below.unwrap_or(pid), libc::SIGTERM);
        if command::wait(&mut self.child, command::LIMIT).is_none() {
            command::end(&mut self.child, Duration::ZERO);
        }
        start.elapsed()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        command::end(&mut self.child, Duration::from_secs(2));
    }
}

/// VmRSS in a `/proc/.../status`, in bytes.
pub fn resident(status: &str) -> Result<u64, String> {
    let text = fs::read_to_string(status).map_err(|error| format!("no status: {error}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .and_then(|number| number.trim().parse::<u64>().ok())
        .map(|kilobytes| kilobytes << 10)
        .ok_or_else(|| "no VmRSS in the status".into())
}
