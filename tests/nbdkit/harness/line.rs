//! nbdkit as its users start it: with their command lines, in which the filter goes by its
//! name.
//!
//! nbdkit looks for `cow` only in a directory that is compiled into it. So each line gets a
//! mount namespace of its own, in which the library under test lies over the file there:
//! nothing else on this system sees it. (In a chroot that works only if its root directory
//! is a mount point.)

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use super::command::{Outcome, command, outcome, run};
use super::server::Server;
use super::setup::library;

/// A command line for the shell.
pub struct Line {
    line: String,
    variables: Vec<(String, OsString)>,
    namespaces: &'static [&'static str],
}

impl Line {
    pub fn new(line: &str) -> Line {
        Line {
            line: line.into(),
            variables: Vec::new(),
            namespaces: &["--mount"],
        }
    }

    /// A variable that the line uses.
    pub fn with(mut self, name: &str, value: impl AsRef<OsStr>) -> Line {
        self.variables.push((name.into(), value.as_ref().into()));
        self
    }

    /// Runs it in a network of its own, where every port is free.
    pub fn in_own_network(mut self) -> Line {
        self.namespaces = &["--mount", "--net"];
        self
    }

    /// Starts the nbdkit of a line that has `$P` for the file of its process id, and `$S`
    /// for its socket if that is a Unix socket, and waits until it serves.
    pub fn start(self) -> Server {
        let scratch = super::scratch();
        let (pidfile, socket) = (scratch.path().join("pid"), scratch.path().join("socket"));
        let tmpdir = scratch.path().join("overlays");
        fs::create_dir(&tmpdir).expect("a directory for overlays");
        let stderr = File::create(scratch.path().join("stderr")).expect("a file for stderr");
        let mut line = self
            .with("P", &pidfile)
            .with("S", socket)
            .with("TMPDIR", &tmpdir);
        // The child is nbdkit then, not the shell.
        line.line.insert_str(0, "exec ");
        Server::spawn(line.command().stderr(stderr), &pidfile, tmpdir, scratch)
    }

    /// Runs a line that ends by itself.
    pub fn outcome(&self) -> Outcome {
        outcome(&mut self.command())
    }

    pub fn command(&self) -> Command {
        let in_namespaces = "mount --bind -- \"$1\" \"$2\"
            case $3 in *--net*) ip link set lo up ;; esac
            exec sh -c \"$0\"";
        let mut shell = command("unshare");
        shell
            .args(self.namespaces)
            .args(["sh", "-e", "-c", in_namespaces, &self.line, library()])
            .arg(filter_file())
            .arg(self.namespaces.concat())
            .envs(self.variables.iter().map(|(name, value)| (name, value)));
        shell
    }
}

/// Where nbdkit finds the filter that it ships.
fn filter_file() -> &'static PathBuf {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| {
        let config = run(&["nbdkit", "--dump-config"]);
        let directory = config
            .lines()
            .find_map(|line| line.strip_prefix("filterdir="))
            .expect("nbdkit has a directory of filters");
        PathBuf::from(directory).join("nbdkit-cow-filter.so")
    })
}

/// The command that runs another one in the network of an nbdkit.
pub fn in_network_of(server: &Server, inner: &Command) -> Command {
    let mut outer = command("nsenter");
    outer
        .arg("--net")
        .arg(format!("--target={}", server.pid()))
        .arg(inner.get_program())
        .args(inner.get_args());
    for (name, value) in inner.get_envs() {
        if let Some(value) = value {
            outer.env(name, value);
        }
    }
    if let Some(directory) = inner.get_current_dir() {
        outer.current_dir(directory);
    }
    outer
}
