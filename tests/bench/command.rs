//! Children with an end: none outlives its time limit, so that a server which
//! hangs costs a cell of the table and not the run; and none outlives this process,
//! so that a run which is interrupted leaves no server behind.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Longer than any step takes; only what is stuck meets it.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A command in a known environment: what the developer has set must not decide
/// a figure.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin:/usr/bin:/bin");
    command
        .env("PATH", path)
        .env("LC_ALL", "C.UTF-8")
        .env_remove("COW_LOG")
        .env_remove("TMPDIR")
        .stdin(Stdio::null());
    end_with_us(&mut command);
    command
}

/// Has the kernel kill the child when the thread ends that starts it, which has to
/// be the main thread for this reason.
fn end_with_us(command: &mut Command) {
    let us = std::process::id();
    let before_exec = move || {
        // SAFETY: prctl with this option takes one integer and touches no memory.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) } == -1 {
            return Err(io::Error::last_os_error());
        }
        // If we ended before that call, nobody will send the signal.
        if std::os::unix::process::parent_id() != us {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: the closure runs in the child of a fork, and does nothing there but
    // two system calls: it takes no lock and allocates nothing.
    unsafe { command.pre_exec(before_exec) };
}

/// Runs a command to its end, which must be success, and gives its output and
/// the time it took.
pub fn run(command: &mut Command, limit: Duration) -> Result<(String, Duration), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let start = Instant::now();
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{name} could not be started: {error}"))?;
    let output = output_of(child, limit).ok_or_else(|| timed_out(&name, limit))?;
    let took = start.elapsed();
    let output = output.map_err(|error| format!("{name}: {error}"))?;
    if output.status.success() {
        Ok((String::from_utf8_lossy(&output.stdout).into_owned(), took))
    } else {
        let said = last_line(&String::from_utf8_lossy(&output.stderr));
        Err(format!("{name} failed ({}): {said}", output.status))
    }
}

fn timed_out(name: &str, limit: Duration) -> String {
    format!("{name} was not done after {} s", limit.as_secs())
}

/// None when the limit came first; the child is killed then.
fn output_of(child: Child, limit: Duration) -> Option<io::Result<Output>> {
    let pid = child.id();
    let (sender, receiver) = mpsc::channel();
    // Blocks in the kernel until the child ends: looking again and again would
    // add its pauses to the time.
    let waiter = thread::spawn(move || {
        let _ = sender.send(child.wait_with_output());
    });
    let ended = receiver.recv_timeout(limit).ok();
    if ended.is_none() {
        signal(pid, libc::SIGKILL);
    }
    let _ = waiter.join();
    ended
}

/// Sends a signal to one child that was not waited for yet.
pub fn signal(pid: u32, number: libc::c_int) {
    let pid = libc::pid_t::try_from(pid).expect("a process id");
    // SAFETY: kill takes two integers and touches no memory of ours.
    unsafe { libc::kill(pid, number) };
}

/// Ends a server: asks first, then insists.
pub fn end(child: &mut Child, patience: Duration) {
    signal(child.id(), libc::SIGTERM);
    if wait(child, patience).is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// None if it has not ended when `patience` has.
pub fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    while start.elapsed() < patience {
        match child.try_wait() {
            Ok(None) => thread::sleep(Duration::from_millis(1)),
            ended => return ended.ok().flatten(),
        }
    }
    None
}

/// The last line that says something.
pub fn last_line(text: &str) -> String {
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    line.unwrap_or("it said nothing").trim().to_string()
}
