//! Children with an end: each gets a time limit and its own process group,
//! so that a deadlock in the filter fails one test instead of hanging them all.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Long enough for the slowest step on a loaded machine, so that it only ends what is stuck.
pub const LIMIT: Duration = Duration::from_secs(120);

pub struct Outcome {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// A command that finds the administrator's tools even where PATH has no sbin.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin:/usr/bin:/bin");
    command
        .env("PATH", path)
        .env("LC_ALL", "C.UTF-8")
        // The filter reads these; what the developer has set must not decide a test.
        .env_remove("COW_LOG")
        .env_remove("TMPDIR")
        .stdin(Stdio::null());
    command
}

/// Starts a child in a process group of its own.
pub fn spawn(command: &mut Command) -> Child {
    command.process_group(0).spawn().unwrap_or_else(|error| {
        panic!(
            "{:?} could not be started: {error} (`make deps` installs what the tests need)",
            command.get_program()
        )
    })
}

/// Runs a command to its end, whatever that is.
pub fn outcome(command: &mut Command) -> Outcome {
    // Files, not pipes: a child that writes more than a pipe holds would wait for a reader.
    let mut stdout = tempfile::tempfile().expect("a file for stdout");
    let mut stderr = tempfile::tempfile().expect("a file for stderr");
    command
        .stdout(stdout.try_clone().expect("dup"))
        .stderr(stderr.try_clone().expect("dup"));
    let mut child = spawn(command);
    let in_time = wait(&mut child, LIMIT);
    let status = in_time.unwrap_or_else(|| {
        kill_group(&mut child);
        child.wait().expect("wait for a child")
    });
    let ended = Outcome {
        status,
        stdout: contents(&mut stdout),
        stderr: contents(&mut stderr),
    };
    assert!(
        in_time.is_some(),
        "{command:?} did not end within {LIMIT:?}\n{}\n{}",
        ended.stdout,
        ended.stderr
    );
    ended
}

/// Runs a command that must succeed, and gives its standard output.
pub fn success(command: &mut Command) -> String {
    let ended = outcome(command);
    assert!(
        ended.status.success(),
        "{command:?} failed: {}\n--- stdout\n{}\n--- stderr\n{}",
        ended.status,
        ended.stdout,
        ended.stderr
    );
    ended.stdout
}

/// Runs a program that must succeed, and gives its standard output.
pub fn run(words: &[&str]) -> String {
    success(command(words[0]).args(&words[1..]))
}

/// As [`run`], in a directory.
pub fn run_in(directory: &Path, words: &[&str]) -> String {
    success(command(words[0]).args(&words[1..]).current_dir(directory))
}

/// Waits until the child has ended; None when the limit comes first.
pub fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let mut ended = None;
    eventually(limit, || {
        ended = child.try_wait().expect("wait for a child");
        ended.is_some()
    });
    ended
}

/// Asks until the answer is yes; false when the limit comes first.
pub fn eventually(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        if done() {
            return true;
        }
        if start.elapsed() > limit {
            return false;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Sends a signal to one process.
pub fn signal(pid: u32, number: libc::c_int) {
    let pid = libc::pid_t::try_from(pid).expect("a process id");
    // SAFETY: kill takes two integers and touches no memory of ours.
    unsafe { libc::kill(pid, number) };
}

/// Ends a child of [`spawn`] and what it has started itself.
pub fn kill_group(child: &mut Child) {
    let group = libc::pid_t::try_from(child.id()).expect("a process id");
    // SAFETY: kill takes two integers and touches no memory of ours. The child
    // is not waited for yet, so its number can't belong to another group.
    unsafe { libc::kill(-group, libc::SIGKILL) };
}

fn contents(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.rewind().expect("rewind");
    file.read_to_end(&mut bytes)
        .expect("read what a child wrote");
    String::from_utf8_lossy(&bytes).into_owned()
}
