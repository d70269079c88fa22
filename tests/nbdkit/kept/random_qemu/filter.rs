//! Runs of the filter, and of an NBD client as such.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::disk::{Disk, Flaws};
use super::random::Random;
use crate::harness::Setup;
use crate::harness::command::{LIMIT, eventually, spawn, success, wait};
use crate::harness::python;
use crate::kept::text;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Clean,
    /// Killed while it stores what nobody has flushed.
    Killed,
}

/// Reads all of the disk, then sends what the file of requests says. Those after the
/// flush are sent again and again, until the server is gone.
const CLIENT: &str = r#"
    same(read(h), open(ARGS[0], "rb").read()[:h.get_size()])
    sent = open(ARGS[2], "rb")
    late = []
    for line in open(ARGS[1]):
        kind, at, length = line.split()
        at, length = int(at), int(length)
        if kind == "write":
            h.pwrite(sent.read(length), at)
        elif kind == "zero":
            h.zero(length, at)
        elif kind == "keep":
            h.zero(length, at, NO_HOLE)
        elif kind == "trim":
            h.trim(length, at)
        else:
            late.append((at, sent.read(length)))
    h.flush()
    if late:
        print("flushed", flush=True)
        flight = Flight([h], 8)
        try:
            while True:
                for at, data in late:
                    flight.write(h, data, at)
        except nbd.Error:
            print("gone", flush=True)
"#;

impl Disk {
    /// Starts nbdkit on the image, has a client look at it and write to it, and ends it.
    pub fn serve(&mut self, random: &mut Random, end: End) {
        self.serve_from(0, random, end);
    }

    /// As [`Disk::serve`], with nothing written before `first`.
    pub fn serve_from(&mut self, first: u64, random: &mut Random, end: End) {
        self.note(format!("nbdkit: {end:?}"));
        if self.image().exists() {
            self.keep_copy();
        }
        let base = self.path(&self.base);
        let before = modified(&base);
        let words = [
            "file".into(),
            text(&base).to_string(),
            format!("cow-overlay={}", self.image_text()),
            format!("cow-block-size={}", self.block),
        ];
        self.write_expected();
        let server = Setup::new().start(&words.each_ref().map(String::as_str));
        let client = self.requests(first, random, self.block, end);
        let mut client = self.client(&server.socket(), &client);
        match end {
            End::Clean => {
                success(&mut client);
                server.stop();
            }
            End::Killed => self.kill_while_it_sends(&mut client, random, || server.kill()),
        }
        assert_eq!(modified(&base), before, "the base was written to");
        match end {
            End::Clean => self.assert_at_home(),
            End::Killed => {
                self.flaws = Flaws::Leaks;
                self.check_with(&crate::harness::qemu::Qemu::all()[0]);
            }
        }
    }

    /// Starts a client that sends without end, waits until it does, and kills its server.
    pub fn kill_while_it_sends(
        &mut self,
        client: &mut Command,
        random: &mut Random,
        kill: impl FnOnce(),
    ) {
        let said = tempfile::NamedTempFile::new().expect("a file for its stdout");
        client.stdout(said.reopen().expect("that file"));
        let mut client = spawn(client.stderr(Stdio::inherit()));
        let has_said = |line: &str| {
            let said = fs::read_to_string(said.path()).expect("what the client says");
            said.lines().any(|said| said == line)
        };
        let is_sending = eventually(LIMIT, || has_said("flushed") || has_ended(&mut client));
        if is_sending {
            std::thread::sleep(Duration::from_micros(random.below(20_000)));
        }
        kill();
        let ended = wait(&mut client, LIMIT);
        let ended = ended.is_some_and(|status| status.success());
        assert!(ended && has_said("gone"), "nothing was in flight");
    }

    /// Random requests, which the model has as well, for [`Disk::client`]: the lines for
    /// it, and the bytes that are to be written. Discards are of whole units. Nothing is
    /// written before `first`.
    pub fn requests(
        &mut self,
        first: u64,
        random: &mut Random,
        unit: u64,
        end: End,
    ) -> (String, Vec<u8>) {
        let (mut lines, mut sent) = (String::new(), Vec::new());
        let mut add = |kind: &str, start: u64, length: u64| {
            writeln!(lines, "{kind} {start} {length}").expect("a string");
        };
        for _ in 0..10 + random.below(15) {
            let kind = random.among(&["write", "write", "write", "zero", "keep", "trim"]);
            let (start, length) = self.span(random, if kind == "trim" { unit } else { 1 });
            if start < first {
                continue;
            }
            add(kind, start, length);
            let bytes = match kind {
                "write" => self.bytes(random, length),
                _ => vec![0; length as usize],
            };
            self.set(start as usize, &bytes);
            if kind == "write" {
                sent.extend(bytes);
            }
        }
        if end == End::Killed {
            for (start, bytes) in self.fly(random) {
                add("late", start as u64, bytes.len() as u64);
                sent.extend(&bytes);
            }
        }
        (lines, sent)
    }

    /// Puts down what a client has to read, before the model changes.
    pub fn write_expected(&self) {
        self.write_sparse("expected", &self.content);
    }

    /// Whole sectors of which each is written once, noted as being in flight.
    pub fn fly(&mut self, random: &mut Random) -> Vec<(usize, Vec<u8>)> {
        let step = 512 * (200 + random.below(500));
        let mut places: Vec<_> = (0..self.size / step - 1).collect();
        random.shuffle(&mut places);
        places.truncate(60);
        let flying: Vec<_> = places
            .into_iter()
            .map(|place| {
                let length = 512 * (1 + random.below(step / 512));
                let bytes = self.bytes(random, length);
                ((place * step) as usize, bytes)
            })
            .collect();
        self.in_flight.clone_from(&flying);
        flying
    }

    /// The command that sends these requests to the server of a socket, after it has read
    /// all of the disk and found what it should.
    pub fn client(&self, socket: &Path, (lines, sent): &(String, Vec<u8>)) -> Command {
        let file = |name: &str, bytes: &[u8]| {
            let path = self.path(name);
            fs::write(&path, bytes).expect("a file for the client");
            text(&path).to_string()
        };
        let args = [
            text(&self.path("expected")).to_string(),
            file("requests", lines.as_bytes()),
            file("sent", sent),
        ];
        let args = args.each_ref().map(String::as_str);
        python::script(self.directory(), socket, "h = connect()", CLIENT, &args)
    }
}

fn has_ended(child: &mut std::process::Child) -> bool {
    child.try_wait().expect("wait for a child").is_some()
}

fn modified(path: &Path) -> (i64, i64) {
    let about = fs::metadata(path).expect("the base");
    (about.mtime(), about.mtime_nsec())
}
