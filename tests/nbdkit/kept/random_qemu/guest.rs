//! A guest that is booted from the image, and writes to it. See packaging/guest.sh.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::disk::{Disk, Flaws, IMAGE};
use super::filter::End;
use super::random::Random;
use super::steps::{Step, kill};
use crate::harness::command::{LIMIT, eventually, spawn, success};
use crate::harness::qemu::{Qemu, guest};
use crate::harness::{Base, Setup, noise, run_in};
use crate::kept::{check, text};

pub const STEPS: &[Step] = &[
    Step {
        name: "guest_that_writes",
        run: |disk, _, random| write(disk, random, 0),
    },
    Step {
        name: "guest_that_is_killed",
        run: |disk, _, random| die(disk, random, 0),
    },
];

const SECTOR: u64 = 512;

/// The command that boots a guest in the directory of an image. Its shell runs the script,
/// in which /dev/vda is the image, and /dev/vdc has the bytes.
fn boot(directory: &Path, script: &str, bytes: &[u8]) -> Command {
    let mut script = script.as_bytes().to_vec();
    script.resize(script.len().next_multiple_of(SECTOR as usize), b'\n');
    let mut bytes = bytes.to_vec();
    bytes.resize((bytes.len() + 1).next_multiple_of(SECTOR as usize), 0);
    fs::write(directory.join("script"), script).expect("the guest's script");
    fs::write(directory.join("bytes"), bytes).expect("the guest's bytes");
    let mut guest = guest();
    guest.current_dir(directory);
    for drive in [
        &format!("file={IMAGE},format=qcow2,discard=unmap"),
        "file=script,format=raw,readonly=on",
        "file=bytes,format=raw,readonly=on",
    ] {
        guest.args(["-drive", &format!("if=virtio,{drive}")]);
    }
    guest
}

/// Lines of a script that write these bytes in sectors of the image, all from one file.
fn copies(places: &[(usize, Vec<u8>)]) -> (Vec<String>, Vec<u8>) {
    let mut bytes = Vec::new();
    let mut lines = Vec::new();
    for (start, new) in places {
        lines.push(format!(
            "dd if=/dev/vdc of=/dev/vda bs=512 skip={} seek={} count={} conv=notrunc,fsync 2>/dev/null",
            bytes.len() as u64 / SECTOR,
            *start as u64 / SECTOR,
            new.len() as u64 / SECTOR,
        ));
        bytes.extend(new);
    }
    (lines, bytes)
}

/// Writes and discards from `first` on.
fn write(disk: &mut Disk, random: &mut Random, first: u64) {
    write_with(disk, random, first, "", &[]);
}

/// As [`write`], with commands for the shell that come before, and bytes for them at the
/// start of /dev/vdc.
fn write_with(disk: &mut Disk, random: &mut Random, first: u64, before: &str, bytes: &[u8]) {
    let places: Vec<_> = (0..20)
        .filter_map(|_| {
            let (start, length) = disk.span(random, SECTOR);
            (start >= first).then(|| (start as usize, disk.bytes(random, length)))
        })
        .collect();
    let own = [(0, bytes.to_vec())];
    let (lines, bytes) = copies(&[&own[..], &places].concat());
    let mut script = format!("{before}\n{}\n", lines[1..].join("\n"));
    for (start, new) in &places {
        disk.set(*start, new);
    }
    for _ in 0..4 {
        let (start, length) = disk.span(random, disk.cluster());
        if start >= first {
            writeln!(script, "blkdiscard -o {start} -l {length} /dev/vda").expect("a string");
            disk.in_flight
                .push((start as usize, vec![0; length as usize]));
        }
    }
    script += "sync && echo the guest has written\n";
    let said = success(&mut boot(disk.directory(), &script, &bytes));
    assert!(said.contains("the guest has written"), "{said}");
}

/// Writes sectors from `first` on until it is killed.
fn die(disk: &mut Disk, random: &mut Random, first: u64) {
    let mut places = disk.fly(random);
    places.retain(|(start, _)| *start as u64 >= first);
    disk.in_flight.clone_from(&places);
    let (lines, bytes) = copies(&places);
    let script = format!(
        "echo the guest writes\nwhile :; do\n{}\ndone\n",
        lines.join("\n")
    );
    let said = tempfile::NamedTempFile::new().expect("a file for its serial line");
    let mut guest = boot(disk.directory(), &script, &bytes);
    guest.stdout(said.reopen().expect("that file"));
    guest.stderr(Stdio::inherit());
    disk.will_be_killed();
    let mut guest = spawn(&mut guest);
    let is_writing = eventually(LIMIT, || {
        let said = fs::read_to_string(said.path()).unwrap_or_default();
        let has_ended = guest.try_wait().expect("wait for the guest").is_some();
        said.contains("the guest writes") || has_ended
    });
    std::thread::sleep(Duration::from_millis(random.below(700)));
    let has_ended = guest.try_wait().expect("wait for the guest");
    kill(&mut guest);
    assert!(
        is_writing && has_ended.is_none(),
        "it does not write: {has_ended:?}"
    );
}

/// What follows the file system is written to as such.
const FILE_SYSTEM: u64 = 16 << 20;

/// A disk with a file system in its first part.
fn with_file_system() -> Disk {
    let mut disk = Disk::new((32 << 20) - 512 * 33, 4096, 3);
    File::options()
        .write(true)
        .open(disk.path(&disk.base))
        .and_then(|base| base.set_len(FILE_SYSTEM))
        .expect("cut the base");
    let words = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", &disk.base];
    run_in(disk.directory(), &words);
    let mut base = fs::read(disk.path(&disk.base)).expect("the base");
    base.extend(&disk.content[FILE_SYSTEM as usize..]);
    disk.write_sparse(&disk.base, &base);
    disk.content = base;
    disk
}

impl Disk {
    /// What the file system has stored where is its own business: QEMU tells.
    fn adopt_file_system(&mut self) {
        let convert = ["qemu-img", "convert", "-O", "raw", IMAGE, "read.raw"];
        Qemu::all()[0].run_in(self.directory(), &convert);
        let read = fs::read(self.path("read.raw")).expect("the converted image");
        let length = FILE_SYSTEM as usize;
        self.content[..length].copy_from_slice(&read[..length]);
        self.check_with(&Qemu::all()[0]);
        fs::write(self.path("ext4"), &read[..length]).expect("the file system");
    }

    fn file(&self, name: &str) -> Vec<u8> {
        let dump = format!("dump {name} file");
        run_in(self.directory(), &["debugfs", "-R", &dump, "ext4"]);
        fs::read(self.path("file")).expect("what debugfs has written")
    }
}

#[test]
fn a_disk_that_a_guest_was_booted_from_is_gone_on_with() {
    let mut random = Random::new(4);
    let mut disk = with_file_system();
    disk.serve_from(FILE_SYSTEM, &mut random, End::Clean);

    let bytes = noise(5, 3_000_000 / 512 * 512);
    let script = "
        mkdir /mnt
        mount -t ext4 /dev/vda /mnt
        dd if=/dev/vdc of=/mnt/large bs=512 count=5859 2>/dev/null
        for n in 1 2 3 4 5 6 7 8 9; do echo $n >/mnt/file-$n; done
        umount /mnt
    ";
    write_with(&mut disk, &mut random, FILE_SYSTEM, script, &bytes);
    disk.adopt_file_system();
    run_in(disk.directory(), &["e2fsck", "-fn", "ext4"]);
    assert!(disk.file("large") == bytes);
    assert_eq!(disk.file("file-7"), b"7\n");

    disk.serve_from(FILE_SYSTEM, &mut random, End::Clean);
    die(&mut disk, &mut random, FILE_SYSTEM);
    disk.check_with(&Qemu::all()[0]);
    assert!(disk.flaws == Flaws::Leaks);
    disk.serve(&mut random, End::Clean);
}

/// QEMU reads zeroes beyond a base that is shorter than its image.
#[test]
fn a_guest_has_all_of_a_disk_that_is_larger_than_its_base() {
    const SIZE: u64 = 1 << 30;
    let base = Base::new(&noise(1, 1_000_001));
    let image = base.directory().join(IMAGE);
    let overlay = format!("cow-overlay={}", text(&image));
    let plugin = ["file", base.path(), "truncate=1G", &overlay];
    let setup = Setup::new().below("truncate");
    let server = setup.start(&plugin);
    server.nbdsh("h.pwrite(b'x' * 5000, 700_000)");
    server.stop();

    let bytes = noise(6, 4096);
    let script = format!(
        "blockdev --getsize64 /dev/vda
        dd if=/dev/vdc of=/dev/vda bs=512 count=8 seek={} conv=notrunc,fsync
        sync",
        SIZE / SECTOR - 8
    );
    let said = success(&mut boot(base.directory(), &script, &bytes));
    assert!(said.contains(&SIZE.to_string()), "{said}");
    check(&image);

    let server = setup.start(&plugin);
    let code = r#"
        base, written = open(ARGS[0], "rb").read(), open(ARGS[1], "rb").read(4096)
        same(h.pread(4096, G - 4096), written)
        same(h.pread(300_101, 700_000), b"x" * 5000 + base[705_000:] + bytes(100))
        same(h.pread(M, G - 4096 - M), bytes(M))
        h.pwrite(written, G - 2048 - 4096)
    "#;
    let written = base.directory().join("bytes");
    server.nbdsh_with(&[base.path(), text(&written)], code);
    server.stop();
    check(&image);
}
