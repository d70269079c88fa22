//! nbdkit with the filter: started on a socket of its own, and looked at when it stops.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::OnceLock;
use std::time::Duration;

use tempfile::TempDir;

use super::command::{self, Outcome, command, eventually, kill_group, outcome, signal, spawn};
use super::python;

/// The library under test.
pub fn library() -> &'static str {
    static FOUND: OnceLock<String> = OnceLock::new();
    FOUND.get_or_init(|| {
        let path = match std::env::var_os("COW_FILTER") {
            Some(path) => PathBuf::from(path),
            None => std::env::current_exe()
                .expect("the path of this executable")
                .with_file_name("libnbdkit_cow_filter.so"),
        };
        assert!(
            path.is_file(),
            "the library to be tested is not at {}: `cargo build` makes it",
            path.display()
        );
        path.into_os_string().into_string().expect("a UTF-8 path")
    })
}

/// How nbdkit is to be started; the default is one filter and nothing else.
#[derive(Default)]
pub struct Setup {
    options: Vec<String>,
    above: Vec<String>,
    below: Vec<String>,
    env: Vec<(String, String)>,
    tmpdir: Option<PathBuf>,
    without_tmpdir: bool,
    file_size_limit: Option<u64>,
}

impl Setup {
    pub fn new() -> Setup {
        Setup::default()
    }

    /// An option of nbdkit itself.
    pub fn option(mut self, option: &str) -> Setup {
        self.options.push(option.into());
        self
    }

    /// A filter between the client and ours.
    pub fn above(mut self, filter: &str) -> Setup {
        self.above.push(format!("--filter={filter}"));
        self
    }

    /// A filter between ours and the plugin.
    pub fn below(mut self, filter: &str) -> Setup {
        self.below.push(format!("--filter={filter}"));
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Setup {
        self.env.push((name.into(), value.into()));
        self
    }

    /// The directory of the overlays, instead of a fresh one.
    pub fn tmpdir(mut self, directory: &Path) -> Setup {
        self.tmpdir = Some(directory.into());
        self
    }

    /// No TMPDIR in nbdkit's environment.
    pub fn without_tmpdir(mut self) -> Setup {
        self.without_tmpdir = true;
        self.tmpdir("/var/tmp".as_ref())
    }

    /// As after `ulimit -f`, in bytes.
    pub fn file_size_limit(mut self, bytes: u64) -> Setup {
        self.file_size_limit = Some(bytes);
        self
    }

    /// Starts nbdkit and waits until it serves.
    pub fn start(&self, plugin: &[&str]) -> Server {
        let scratch = super::scratch();
        let tmpdir = self.overlays(scratch.path());
        let stderr = scratch.path().join("stderr");
        let pidfile = scratch.path().join("pid");
        let mut nbdkit = self.command(plugin, &tmpdir, |nbdkit| {
            nbdkit.args(["-f", "--exit-with-parent", "-U"]);
            nbdkit.arg(scratch.path().join("socket"));
            nbdkit.arg("-P").arg(&pidfile);
        });
        nbdkit.stderr(File::create(&stderr).expect("a file for stderr"));
        let before = listing(&tmpdir);
        let mut server = Server {
            child: spawn(&mut nbdkit),
            before,
            tmpdir,
            scratch,
            ended: false,
        };
        let mut died = None;
        eventually(command::LIMIT, || {
            died = server.child.try_wait().expect("wait for nbdkit");
            died.is_some() || fs::metadata(&pidfile).is_ok_and(|file| file.len() > 0)
        });
        if let Some(status) = died {
            server.ended = true;
            panic!("{nbdkit:?} ended: {status}\n{}", server.stderr());
        }
        server
    }

    /// Starts nbdkit with parameters that it must refuse, and gives what it said.
    pub fn refusal(&self, plugin: &[&str]) -> String {
        let scratch = super::scratch();
        let tmpdir = self.overlays(scratch.path());
        let mut nbdkit = self.command(plugin, &tmpdir, |nbdkit| {
            // What nbdkit runs once it serves: that it did not is part of a refusal.
            nbdkit.args(["-U", "-", "--run", "echo it serves"]);
        });
        let Outcome {
            status,
            stdout,
            stderr,
        } = outcome(&mut nbdkit);
        assert_eq!(stdout, "", "{nbdkit:?} was not refused: {stderr}");
        assert_eq!(status.code(), Some(1), "{nbdkit:?}: {status}\n{stderr}");
        stderr
    }

    /// As [`Setup::refusal`], when one error message is all there may be.
    pub fn error(&self, plugin: &[&str]) -> String {
        let stderr = self.refusal(plugin);
        let errors: Vec<_> = stderr.lines().filter(|l| l.contains("error: ")).collect();
        assert_eq!(errors.len(), 1, "one error message, not {stderr:?}");
        errors[0].to_string()
    }

    /// Runs nbdkit in a way that ends by itself, such as `--help`.
    pub fn output(&self, plugin: &[&str]) -> Outcome {
        let scratch = super::scratch();
        let tmpdir = self.overlays(scratch.path());
        outcome(&mut self.command(plugin, &tmpdir, |_| {}))
    }

    fn overlays(&self, scratch: &Path) -> PathBuf {
        self.tmpdir.clone().unwrap_or_else(|| {
            let own = scratch.join("overlays");
            fs::create_dir(&own).expect("a directory for overlays");
            own
        })
    }

    /// Options come before the plugin, and what follows the plugin is its parameters.
    pub fn command(
        &self,
        plugin: &[&str],
        tmpdir: &Path,
        options: impl FnOnce(&mut Command),
    ) -> Command {
        let mut nbdkit = match self.file_size_limit {
            None => command("nbdkit"),
            Some(bytes) => {
                let mut prlimit = command("prlimit");
                prlimit.arg(format!("--fsize={bytes}")).arg("nbdkit");
                prlimit
            }
        };
        if !self.without_tmpdir {
            nbdkit.env("TMPDIR", tmpdir);
        }
        nbdkit.envs(self.env.iter().map(|(name, value)| (name, value)));
        options(&mut nbdkit);
        nbdkit.args(&self.options).args(&self.above);
        nbdkit.arg(format!("--filter={}", library()));
        nbdkit.args(&self.below).args(plugin);
        nbdkit
    }
}

/// A running nbdkit. Dropping it stops it and looks at how it went, unless the
/// test has failed already; then its last words are shown.
pub struct Server {
    child: Child,
    tmpdir: PathBuf,
    before: BTreeSet<OsString>,
    scratch: TempDir,
    ended: bool,
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

    fn client(&self, first: &str, code: &str, args: &[&str]) -> Command {
        python::script(self.scratch.path(), &self.socket(), first, code, args)
    }

    /// The overlay files that nbdkit has open: they have no name, so /proc is where they are seen.
    pub fn overlay_files(&self) -> Vec<OverlayFile> {
        let proc = PathBuf::from(format!("/proc/{}", self.pid()));
        let directory = fs::canonicalize(&self.tmpdir).expect("the overlay directory");
        let mut files = Vec::new();
        for entry in fs::read_dir(proc.join("fd")).expect("nbdkit's descriptors") {
            let entry = entry.expect("a descriptor");
            let target = fs::read_link(entry.path()).unwrap_or_default();
            if !target.starts_with(&directory) {
                continue;
            }
            let about = fs::metadata(entry.path()).expect("the overlay");
            let info = fs::read_to_string(proc.join("fdinfo").join(entry.file_name()))
                .expect("the descriptor's flags");
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

    /// Ends nbdkit as a crash would.
    pub fn kill(mut self) {
        self.ended = true;
        kill_group(&mut self.child);
        self.child.wait().expect("wait for nbdkit");
    }

    fn end(&mut self) {
        self.ended = true;
        signal(self.child.id(), libc::SIGTERM);
        let status = command::wait(&mut self.child, Duration::from_secs(60));
        if status.is_none() {
            kill_group(&mut self.child);
            let _ = self.child.wait();
        }
        self.look_at_the_end(status);
    }

    fn look_at_the_end(&self, status: Option<ExitStatus>) {
        let stderr = self.stderr();
        let status = status.unwrap_or_else(|| panic!("nbdkit ignored SIGTERM\n{stderr}"));
        assert!(status.success(), "nbdkit ended with {status}\n{stderr}");
        assert!(!stderr.contains("panicked"), "a panic:\n{stderr}");
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
            eprintln!("nbdkit ({status:?}) said:\n{}", self.stderr());
        } else {
            self.end();
        }
    }
}

fn listing(directory: &Path) -> BTreeSet<OsString> {
    let entries = fs::read_dir(directory).expect("the overlay directory");
    entries.map(|e| e.expect("an entry").file_name()).collect()
}
