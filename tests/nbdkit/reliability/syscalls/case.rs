//! A run of nbdkit in which one system call fails.

use std::path::Path;
use std::time::Duration;

use super::disk::{ENOMEM, ENOSPC, Expected, Model, Session, errnos};
use super::ground::{Files, Ground, Kind, content, serves, text};
use super::strace::{Call, Place, attach, calls, has_written, wait_for_strace};
use crate::harness::command::{Outcome, command, eventually, outcome};
use crate::harness::nbd::Client;
use crate::harness::server::Refusal;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Errno(&'static str),
    /// The call does nothing, and says so: it has read or written no bytes, or the memory
    /// still ends where it did. (A kernel never answers an errno to brk.)
    Nothing,
}

#[derive(Debug, Clone)]
pub struct Case {
    pub kind: Kind,
    pub place: Place,
    pub call: Call,
    pub fault: Fault,
}

impl Case {
    fn inject(&self) -> String {
        let Call { name, n, .. } = &self.call;
        let what = match self.fault {
            Fault::Errno(errno) => format!("error={errno}"),
            Fault::Nothing => "retval=0".to_string(),
        };
        format!("inject={name}:{what}:when={n}")
    }

    /// What must not be noticed: after it the call is made again, or what it is for is done
    /// in another way or not at all.
    fn is_hidden(&self) -> bool {
        const REPEATED: &[&str] = &[
            "pread64",
            "pwrite64",
            "pwritev2",
            "fallocate",
            "openat",
            "ftruncate",
            "fdatasync",
            "fsync",
        ];
        let name = self.call.name.as_str();
        let is_hidden = match self.fault {
            _ if name == "ioctl" => true,
            Fault::Errno("EINTR") => REPEATED.contains(&name),
            Fault::Errno("EOPNOTSUPP") => matches!(name, "fallocate" | "pwritev2"),
            _ => false,
        };
        self.call.is_own && is_hidden
    }

    /// What nobody may keep to himself: that a sync has failed.
    fn must_be_told(&self) -> bool {
        let name = self.call.name.as_str();
        let is_sync = matches!(name, "fdatasync" | "fsync" | "pwritev2");
        self.call.is_own && is_sync && !self.is_hidden()
    }

    fn expected(&self) -> Expected {
        if self.is_hidden() {
            return Expected::nothing();
        }
        let name = self.call.name.as_str();
        let also = match self.fault {
            _ if matches!(name, "mmap" | "brk") => Some(ENOMEM),
            Fault::Errno("ENOMEM") => Some(ENOMEM),
            Fault::Errno("ENOSPC" | "EDQUOT") => Some(ENOSPC),
            _ => None,
        };
        let writes = ["pwrite64", "pwritev2", "fallocate", "fdatasync", "fsync"];
        Expected {
            errnos: errnos(also),
            ends_flushes: writes.contains(&name),
            is_of_sync: name == "fdatasync",
        }
    }
}

impl Ground {
    /// The calls of a thread, in a run in which nothing fails.
    pub fn calls(&self, kind: Kind, place: Place) -> Vec<Call> {
        let files = self.files(kind);
        let log = files.path("strace");
        let strace = ["strace", "-D", "-k", "-o", text(&log), "-e", "trace=!futex"];
        let under: &[&str] = if place == Place::Main { &strace } else { &[] };
        let server = serves(self.serve(kind, &files, under));
        let mut client = Client::greet(&server.socket()).expect("a client");
        let mut attached = attach(&server, place, &["-k", "-e", "trace=!futex"], &log);
        client.negotiate().expect("an export");
        let mut model = self.model(kind);
        let expected = Expected::nothing();
        let mut session = Session::new(client, &mut model, &expected, &files.path("copy"));
        session.run();
        drop(session);
        if place == Place::Reclaim {
            eventually(Duration::from_secs(1), || has_written(&log, "fallocate("));
        }
        server.stop();
        wait_for_strace(&mut attached, &log);
        calls(&log)
    }

    /// Runs a case; false: the call was not made.
    pub fn run(&self, case: &Case) -> bool {
        let Case { kind, place, .. } = *case;
        let files = self.files(kind);
        let log = files.path("strace");
        let (trace, inject) = (format!("trace={}", case.call.name), case.inject());
        let options = ["-e", &trace, "-e", &inject];
        let mut strace = vec!["strace", "-D", "-o", text(&log)];
        strace.extend(options);
        let under: &[&str] = if place == Place::Main { &strace } else { &[] };
        let expected = case.expected();
        let mut is_told = false;
        let server = self.serve(kind, &files, under).unwrap_or_else(|refusal| {
            is_told = true;
            let Refusal { status, stderr } = refusal;
            assert!(!case.is_hidden(), "nbdkit ended: {status}\n{stderr}");
            assert_eq!(status.code(), Some(1), "{status}\n{stderr}");
            assert!(stderr.contains("error: "), "no sentence: {stderr}");
            assert_calm(&stderr);
            assert!(has_written(&log, "INJECTED"), "{stderr}");
            // Once the fault is gone it starts.
            serves(self.serve(kind, &files, &[]))
        });
        let mut client = Client::greet(&server.socket()).expect("a client");
        let mut attached = attach(&server, place, &options, &log);
        if client.negotiate().is_err() {
            assert!(!case.is_hidden(), "a client is refused");
            assert!(has_written(&log, "INJECTED"), "a client is refused");
            client = Client::connect(&server.socket()).expect("the second client");
        }
        let mut model = self.model(kind);
        let mut session = Session::new(client, &mut model, &expected, &files.path("copy"));
        session.run();
        drop(session);
        if place == Place::Reclaim {
            eventually(Duration::from_secs(1), || has_written(&log, "INJECTED"));
        }
        let said = server.stop_and_tell();
        wait_for_strace(&mut attached, &log);
        assert_calm(&said);
        let is_error = |line: &str| line.contains("error: ") && !line.contains("warning: ");
        is_told |= said.lines().any(is_error);
        let is_reached = has_written(&log, "INJECTED");
        assert!(is_told || !is_reached || !case.must_be_told(), "{said}");
        files.assert_nothing_left();
        if kind != Kind::Temporary {
            self.assert_image(case, &files, model, &said);
        }
        is_reached
    }

    /// Runs the script with a library before the C library that has reads and writes do a
    /// part of their work.
    pub fn run_short(&self, kind: Kind, library: &Path, how: &str) {
        let files = self.files(kind);
        let seen = files.path("seen");
        let variables = [
            format!("LD_PRELOAD={}", text(library)),
            format!("SHORT={how}"),
            format!("SHORT_SEEN={}", text(&seen)),
        ];
        let mut under = vec!["env"];
        under.extend(variables.iter().map(String::as_str));
        let server = serves(self.serve(kind, &files, &under));
        let client = Client::connect(&server.socket()).expect("a client");
        let mut model = self.model(kind);
        let expected = Expected::nothing();
        let mut session = Session::new(client, &mut model, &expected, &files.path("copy"));
        session.run();
        session.flush();
        drop(session);
        let said = server.stop_and_tell();
        assert!(seen.exists(), "nothing was short");
        assert_calm(&said);
        if kind != Kind::Temporary {
            assert_complete(&files.path("disk/diff.qcow2"), &model, &said);
        }
    }

    /// What a kept overlay must be when nbdkit has ended and `said` this.
    fn assert_image(&self, case: &Case, files: &Files, model: Model, said: &str) {
        let image = files.path("disk/diff.qcow2");
        let is_complete = !said.contains("incomplete");
        if is_complete {
            return assert_complete(&image, &model, said);
        }
        assert!(
            case.place == Place::Main || case.expected().ends_flushes,
            "{said}"
        );
        let check = check(&image);
        let found = content(&image);
        let code = check.status.code();
        assert!(matches!(code, Some(0 | 3)), "{code:?}: {}", check.stdout);
        model.assert_keeps_what_was_flushed(&found);
        // The next run goes on with it.
        let server = serves(self.serve(case.kind, files, &[]));
        let client = Client::connect(&server.socket()).expect("a client");
        let mut model = Model::new(found, true);
        let expected = Expected::nothing();
        let mut session = Session::new(client, &mut model, &expected, &files.path("copy"));
        session.assert_disk();
        session.run();
        drop(session);
        server.stop();
        assert_complete(&image, &model, "");
    }
}

/// The image has what the model has.
fn assert_complete(image: &Path, model: &Model, said: &str) {
    let check = check(image);
    assert!(check.status.success(), "{}{said}", check.stdout);
    let found = content(image);
    let differs = found.iter().zip(model.bytes()).position(|(a, b)| a != b);
    assert_eq!(differs, None, "a byte of the image is wrong\n{said}");
}

fn check(image: &Path) -> Outcome {
    outcome(
        command("qemu-img")
            .args(["check", "-f", "qcow2"])
            .arg(image),
    )
}

fn assert_calm(said: &str) {
    assert!(!said.contains("panicked"), "a panic: {said}");
    assert!(!said.contains("internal error"), "{said}");
}
