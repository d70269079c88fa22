//! What QEMU's programs do to the image.

use std::fs::{self, File};
use std::io::{Seek as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::process::{Child, Stdio};
use std::time::Duration;

use super::disk::{Disk, Flaws, IMAGE};
use super::filter::End;
use super::random::Random;
use crate::harness::command::{LIMIT, eventually, kill_group, signal, spawn, success, wait};
use crate::harness::qemu::Qemu;
use crate::harness::{noise, run_in};
use crate::kept::text;

pub struct Step {
    pub name: &'static str,
    pub run: fn(&mut Disk, &Qemu, &mut Random),
}

macro_rules! steps {
    ($($name:ident)*) => {
        &[$(Step { name: stringify!($name), run: $name }),*]
    };
}

pub const STEPS: &[Step] = steps! {
    write write_and_zero write_in_order fill_in_another_order discard killed_qemu_io
    served served_and_trimmed killed_qemu_nbd
    commit commit_and_empty
    rebase_to_another_path rebase_to_a_copy rebase_to_another_disk
    lazy_refcounts refcount_bits amend_compat
    check resize snapshot snapshot_and_back bitmap convert
};

impl Disk {
    fn qemu_img(&self, qemu: &Qemu, words: &[&str]) {
        qemu.run_in(self.directory(), &[&["qemu-img"], words].concat());
    }

    /// Runs qemu-io with commands that write, each with its bytes in a file.
    fn qemu_io(&mut self, qemu: &Qemu, commands: &[String]) {
        let mut words = vec!["qemu-io", "-f", "qcow2", "-d", "unmap"];
        for command in commands {
            words.extend(["-c", command]);
        }
        words.push(IMAGE);
        // It tells of an error and ends with success if a later command has none.
        let said = qemu.run_in(self.directory(), &words);
        assert!(!said.contains("failed"), "{said}");
    }

    fn write_command(&self, number: u64, start: usize, bytes: &[u8]) -> String {
        let name = format!("bytes-{number}");
        fs::write(self.path(&name), bytes).expect("a file for qemu-io");
        format!("write -q -s {name} {start} {}", bytes.len())
    }
}

/// New clusters and old ones, aligned and not.
fn write(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    let mut commands = Vec::new();
    for number in 0..4 + random.below(20) {
        let (start, length) = disk.span(random, 1);
        let bytes = disk.bytes(random, length);
        commands.push(disk.write_command(number, start as usize, &bytes));
        disk.set(start as usize, &bytes);
    }
    disk.qemu_io(qemu, &commands);
}

fn write_and_zero(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    let mut commands = Vec::new();
    for number in 0..10 {
        let (start, length) = disk.span(random, 1);
        let zero = random.among(&["", "write -q -z", "write -q -z -u"]);
        let bytes = if zero.is_empty() {
            let bytes = disk.bytes(random, length);
            commands.push(disk.write_command(number, start as usize, &bytes));
            bytes
        } else {
            commands.push(format!("{zero} {start} {length}"));
            vec![0; length as usize]
        };
        disk.set(start as usize, &bytes);
    }
    disk.qemu_io(qemu, &commands);
}

/// A guest that installs its system: one cluster after the other, from somewhere on.
fn write_in_order(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    let count = disk.size / disk.cluster();
    let first = random.below(count);
    let mut clusters: Vec<_> = (first..count.min(first + 64)).collect();
    if random.below(2) == 0 {
        clusters.reverse();
    }
    write_clusters(disk, qemu, random, &clusters);
}

/// Clusters of an empty image, so that most lie where another one belongs, which lies
/// where a third one belongs, and so on: in circles, or in a long chain.
fn fill_in_another_order(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    commit_and_empty(disk, qemu, random);
    let count = (disk.size / disk.cluster()).min(100);
    let mut clusters: Vec<_> = (0..count).collect();
    if random.below(3) == 0 {
        clusters.rotate_left(1 + random.below(3) as usize);
    } else {
        random.shuffle(&mut clusters);
    }
    write_clusters(disk, qemu, random, &clusters);
}

fn write_clusters(disk: &mut Disk, qemu: &Qemu, random: &mut Random, clusters: &[u64]) {
    let mut commands = Vec::new();
    for (number, cluster) in clusters.iter().enumerate() {
        let start = (cluster * disk.cluster()) as usize;
        let length = random.among(&[512, disk.block, disk.cluster()]);
        let bytes = noise(random.next(), length as usize);
        commands.push(disk.write_command(number as u64, start, &bytes));
        disk.set(start, &bytes);
    }
    disk.qemu_io(qemu, &commands);
}

/// What is no whole cluster need not be discarded.
fn discard(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    let mut commands = Vec::new();
    for _ in 0..4 {
        let unit = random.among(&[512, disk.cluster()]);
        let (start, length) = disk.span(random, unit);
        commands.push(format!("discard -q {start} {length}"));
        disk.in_flight
            .push((start as usize, vec![0; length as usize]));
    }
    disk.qemu_io(qemu, &commands);
}

/// It does not come to its end: what it has of the tables is lost with it.
fn killed_qemu_io(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    let mut commands = String::new();
    for (number, (start, bytes)) in disk.fly(random).into_iter().enumerate() {
        commands += &disk.write_command(number as u64, start, &bytes);
        commands += if random.below(10) == 0 {
            "\nflush\n"
        } else {
            "\n"
        };
    }
    commands += "sleep 1000000\n";
    let mut input = tempfile::tempfile().expect("a file for its commands");
    input.write_all(commands.as_bytes()).expect("the commands");
    input.rewind().expect("rewind");
    let mut qemu_io = qemu.command("qemu-io");
    qemu_io
        .args(["-f", "qcow2", "-d", "unmap", IMAGE])
        .current_dir(disk.directory())
        .stdin(input)
        .stdout(Stdio::null());
    disk.will_be_killed();
    let mut child = spawn(&mut qemu_io);
    std::thread::sleep(Duration::from_micros(random.below(120_000)));
    kill(&mut child);
}

impl Disk {
    /// To be asked before, because refcounts are lazy while it runs.
    pub fn will_be_killed(&mut self) {
        let left = if self.has_lazy_refcounts() {
            Flaws::WrongRefcounts
        } else {
            Flaws::Leaks
        };
        self.flaws = self.flaws.max(left);
        self.is_torn = true;
    }

    /// Starts qemu-nbd on the image, and waits until it listens.
    fn qemu_nbd(&self, qemu: &Qemu) -> Child {
        let pid_file = self.path("pid");
        let _ = fs::remove_file(&pid_file);
        let mut qemu_nbd = qemu.command("qemu-nbd");
        qemu_nbd
            .args(["-t", "-f", "qcow2", "--discard=unmap"])
            .arg("--pid-file")
            .arg(&pid_file)
            .arg("-k")
            .arg(self.path("socket"))
            .arg(self.image());
        let mut child = spawn(&mut qemu_nbd);
        let listens = eventually(LIMIT, || {
            let has_ended = child.try_wait().expect("wait for qemu-nbd").is_some();
            has_ended || fs::metadata(&pid_file).is_ok_and(|file| file.len() > 0)
        });
        assert!(listens, "qemu-nbd does not listen");
        child
    }
}

pub fn kill(child: &mut Child) {
    kill_group(child);
    child.wait().expect("wait for a child");
}

fn serve_by_qemu(disk: &mut Disk, qemu: &Qemu, requests: &(String, Vec<u8>)) {
    let mut qemu_nbd = disk.qemu_nbd(qemu);
    let mut client = disk.client(&disk.path("socket"), requests);
    success(&mut client);
    signal(qemu_nbd.id(), libc::SIGTERM);
    let ended = wait(&mut qemu_nbd, LIMIT).is_some_and(|status| status.success());
    assert!(ended, "qemu-nbd has not ended well");
}

fn served(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    disk.write_expected();
    let (lines, sent) = disk.requests(0, random, 1, End::Clean);
    // What a trim leaves is another step's.
    let lines = lines.replace("trim", "zero");
    serve_by_qemu(disk, qemu, &(lines, sent));
}

fn served_and_trimmed(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    disk.write_expected();
    let mut lines = String::new();
    for _ in 0..5 {
        let (start, length) = disk.span(random, 512);
        lines += &format!("trim {start} {length}\n");
        disk.in_flight
            .push((start as usize, vec![0; length as usize]));
    }
    serve_by_qemu(disk, qemu, &(lines, Vec::new()));
}

fn killed_qemu_nbd(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    disk.write_expected();
    disk.will_be_killed();
    let mut qemu_nbd = disk.qemu_nbd(qemu);
    let (lines, sent) = disk.requests(0, random, 1, End::Killed);
    let lines = lines.replace("trim", "zero");
    let mut client = disk.client(&disk.path("socket"), &(lines, sent));
    disk.kill_while_it_sends(&mut client, random, || kill(&mut qemu_nbd));
}

/// The image has the same as before, and the base too.
fn commit(disk: &mut Disk, qemu: &Qemu, _: &mut Random) {
    disk.qemu_img(qemu, &["commit", "-q", "-d", IMAGE]);
    disk.assert_committed();
}

fn commit_and_empty(disk: &mut Disk, qemu: &Qemu, _: &mut Random) {
    disk.qemu_img(qemu, &["commit", "-q", IMAGE]);
    disk.assert_committed();
}

const REBASE: &[&str] = &["rebase", "-q", "-f", "qcow2", "-F", "raw"];

fn rebase_to_another_path(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    let base = disk.base.clone();
    let name = match random.below(3) {
        0 => base,
        1 => format!("./{base}"),
        _ => text(&disk.path(&base)).to_string(),
    };
    disk.qemu_img(qemu, &[REBASE, &["-u", "-b", &name, IMAGE]].concat());
}

impl Disk {
    /// Another file beside the base, which takes its place once the image says so.
    fn copy_base(&mut self) -> (String, String) {
        let old = self.base.clone();
        let new = if old == "disk.img" {
            "copy.img"
        } else {
            "disk.img"
        };
        let words = ["cp", "-p", "--sparse=always", &old, new];
        run_in(self.directory(), &words);
        self.base = new.to_string();
        (old, new.to_string())
    }
}

/// With `-u` qemu only writes the name; without, it looks for what differs, which is
/// nothing.
fn rebase_to_a_copy(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    let (old, new) = disk.copy_base();
    let unsafely: &[&str] = if random.below(2) == 0 { &["-u"] } else { &[] };
    disk.qemu_img(qemu, &[REBASE, unsafely, &["-b", &new, IMAGE]].concat());
    fs::remove_file(disk.path(&old)).expect("the old base");
}

/// What the new base has otherwise is stored in the image.
fn rebase_to_another_disk(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    let (old, new) = disk.copy_base();
    let base = File::options()
        .write(true)
        .open(disk.path(&new))
        .expect("the new base");
    for _ in 0..20 {
        let (start, length) = disk.span(random, 1);
        let bytes = disk.bytes(random, length);
        base.write_all_at(&bytes, start).expect("change it");
    }
    drop(base);
    disk.qemu_img(qemu, &[REBASE, &["-b", &new, IMAGE]].concat());
    fs::remove_file(disk.path(&old)).expect("the old base");
}

fn lazy_refcounts(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    let option = random.among(&[
        "lazy_refcounts=on",
        "lazy_refcounts=on",
        "lazy_refcounts=off",
    ]);
    disk.qemu_img(qemu, &["amend", "-q", "-o", option, IMAGE]);
}

fn refcount_bits(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    let option = format!("refcount_bits={}", 1 << random.below(7));
    disk.qemu_img(qemu, &["amend", "-q", "-o", &option, IMAGE]);
}

fn amend_compat(disk: &mut Disk, qemu: &Qemu, _: &mut Random) {
    disk.qemu_img(qemu, &["amend", "-q", "-o", "compat=1.1", IMAGE]);
}

fn check(disk: &mut Disk, qemu: &Qemu, _: &mut Random) {
    disk.qemu_img(qemu, &["check", "-q", "-r", "all", IMAGE]);
    disk.flaws = Flaws::None;
}

/// Larger, by so much that tables are moved, and as it was.
fn resize(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    let size = disk.content.len().to_string();
    let more = random.among(&["+512", "+1M", "+700M", "+100G"]);
    disk.qemu_img(qemu, &["resize", "-q", IMAGE, more]);
    disk.qemu_img(qemu, &["resize", "-q", "--shrink", IMAGE, &size]);
}

impl Disk {
    /// QEMU can't count in refcounts of one or two bits how many have a cluster.
    fn first_snapshot(&self, qemu: &Qemu) {
        if self.refcount_order() < 2 {
            self.qemu_img(qemu, &["amend", "-q", "-o", "refcount_bits=4", IMAGE]);
        }
        self.qemu_img(qemu, &["snapshot", "-c", "s", IMAGE]);
    }
}

fn snapshot(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    disk.first_snapshot(qemu);
    write(disk, qemu, random);
    disk.qemu_img(qemu, &["snapshot", "-d", "s", IMAGE]);
}

fn snapshot_and_back(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    let before = disk.content.clone();
    disk.first_snapshot(qemu);
    write(disk, qemu, random);
    disk.qemu_img(qemu, &["snapshot", "-c", "t", IMAGE]);
    disk.qemu_img(qemu, &["snapshot", "-a", "s", IMAGE]);
    disk.content = before;
    write_and_zero(disk, qemu, random);
    for name in ["t", "s"] {
        disk.qemu_img(qemu, &["snapshot", "-d", name, IMAGE]);
    }
}

fn bitmap(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    disk.qemu_img(qemu, &["bitmap", "--add", IMAGE, "b"]);
    write(disk, qemu, random);
    disk.qemu_img(qemu, &["bitmap", "--remove", IMAGE, "b"]);
}

/// All of another disk, into the image that is there.
fn convert(disk: &mut Disk, qemu: &Qemu, random: &mut Random) {
    for _ in 0..40 {
        let (start, length) = disk.span(random, 1);
        let bytes = disk.bytes(random, length);
        disk.set(start as usize, &bytes);
    }
    disk.write_sparse("other.raw", &disk.content);
    let words = [
        "convert",
        "-n",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "other.raw",
        IMAGE,
    ];
    disk.qemu_img(qemu, &words);
    fs::remove_file(disk.path("other.raw")).expect("the other disk");
}
