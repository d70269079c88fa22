//! A kernel's file system on a disk whose overlay is kept: nbdkit is killed under
//! it, goes on from the file, and what was synced is there, for the kernel and,
//! committed, without nbdkit.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use crate::harness::command::{
    self, LIMIT, command, eventually, kill_group, outcome, signal, spawn,
};
use crate::harness::mount::{Mount, NbdFuse};
use crate::harness::{Base, Server, Setup, noise, run, run_in, scratch};
use crate::kept::name_base;

const FILES: u64 = 900;

fn file(root: &Path, number: u64) -> PathBuf {
    root.join(format!("d{}/e{}/f{number}", number % 11, number % 5))
}

/// What the base holds already; the same every time.
fn plant(root: &Path) {
    for number in 0..FILES {
        let file = file(root, number);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        let size = if number % 40 == 0 {
            300_000
        } else {
            number * 37 % 20_000
        };
        fs::write(file, noise(number, size as usize)).unwrap();
    }
}

/// Changes of every kind, so that the disk as it was synced has blocks of the base
/// beside new ones in every part: a file in another state is a flush that forgot
/// some of them.
fn change(root: &Path) {
    for number in 0..FILES {
        let old = file(root, number);
        let write_at = |offset, bytes: &[u8]| {
            let open = File::options().write(true).open(&old).unwrap();
            open.write_all_at(bytes, offset).unwrap();
        };
        let len = fs::metadata(&old).unwrap().len();
        match number % 7 {
            0 => write_at(len / 2, &noise(number + 1, 700)),
            1 => write_at(len, &noise(number + 2, 6000)),
            2 => File::options()
                .write(true)
                .open(&old)
                .and_then(|open| open.set_len(len / 3))
                .unwrap(),
            3 => fs::rename(&old, root.join(format!("moved-{number}"))).unwrap(),
            4 => fs::remove_file(&old).unwrap(),
            5 => fs::write(
                root.join(format!("new-{number}")),
                noise(number + 3, 30_000),
            )
            .unwrap(),
            // Whole blocks of zeroes over data of the base.
            _ => write_at(0, &vec![0; len as usize]),
        }
    }
}

fn assert_same_tree(left: &Path, right: &Path) {
    let (left, right) = (left.to_str().unwrap(), right.to_str().unwrap());
    run(&["diff", "-r", left, right]);
}

/// What nbdkit's log filter wrote about requests of this kind that succeeded.
fn answered(log: &Path, kind: &str) -> usize {
    let log = fs::read_to_string(log).expect("the log filter's file");
    let answer = format!("...{kind} ");
    let is_one = |line: &&str| line.contains(&answer) && line.ends_with("return=0");
    log.lines().filter(is_one).count()
}

/// A sync of new files that has begun to write, and can't end: nbdkit is stopped.
fn stop_in_a_sync(server: &Server, log: &Path, disk: &Path, tree: &Path) -> Child {
    for turn in 0..5 {
        let more = disk.join(format!("more-{turn}"));
        run(&["cp", "-a", tree.to_str().unwrap(), more.to_str().unwrap()]);
        let writes = answered(log, "Write");
        let mut sync = spawn(command("sync").arg("-f").arg(disk));
        let is_under_way = eventually(LIMIT, || answered(log, "Write") > writes);
        assert!(is_under_way, "the second sync has written nothing");
        signal(server.pid(), libc::SIGSTOP);
        // One that has all its answers ends in that time.
        if command::wait(&mut sync, Duration::from_secs(5)).is_none() {
            return sync;
        }
        signal(server.pid(), libc::SIGCONT);
    }
    panic!("each sync ends before nbdkit can be stopped");
}

fn a_kept_disk_survives(parameters: &[&str]) {
    let files = scratch();
    let (tree, log) = (files.path().join("tree"), files.path().join("log"));
    fs::create_dir(&tree).unwrap();
    plant(&tree);
    let base = Base::make(|path| {
        File::create(path)
            .and_then(|file| file.set_len(192 << 20))
            .unwrap();
        let (tree, path) = (files.path().to_str().unwrap(), path.to_str().unwrap());
        run(&["mkfs.ext4", "-q", "-F", "-d", tree, path]);
    });
    let overlay = base.directory().join("diff.qcow2");
    let overlay = overlay.to_str().unwrap();
    let kept = format!("cow-overlay={overlay}");
    let serve = [&["file", base.path(), &kept], parameters].concat();

    let logfile = format!("logfile={}", log.display());
    let server = Setup::new()
        .above("log")
        .start(&[&serve[..], &[&logfile]].concat());
    let fuse = NbdFuse::new(&server.uri());
    let disk = Mount::image(&fuse.file());
    change(&disk.path().join("tree"));
    change(&tree);
    run(&["fstrim", disk.path().to_str().unwrap()]);
    let flushes = answered(&log, "Flush");
    run(&["sync", "-f", disk.path().to_str().unwrap()]);
    assert!(
        answered(&log, "Flush") > flushes,
        "no flush came through to nbdkit"
    );

    // In the middle of another sync: as a crash finds a disk that is in use.
    let mut sync = stop_in_a_sync(&server, &log, disk.path(), &tree);
    server.kill();
    let ended = command::wait(&mut sync, LIMIT);
    if ended.is_none() {
        kill_group(&mut sync);
    }
    // Both have lost their disk, and say so in their ways; what matters is that they go.
    drop(disk);
    drop(fuse);
    let ended = ended.expect("the second sync does not end");
    assert!(!ended.success(), "the second sync had ended before");

    // 3: clusters that are leaked, which the next flush puts right.
    let check = outcome(command("qemu-img").args(["check", overlay]));
    let said = format!("{}{}", check.stdout, check.stderr);
    assert!(matches!(check.status.code(), Some(0 | 3)), "{said}");

    let server = Setup::new().start(&serve);
    let fuse = NbdFuse::new(&server.uri());
    let superblock = run(&["dumpe2fs", "-h", fuse.file().to_str().unwrap()]);
    assert!(
        superblock.contains("needs_recovery"),
        "the journal was not in use: {superblock}"
    );
    let disk = Mount::image(&fuse.file());
    assert_same_tree(&tree, &disk.path().join("tree"));
    disk.unmount();
    run(&["e2fsck", "-fn", fuse.file().to_str().unwrap()]);
    fuse.unmount();
    server.stop();
    run(&["qemu-img", "check", overlay]);

    commit_and_compare(&base, &tree);
}

/// Commits a copy of the pair: the base itself must stay as it is.
fn commit_and_compare(base: &Base, tree: &Path) {
    let within = |words: &[&str]| run_in(base.directory(), words);
    within(&["cp", "disk.img", "copy.img"]);
    within(&["cp", "diff.qcow2", "copy.qcow2"]);
    name_base(base.directory(), "copy.qcow2", "copy.img");
    within(&["qemu-img", "commit", "copy.qcow2"]);
    within(&["qemu-img", "compare", "copy.img", "diff.qcow2"]);
    within(&["e2fsck", "-fn", "copy.img"]);
    let disk = Mount::image(&base.directory().join("copy.img"));
    assert_same_tree(tree, &disk.path().join("tree"));
    disk.unmount();
}

#[test]
fn a_disk_that_was_synced_survives_a_kill() {
    a_kept_disk_survives(&[]);
}

#[test]
fn a_disk_that_was_synced_survives_a_kill_with_blocks_of_64k_that_reads_fill() {
    a_kept_disk_survives(&["cow-block-size=64K", "cow-on-read=true"]);
}
