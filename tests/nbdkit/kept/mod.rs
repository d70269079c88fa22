//! The overlay that is kept, as a user has it: real nbdkit, real clients, and
//! QEMU's own tools to say whether the image is what it should be.

mod base_lock;
mod conflicts;
mod damage;
mod fingerprints;
mod first_client;
mod full;
mod home;
mod images;
mod larger;
mod locks;
mod lost;
mod names;
mod places;
mod qemu;
mod random_qemu;
mod resume;
mod served;
mod small;
mod syncs;
mod version_1;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::harness::command::{Outcome, command, outcome};
use crate::harness::{Base, Server, Setup, noise, run, run_in};

/// What Python finds beside client.py: `Disk`, the model.
const CLIENT: &str = concat!(
    include_str!("model.py"),
    "\ndisk = Disk(h, ARGS[0], int(ARGS[1]), int(ARGS[2]))\n"
);

/// A path of our own making.
fn text(path: &Path) -> &str {
    path.to_str().expect("a path of our own making")
}

/// A base, the image beside it that keeps what is written, and a model of both.
struct Disk {
    base: Base,
    block: u64,
}

impl Disk {
    fn new(size: u64, block: u64) -> Disk {
        let base = Base::make(|path| make_base(path, size));
        let disk = Disk { base, block };
        // As QEMU sees a file whose size is not a whole number of sectors.
        let model = disk.model();
        run(&["cp", "--sparse=always", disk.base.path(), text(&model)]);
        File::options()
            .write(true)
            .open(model)
            .and_then(|file| file.set_len(size.next_multiple_of(512)))
            .expect("pad the model");
        disk
    }

    fn overlay(&self) -> PathBuf {
        self.base.directory().join("diff.qcow2")
    }

    fn model(&self) -> PathBuf {
        self.base.directory().join("model")
    }

    /// The plugin and its parameters, for the first nbdkit or a later one.
    fn plugin(&self, more: &[&str]) -> Vec<String> {
        let overlay = format!("cow-overlay={}", text(&self.overlay()));
        let block = format!("cow-block-size={}", self.block);
        let own = ["file", self.base.path(), &overlay, &block];
        own.iter()
            .chain(more)
            .map(|word| word.to_string())
            .collect()
    }

    fn serve_with(&self, setup: &Setup, more: &[&str]) -> Server {
        let plugin = self.plugin(more);
        setup.start(&plugin.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn serve(&self) -> Server {
        self.serve_with(&Setup::new(), &[])
    }

    /// Runs Python code that has the model in `disk`.
    fn client(&self, server: &Server, seed: u64, code: &str) -> String {
        let args = self.client_args(seed);
        server.nbdsh_after(CLIENT, &args.each_ref().map(String::as_str), code)
    }

    /// As [`Disk::client`], with an nbdkit that ends when its client does.
    fn run_client(&self, seed: u64, code: &str) {
        let args = self.client_args(seed);
        let args = args.each_ref().map(String::as_str);
        let plugin = self.plugin(&[]);
        let plugin: Vec<_> = plugin.iter().map(String::as_str).collect();
        Setup::new().run_nbdsh(&plugin, CLIENT, &args, code);
    }

    fn client_args(&self, seed: u64) -> [String; 3] {
        let model = text(&self.model()).to_string();
        [model, self.block.to_string(), seed.to_string()]
    }

    /// What must be true whenever no nbdkit serves the image, after a clean end.
    fn assert_sound(&self) {
        let overlay = self.overlay();
        check(&overlay);
        compare(&overlay, &self.model());
        assert_eq!(map(&overlay), self.expected_map(), "size {}", self.size());
    }

    fn size(&self) -> u64 {
        fs::metadata(self.base.path()).expect("the base").len()
    }

    /// As [`map`] should find it, from what the model knows of the blocks.
    fn expected_map(&self) -> Vec<(u64, u64, State)> {
        let about = fs::read_to_string(self.model().with_extension("json"));
        let runs: Vec<(u64, String)> =
            serde_json::from_str(&about.expect("saved by the client")).expect("runs");
        let end = self.size().next_multiple_of(512);
        let starts = runs
            .iter()
            .map(|run| run.0 * self.block)
            .collect::<Vec<_>>();
        let ends = starts.iter().copied().skip(1).chain([end]);
        let states = runs.iter().map(|run| match run.1.as_str() {
            "base" => State::Base,
            "data" => State::Data,
            "zero" => State::Zero,
            other => panic!("no state: {other}"),
        });
        starts
            .iter()
            .zip(ends)
            .zip(states)
            .map(|((start, end), state)| (*start, end - start, state))
            .collect()
    }
}

/// Bytes, written zeroes and holes about those places where the model's random
/// requests go.
fn make_base(path: &Path, size: u64) {
    use std::os::unix::fs::FileExt;
    const STEP: u64 = 70_000;
    let file = File::create(path).expect("create the base");
    file.set_len(size).expect("extend the base");
    let near = 10 * STEP;
    for place in [0, size / 3, size / 2, size / 10 * 9, size] {
        let from = place.saturating_sub(near) / STEP * STEP;
        for (turn, start) in (from..size.min(place + near))
            .step_by(STEP as usize)
            .enumerate()
        {
            let length = STEP.min(size - start) as usize;
            match turn % 4 {
                3 => {}
                2 => file.write_all_at(&vec![0; length], start).expect("zeroes"),
                _ => file
                    .write_all_at(&noise(start + 1, length), start)
                    .expect("bytes"),
            }
        }
    }
    file.sync_all().expect("sync the base");
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Base,
    Data,
    Zero,
}

/// `qemu-img map`: (offset, length, what it is), with equal neighbours merged. Every
/// byte of *data* must lie at its fixed place.
fn map(overlay: &Path) -> Vec<(u64, u64, State)> {
    let said = run(&["qemu-img", "map", "--output=json", text(overlay)]);
    let entries: Value = serde_json::from_str(&said).expect("JSON");
    let mut merged: Vec<(u64, u64, State)> = Vec::new();
    let mut distances = Vec::new();
    for entry in entries.as_array().expect("a list") {
        let number = |name: &str| entry[name].as_u64().expect("a number");
        let is_data = entry["data"].as_bool().expect("a boolean");
        let state = match number("depth") {
            1 => State::Base,
            0 if is_data => State::Data,
            0 => State::Zero,
            depth => panic!("depth {depth}"),
        };
        let (start, length) = (number("start"), number("length"));
        if state == State::Data {
            distances.push(number("offset") - start);
        }
        match merged.last_mut() {
            Some(last) if last.2 == state => last.1 += length,
            _ => merged.push((start, length, state)),
        }
    }
    distances.dedup();
    assert!(distances.len() <= 1, "data is not at its place: {said}");
    merged
}

/// nbdkit must refuse this, in one sentence with these words, before it goes into the
/// background, and leave the file as it is.
fn assert_refused(plugin: &[&str], overlay: &Path, words: &[&str]) {
    let before = Seal::of(overlay);
    let error = Setup::new().error(plugin);
    assert_says(&error, &[&[text(overlay)], words].concat());
    assert_eq!(Seal::of(overlay), before, "{overlay:?}: {error}");
}

/// What can't be known before a client has chosen an export: the client is refused, and
/// nbdkit says why in the one message that this gives.
fn refused_to_a_client(setup: &Setup, plugin: &[&str]) -> String {
    let server = setup.start(plugin);
    let client = attempt(&["nbdinfo", &server.uri()]);
    assert!(!client.status.success(), "{}", client.stdout);
    let said = server.stop_and_tell();
    let is_error = |line: &&str| line.contains("error: ") && !line.contains("warning: ");
    said.lines().find(is_error).expect("a message").to_string()
}

fn assert_says(error: &str, words: &[&str]) {
    assert!(!error.contains("internal error"), "{error}");
    for word in words {
        assert!(error.contains(word), "{word:?} in {error:?}");
    }
}

/// Any program with any arguments, to its end.
fn attempt(words: &[&str]) -> Outcome {
    outcome(command(words[0]).args(&words[1..]))
}

/// As [`attempt`], in the directory of a file.
fn attempt_beside(file: &Path, words: &[&str]) -> Outcome {
    let directory = file.parent().expect("a file is in a directory");
    outcome(command(words[0]).args(&words[1..]).current_dir(directory))
}

/// Records another name for the base of an image, as the manual says, and looks at
/// nothing else. All names are those of files in `directory`.
pub fn name_base(directory: &Path, image: &str, base: &str) {
    let rebase = ["qemu-img", "rebase", "-u", "-F", "raw", "-b", base, image];
    run_in(directory, &rebase);
}

/// `qemu-img check`: neither errors nor leaks.
pub fn check(overlay: &Path) {
    run(&["qemu-img", "check", "-q", "-f", "qcow2", text(overlay)]);
}

/// `qemu-img check` of what a crash left: leaks at most.
pub fn check_after_a_crash(overlay: &Path) {
    let Outcome {
        status,
        stdout,
        stderr,
    } = attempt(&["qemu-img", "check", "-f", "qcow2", text(overlay)]);
    let code = status.code();
    assert!(matches!(code, Some(0 | 3)), "{code:?}: {stdout}{stderr}");
}

fn compare(overlay: &Path, raw: &Path) {
    let words = ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw"];
    run(&[&words[..], &[text(overlay), text(raw)]].concat());
}

/// A file that must come out of a refusal as it went in.
#[derive(PartialEq, Eq)]
struct Seal {
    content: Vec<u8>,
    modified: (i64, i64),
    mode: u32,
    inode: u64,
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the content, which is long.
        let Seal {
            content,
            modified,
            mode,
            inode,
        } = self;
        write!(
            f,
            "{} bytes, modified {modified:?}, mode {mode:o}, inode {inode}",
            content.len()
        )
    }
}

impl Seal {
    fn of(path: &Path) -> Seal {
        let about = fs::symlink_metadata(path).expect("the file");
        Seal {
            content: if about.is_file() {
                fs::read(path).expect("the file")
            } else {
                Vec::new()
            },
            modified: (about.mtime(), about.mtime_nsec()),
            mode: about.mode(),
            inode: about.ino(),
        }
    }
}
