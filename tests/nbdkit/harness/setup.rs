//! How nbdkit is started, with the filter under test: as a server on a socket of its
//! own, or so that it ends by itself.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::command::{self, Outcome, command, outcome};
use super::python;
use super::server::{Refusal, Server};

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
    under: Vec<String>,
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
    pub fn file_size_limit(self, bytes: u64) -> Setup {
        self.under(&["prlimit", &format!("--fsize={bytes}")])
    }

    /// A program with arguments that runs the command which follows them.
    pub fn under(mut self, words: &[&str]) -> Setup {
        self.under.extend(words.iter().map(|word| word.to_string()));
        self
    }

    /// Starts nbdkit and waits until it serves.
    pub fn start(&self, plugin: &[&str]) -> Server {
        self.try_start(plugin).unwrap_or_else(|refusal| {
            let Refusal { status, stderr } = refusal;
            panic!("nbdkit {plugin:?} ended: {status}\n{stderr}")
        })
    }

    /// As [`Setup::start`], for an nbdkit that may end before it serves.
    pub fn try_start(&self, plugin: &[&str]) -> Result<Server, Refusal> {
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
        Server::try_spawn(&mut nbdkit, &pidfile, tmpdir, scratch)
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
        only_error(&self.refusal(plugin))
    }

    /// Runs nbdkit with `--run` and this shell command, and gives what both said.
    pub fn run(&self, plugin: &[&str], shell: &str) -> Outcome {
        let scratch = super::scratch();
        let tmpdir = self.overlays(scratch.path());
        outcome(&mut self.command(plugin, &tmpdir, |nbdkit| {
            nbdkit.args(["-U", "-", "--run", shell]);
        }))
    }

    /// As [`Server::nbdsh_after`], with the client as the command of `--run`: nbdkit
    /// ends when it does.
    pub fn run_nbdsh(&self, plugin: &[&str], first: &str, args: &[&str], code: &str) {
        let scratch = super::scratch();
        let tmpdir = self.overlays(scratch.path());
        let socket = scratch.path().join("socket");
        let first = format!("h = connect()\n{first}");
        let script = python::script(scratch.path(), &socket, &first, code, args);
        let quoted = |word: &OsStr| format!("'{}'", word.to_str().expect("a word of our own"));
        let words: Vec<_> = [script.get_program()]
            .into_iter()
            .chain(script.get_args())
            .map(quoted)
            .collect();
        let mut nbdkit = self.command(plugin, &tmpdir, |nbdkit| {
            nbdkit.env("NBD_SOCKET", &socket);
            nbdkit.arg("-U").arg(&socket);
            nbdkit.args(["--run", &words.join(" ")]);
        });
        command::success(&mut nbdkit);
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
        let mut words = self.under.iter().map(String::as_str).chain(["nbdkit"]);
        let mut nbdkit = command(words.next().expect("nbdkit at least"));
        nbdkit.args(words);
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

fn only_error(stderr: &str) -> String {
    let errors: Vec<_> = stderr.lines().filter(|l| l.contains("error: ")).collect();
    assert_eq!(errors.len(), 1, "one error message, not {stderr:?}");
    errors[0].to_string()
}
