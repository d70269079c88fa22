//! strace: which system calls the library makes, and what it sees of a thread.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Child;

use crate::harness::Server;
use crate::harness::command::{LIMIT, command, eventually, spawn, wait};
use crate::harness::setup::library;

/// Which thread of nbdkit makes a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It starts nbdkit and ends it.
    Main,
    /// All requests of the client.
    Connection,
    /// It gives space back.
    Reclaim,
}

/// What is not made to fail. Everything else that the library calls is.
const LEFT_ALONE: &[(&str, &[&str])] = &[
    (
        "the system does not fail it for what it is called with here",
        &[
            "getegid",
            "geteuid",
            "getgid",
            "getuid",
            "getgroups",
            "getpid",
            "gettid",
            "getrandom",
            "prctl",
            "rt_sigaction",
            "rt_sigprocmask",
            "rt_sigreturn",
            "sched_getaffinity",
            "sched_yield",
            "set_robust_list",
            "rseq",
            "clock_gettime",
            "clock_nanosleep",
        ],
    ),
    (
        "what does not happen is a leak, of which nobody is told",
        &["close", "munmap", "madvise", "exit", "exit_group"],
    ),
    (
        "of no file of ours: the log, numbers of the kernel's that the C library asks for, \
         and paths that nbdkit looks at",
        &["read", "readlink", "write"],
    ),
    (
        "it is how threads wait, and the C library ends a process of which it fails",
        &["futex"],
    ),
];

/// A call that the library makes, or that is made on its behalf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub name: String,
    /// It is the *n*th of its name in its thread, from 1 on.
    pub n: usize,
    /// It is the library's own. Else the layer below has made it, which nbdkit calls for
    /// the library.
    pub is_own: bool,
}

/// The calls of a thread of which strace has written this with `-k`.
///
/// Whose call it is tells its stack: the library is on it, or it is nbdkit's own.
pub fn calls(log: &Path) -> Vec<Call> {
    let text = fs::read_to_string(log).expect("what strace has written");
    let library = fs::canonicalize(library()).expect("the library under test");
    let mut calls: Vec<(String, Vec<PathBuf>)> = Vec::new();
    for line in text.lines() {
        if let Some(frame) = line.strip_prefix(" > ") {
            // FILE(FUNCTION+OFFSET) [ADDRESS]
            let file = frame.split(['(', '[']).next().unwrap_or_default().trim();
            if let Some((_, stack)) = calls.last_mut() {
                stack.push(file.into());
            }
        } else if let Some((name, _)) = line.split_once('(') {
            if name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
                calls.push((name.into(), Vec::new()));
            }
        }
    }
    let mut found = Vec::new();
    for (index, (name, stack)) in calls.iter().enumerate() {
        // The C library starts a thread by a function that no stack can be told of. Just
        // before it blocks the signals, by a call that has one.
        let is_start = name.starts_with("clone") && index > 0;
        let stack = if is_start { &calls[index - 1].1 } else { stack };
        let outside: Vec<_> = stack.iter().filter(|file| !is_of_c(file)).collect();
        if !outside.contains(&&library) || is_left_alone(name) {
            continue;
        }
        let before = &calls[..index];
        found.push(Call {
            name: name.clone(),
            n: 1 + before.iter().filter(|(other, _)| other == name).count(),
            is_own: *outside[0] == library,
        });
    }
    found
}

fn is_left_alone(name: &str) -> bool {
    LEFT_ALONE.iter().any(|(_, names)| names.contains(&name))
}

/// The C library and the loader, which everybody calls.
fn is_of_c(file: &Path) -> bool {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    [
        "libc.so",
        "libc-",
        "libpthread",
        "ld-linux",
        "ld-",
        "[vdso]",
    ]
    .iter()
    .any(|start| name.starts_with(start))
}

/// Has strace see a thread of nbdkit, of which a client has just been greeted. The first
/// thread was seen from its start on.
pub fn attach(server: &Server, place: Place, options: &[&str], log: &Path) -> Option<Child> {
    let is_reclaim = match place {
        Place::Main => return None,
        Place::Connection => false,
        Place::Reclaim => true,
    };
    let mut thread = None;
    eventually(LIMIT, || {
        let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).expect("its threads");
        let threads = tasks.map(|task| task.expect("a thread").path());
        let is_named = |task: &PathBuf, name| {
            let found = fs::read_to_string(task.join("comm")).unwrap_or_default();
            found.starts_with(name)
        };
        // The one that counts failures in the log makes no calls that matter.
        let (reclaim, others): (Vec<_>, Vec<_>) = threads
            .filter(|task| !task.ends_with(server.pid().to_string()))
            .filter(|task| !is_named(task, "cow-log"))
            .partition(|task| is_named(task, "cow-reclaim"));
        // A new thread has the name of the one that has made it for a moment.
        thread = match (&reclaim[..], &others[..]) {
            ([reclaim], [_]) if is_reclaim => Some(reclaim.clone()),
            ([_], [connection]) => Some(connection.clone()),
            _ => None,
        };
        thread.is_some()
    });
    let thread = thread.expect("the thread");
    let said = log.with_extension("stderr");
    let mut strace = command("strace");
    strace
        .args(options)
        .arg("-o")
        .arg(log)
        .arg("-p")
        .arg(thread.file_name().expect("a number"))
        .stderr(File::create(&said).expect("a file for its stderr"));
    let child = spawn(&mut strace);
    assert!(
        eventually(LIMIT, || has_written(&said, "attached")),
        "strace is not attached"
    );
    Some(child)
}

/// strace ends with what it has seen.
pub fn wait_for_strace(attached: &mut Option<Child>, log: &Path) {
    let ended = match attached {
        Some(strace) => wait(strace, LIMIT).is_some(),
        None => eventually(LIMIT, || has_written(log, "+++ exited")),
    };
    assert!(ended, "strace goes on");
}

pub fn has_written(file: &Path, words: &str) -> bool {
    fs::read_to_string(file).is_ok_and(|text| text.contains(words))
}
