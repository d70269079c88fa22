//! nbdkit in the background, as it is without `-f`.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::command::{LIMIT, eventually, signal, success};
use super::setup::Setup;

/// An nbdkit that is nobody's child any more. It ends with the value.
pub struct Daemon {
    pid: u32,
    scratch: TempDir,
}

impl Daemon {
    /// Starts nbdkit in a directory, which it leaves for the root directory before the
    /// first client comes.
    pub fn start(setup: &Setup, plugin: &[&str], tmpdir: &Path, directory: &Path) -> Daemon {
        let scratch = super::scratch();
        let pidfile = scratch.path().join("pid");
        success(&mut setup.command(plugin, tmpdir, |nbdkit| {
            nbdkit.arg("-U").arg(socket(&scratch));
            nbdkit.arg("-P").arg(&pidfile);
            nbdkit.current_dir(directory);
        }));
        let read = || fs::read_to_string(&pidfile).unwrap_or_default();
        assert!(eventually(LIMIT, || read().ends_with('\n')), "no pid file");
        let pid = read().trim().parse().expect("a process id");
        Daemon { pid, scratch }
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", socket(&self.scratch).display())
    }
}

fn socket(scratch: &TempDir) -> PathBuf {
    scratch.path().join("socket")
}

impl Drop for Daemon {
    fn drop(&mut self) {
        signal(self.pid, libc::SIGTERM);
        let ended = eventually(LIMIT, || has_ended(self.pid));
        assert!(
            ended || std::thread::panicking(),
            "the daemon ignored SIGTERM"
        );
    }
}

/// A zombie counts: process 1, whose child a daemon is, need not be one that waits for it.
pub fn has_ended(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return true;
    };
    // `PID (NAME) STATE ...`, and NAME may have spaces and parentheses.
    let state = stat.rsplit(')').next().expect("at least one piece");
    state.trim_start().starts_with('Z')
}
