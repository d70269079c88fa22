//! Every system call fails once.
//!
//! strace makes a call of nbdkit's fail, each call that the library makes, in a run of its
//! own. What nbdkit itself calls (its socket, its threads, its log) is not ours, and is left
//! alone. Which is whose is told by the stack of each call in a first run, in which nothing
//! fails: if the library is on it, the call is made by the library, or for it by the layer
//! below. That run also counts: the second `pwrite64` of a thread is the second one in each
//! run, because the client asks for the same each time.
//!
//! strace counts the calls of each thread by themselves, and with `-f` it would make one
//! call fail in each thread. So it sees one thread at a time: the first one, which starts
//! and ends nbdkit, from its start on; that of the connection, in which all requests are
//! done (`-t1`), from before the client chooses its export; or that which gives space back.
//!
//! There are more calls than errnos, so the errnos take turns: each call fails once, and
//! with each errno some call of each name. `COW_EVERY_ERRNO=1` has each call fail
//! with each errno, which takes about ten minutes.
//!
//! What strace can't do is to have a call do a part of its work: a shorter count alone would
//! be a lie. `short` has a library in C for that, which lies before the C library.

mod case;
mod disk;
mod ground;
mod script;
mod short;
mod strace;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use case::{Case, Fault};
use ground::{Ground, Kind};
use strace::Place;

const ERRNOS: [&str; 8] = [
    "EIO",
    "ENOSPC",
    "EDQUOT",
    "EINTR",
    "EAGAIN",
    "EOPNOTSUPP",
    "ENOMEM",
    "EACCES",
];

/// The calls that have to be there, so that none goes untried without being seen. (The C
/// library decides whether memory comes from `mmap` or `brk`, and by which call the plugin
/// asks for the size of the base: `newfstatat` or `fstat`.)
const OF_ALL: [&str; 8] = [
    "pread64",
    "pwrite64",
    "fallocate",
    "ftruncate",
    "openat",
    "ioctl",
    "statx",
    "clone3",
];
const OF_KEPT_ONES: [&str; 5] = ["pwritev2", "fdatasync", "fsync", "renameat2", "fcntl"];
/// Nothing that is temporary has to be safe from power loss, or gets a name.
const NOT_OF_TEMPORARY_ONES: [&str; 4] = ["pwritev2", "fdatasync", "fsync", "renameat2"];

/// So many run at once: each waits for strace and for the disk much of the time.
const AT_ONCE: usize = 4;

fn faults(name: &str) -> Vec<Fault> {
    let errnos = ERRNOS.into_iter().map(Fault::Errno);
    match name {
        "brk" => vec![Fault::Nothing],
        "pread64" | "pwrite64" | "pwritev2" => errnos.chain([Fault::Nothing]).collect(),
        _ => errnos.collect(),
    }
}

/// Each call once at least, and with each fault some call of its name.
fn plan(ground: &Ground, threads: &[(Kind, Place)]) -> Vec<Case> {
    let mut by_name = BTreeMap::<String, Vec<_>>::new();
    for &(kind, place) in threads {
        for call in ground.calls(kind, place) {
            // What is below is the same whatever overlay is above.
            if call.is_own || matches!(kind, Kind::Temporary | Kind::New) {
                let calls = by_name.entry(call.name.clone()).or_default();
                calls.push((kind, place, call));
            }
        }
    }
    let mut cases = Vec::new();
    for (name, calls) in by_name {
        let faults = faults(&name);
        let count = match std::env::var_os("COW_EVERY_ERRNO") {
            Some(_) => calls.len() * faults.len(),
            None => calls.len().max(faults.len()),
        };
        for number in 0..count {
            let (kind, place, call) = calls[number % calls.len()].clone();
            // Each time round it begins with another one.
            let fault = faults[(number + number / calls.len()) % faults.len()];
            cases.push(Case {
                kind,
                place,
                call,
                fault,
            });
        }
    }
    cases
}

/// What came of a case that is not as it should be.
#[derive(Default)]
struct Wrong {
    failed: Vec<String>,
    missed: Vec<String>,
}

/// Runs all of the cases, and gives the names of the calls that have failed in them.
fn run(threads: &[(Kind, Place)]) -> Vec<String> {
    // The tests of this file take turns.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let ground = Ground::new();
    let cases = plan(&ground, threads);
    let mut names: Vec<_> = cases.iter().map(|case| case.call.name.clone()).collect();
    names.dedup();
    let count = cases.len();
    let queue = Mutex::new(cases.into_iter());
    let wrong = Mutex::new(Wrong::default());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some(case) = next() {
            let done = catch_unwind(AssertUnwindSafe(|| reached(&ground, &case)));
            let mut wrong = wrong.lock().unwrap_or_else(PoisonError::into_inner);
            match done {
                Ok(true) => {}
                Ok(false) => wrong.missed.push(format!("{case:?}")),
                Err(why) => {
                    let words = why.downcast_ref::<String>().map(String::as_str);
                    let words = words.or(why.downcast_ref::<&str>().copied());
                    wrong.failed.push(format!("{case:?}: {words:?}"));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(work);
        }
    });
    let Wrong { failed, missed } = wrong.into_inner().unwrap_or_else(PoisonError::into_inner);
    assert!(
        failed.is_empty() && missed.is_empty(),
        "of {count} cases these failed:\n{}\nand in these the call was not made:\n{}",
        failed.join("\n"),
        missed.join("\n")
    );
    println!("{count} cases");
    names
}

/// Runs a case until its call was made. How many holes are punched, and whether by the
/// thread that gives space back or at the end, depends on the time: of those that were
/// counted the last may not be made.
fn reached(ground: &Ground, case: &Case) -> bool {
    let depends_on_time = matches!(case.call.name.as_str(), "fallocate" | "lseek");
    (0..3).any(|_| ground.run(case)) || depends_on_time && case.call.n > 1
}

#[test]
fn a_temporary_overlay_survives_each_call_that_fails() {
    let called = run(&[
        (Kind::Temporary, Place::Main),
        (Kind::Temporary, Place::Connection),
        (Kind::Temporary, Place::Reclaim),
    ]);
    assert_called(&called, &OF_ALL);
    for name in NOT_OF_TEMPORARY_ONES {
        assert!(
            !called.iter().any(|called| called == name),
            "{name} is called"
        );
    }
}

#[test]
fn a_kept_overlay_survives_each_call_that_fails() {
    let called = run(&[
        (Kind::New, Place::Main),
        (Kind::New, Place::Connection),
        (Kind::New, Place::Reclaim),
        (Kind::Resumed, Place::Main),
        (Kind::Resumed, Place::Connection),
        (Kind::Resumed, Place::Reclaim),
        // Once it is at home it is as the one before.
        (Kind::Foreign, Place::Main),
    ]);
    assert_called(&called, &[&OF_ALL[..], &OF_KEPT_ONES].concat());
}

fn assert_called(called: &[String], names: &[&str]) {
    for name in names {
        assert!(
            called.iter().any(|called| called == name),
            "{name}: {called:?}"
        );
    }
}
