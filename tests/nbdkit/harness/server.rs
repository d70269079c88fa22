//! A running nbdkit: spoken to, and looked at when it stops.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use tempfile::TempDir;

use super::command::{self, eventually, kill_group, signal, spawn};
use super::python;
use super::setup::Setup;

/// A running nbdkit. Dropping it stops it and looks at how it went, unless the
/// test has failed already; then its last words are shown.
pub struct Server {
    child: Child,
    tmpdir: PathBuf,
    before: BTreeSet<OsString>,
    scratch: TempDir,
    ended: bool,
}

/// An nbdkit has ended before it served.
pub struct Refusal {
    pub status: ExitStatus,
    pub stderr: String,
}

/// An open overlay file, as /proc shows it.
pub struct OverlayFile {
    pub mode: u32,
    pub close_on_exec: bool,
    /// In units of 512 bytes.
    pub blocks: u64,
}

impl Server {
    pub fn start(plugin: &[&str]) -> Server {
        Setup::new().start(plugin)
    }

    /// Starts this nbdkit, which writes to "stderr" in `scratch`, and waits until it serves.
    pub fn spawn(
        nbdkit: &mut Command,
        pidfile: &Path,
        tmpdir: PathBuf,
        scratch: TempDir,
    ) -> Server {
        Server::try_spawn(nbdkit, pidfile, tmpdir, scratch).unwrap_or_else(|refusal| {
            let Refusal { status, stderr } = refusal;
            panic!("{nbdkit:?} ended: {status}\n{stderr}")
        })
    }

    /// As [`Server::spawn`], for an nbdkit that may end before it serves.
    pub fn try_spawn(
        nbdkit: &mut Command,
        pidfile: &Path,
        tmpdir: PathBuf,
        scratch: TempDir,
    ) -> Result<Server, Refusal> {
        let before = listing(&tmpdir);
        let mut server = Server {
            child: spawn(nbdkit),
            before,
            tmpdir,
            scratch,
            ended: false,
        };
        let mut died = None;
        let in_time = eventually(command::LIMIT, || {
            died = server.child.try_wait().expect("wait for nbdkit");
            died.is_some() || fs::metadata(pidfile).is_ok_and(|file| file.len() > 0)
        });
        if let Some(status) = died {
            server.ended = true;
            server.assert_nothing_left();
            return Err(Refusal {
                status,
                stderr: server.stderr(),
            });
        }
        // What it said is shown when `server` is dropped.
        assert!(in_time, "{nbdkit:?} does not serve");
        Ok(server)
    }

    pub fn socket(&self) -> PathBuf {
        self.scratch.path().join("socket")
    }

    pub fn uri(&self) -> String {
        self.export_uri("")
    }

    pub fn export_uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn stderr(&self) -> String {
        let bytes = fs::read(self.scratch.path().join("stderr")).expect("nbdkit's stderr");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Runs Python code with a connection `h`; see client.py for what else it finds.
    pub fn nbdsh(&self, code: &str) -> String {
        self.nbdsh_with(&[], code)
    }

    /// As [`Server::nbdsh`], with words that the code finds in `ARGS`.
    pub fn nbdsh_with(&self, args: &[&str], code: &str) -> String {
        self.nbdsh_after("", args, code)
    }

    /// As [`Server::nbdsh_with`], with lines of Python that come first.
    pub fn nbdsh_after(&self, first: &str, args: &[&str], code: &str) -> String {
        let first = format!("h = connect()\n{first}");
        command::success(&mut self.client(&first, code, args))
    }

    /// Runs Python code that makes its own connections.
    pub fn python(&self, code: &str) -> String {
        command::success(&mut self.script(code))
    }

    /// The command that runs Python code which makes its own connections, to be
    /// started by the test.
    pub fn script(&self, code: &str) -> Command {
        self.client("", code, &[])
    }

    /// As [`Server::script`], with lines of Python that come first, and words that the
    /// code finds in `ARGS`.
    pub fn script_after(&self, first: &str, code: &str, args: &[&str]) -> Command {
        self.client(first, code, args)
    }

    fn client(&self, first: &str, code: &str, args: &[&str]) -> Command {
        python::script(self.scratch.path(), &self.socket(), first, code, args)
    }

    /// The overlay files that nbdkit has open: they have no name, so /proc is where they are seen.
    pub fn overlay_files(&self) -> Vec<OverlayFile> {
        let proc = PathBuf::from(format!("/proc/{}", self.pid()));
        let directory = fs::canonicalize(&self.tmpdir).expect("the overlay directory");
        // From a chroot, the paths of another mount namespace are seen as from outside.
        let root = fs::read_link(proc.join("root")).expect("nbdkit's root directory");
        let directory = root.join(directory.strip_prefix("/").expect("an absolute path"));
        let mut files = Vec::new();
        for entry in fs::read_dir(proc.join("fd")).expect("nbdkit's descriptors") {
            let entry = entry.expect("a descriptor");
            let target = fs::read_link(entry.path()).unwrap_or_default();
            if !target.starts_with(&directory) {
                continue;
            }
            let info = proc.join("fdinfo").join(entry.file_name());
            let seen =
                fs::metadata(entry.path()).and_then(|about| Ok((about, fs::read_to_string(info)?)));
            let (about, info) = match seen {
                // Closed since it was listed.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                seen => seen.expect("the overlay and its descriptor"),
            };
            let flags = info
                .lines()
                .find_map(|line| line.strip_prefix("flags:"))
                .expect("a line with flags");
            let flags = i32::from_str_radix(flags.trim(), 8).expect("octal flags");
            files.push(OverlayFile {
                mode: about.mode() & 0o7777,
                close_on_exec: flags & libc::O_CLOEXEC != 0,
                blocks: about.blocks(),
            });
        }
        files
    }

    /// The most memory that nbdkit has had so far, in bytes.
    pub fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("nbdkit's status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
        kilobytes
            .expect("a peak")
            .trim()
            .parse::<u64>()
            .expect("a number")
            << 10
    }

    /// What the overlay takes on the disk, in bytes.
    pub fn overlay_bytes(&self) -> u64 {
        self.overlay_files()
            .iter()
            .map(|file| file.blocks * 512)
            .sum()
    }

    /// Stops nbdkit as its user would.
    pub fn stop(mut self) {
        self.end();
    }

    /// As [`Server::stop`], and gives what nbdkit had said at its end.
    pub fn stop_and_tell(mut self) -> String {
        self.end();
        self.stderr()
    }

    /// Waits until nbdkit ends by itself, and gives what it had said.
    pub fn end_by_itself(mut self) -> String {
        self.ended = true;
        let status = command::wait(&mut self.child, command::LIMIT);
        if status.is_none() {
            kill_group(&mut self.child);
            let _ = self.child.wait();
        }
        self.look_at_the_end(status);
        self.stderr()
    }

    /// Stops nbdkit as a terminal's Ctrl-C would.
    pub fn interrupt(mut self) {
        self.end_by(libc::SIGINT);
    }

    /// Ends nbdkit as a crash would.
    pub fn kill(mut self) {
        self.ended = true;
        kill_group(&mut self.child);
        self.child.wait().expect("wait for nbdkit");
    }

    fn end(&mut self) {
        self.end_by(libc::SIGTERM);
    }

    fn end_by(&mut self, number: libc::c_int) {
        self.ended = true;
        signal(self.child.id(), number);
        let status = command::wait(&mut self.child, Duration::from_secs(60));
        if status.is_none() {
            kill_group(&mut self.child);
            let _ = self.child.wait();
        }
        self.look_at_the_end(status);
    }

    fn look_at_the_end(&self, status: Option<ExitStatus>) {
        let stderr = self.stderr();
        let status = status.unwrap_or_else(|| panic!("nbdkit does not end\n{stderr}"));
        assert!(status.success(), "nbdkit ended with {status}\n{stderr}");
        assert!(!stderr.contains("panicked"), "a panic:\n{stderr}");
        self.assert_nothing_left();
    }

    fn assert_nothing_left(&self) {
        // In the shared /var/tmp the other tests come and go.
        if self.tmpdir != Path::new("/var/tmp") {
            let left = listing(&self.tmpdir);
            assert_eq!(left, self.before, "what is in TMPDIR, after and before");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if std::thread::panicking() {
            let status = self.child.try_wait();
            kill_group(&mut self.child);
            let _ = self.child.wait();
            let said = self.stderr();
            // There may be a line for each of many requests.
            let last = said.lines().count().saturating_sub(200);
            let said: Vec<_> = said.lines().skip(last).collect();
            eprintln!("nbdkit ({status:?}) said at last:\n{}", said.join("\n"));
        } else {
            self.end();
        }
    }
}

fn listing(directory: &Path) -> BTreeSet<OsString> {
    let entries = fs::read_dir(directory).expect("the overlay directory");
    entries.map(|e| e.expect("an entry").file_name()).collect()
}
