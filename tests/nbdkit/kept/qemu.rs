//! Images that QEMU's tools have had in their hands since: each is either resumed,
//! and then every byte is what QEMU reads, or refused in one sentence that says what to do.
//! (Those in which something lies elsewhere than before are in home.rs.)

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use tempfile::TempDir;

use super::{Disk, assert_refused, attempt_beside, check, compare, name_base, text};
use crate::harness::qemu::Qemu;
use crate::harness::{Setup, run, run_in, scratch};

/// A disk with clusters of every kind: of the base alone (from 3M on), with data,
/// zeroes and base (the first), with data alone (1M), with zeroes alone (2M).
pub fn template() -> Disk {
    let disk = Disk::new(4 << 20, 4096);
    let server = disk.serve();
    let code = r#"
        disk.write(64 * K, noise(20 * K, 1))
        disk.write(96 * K + 100, noise(300, 2))
        disk.zero(20 * K, 32 * K)
        disk.write(M, noise(128 * K, 3))
        disk.trim(2 * M, 2 * M + 128 * K)
        disk.write(2 * M + 512 * K, noise(4 * K, 4))
        disk.check().save()
    "#;
    disk.client(&server, 1, code);
    server.stop();
    disk.assert_sound();
    disk
}

/// Copies of the base and the image, with their times.
pub fn copy(disk: &Disk) -> TempDir {
    let copy = scratch();
    let to = text(copy.path());
    run(&[
        "cp",
        "-a",
        "--sparse=always",
        disk.base.path(),
        text(&disk.overlay()),
        to,
    ]);
    copy
}

/// What QEMU reads.
pub fn converted(directory: &Path) -> Vec<u8> {
    run_in(
        directory,
        &["qemu-img", "convert", "-O", "raw", "diff.qcow2", "qemu.raw"],
    );
    fs::read(directory.join("qemu.raw")).expect("the converted image")
}

pub fn plugin(directory: &Path) -> [String; 3] {
    let path = |name| text(&directory.join(name)).to_string();
    let kept = format!("cow-overlay={}", path("diff.qcow2"));
    ["file".to_string(), path("disk.img"), kept]
}

/// It is resumed, reads as in QEMU, can be written to, and is sound then.
pub fn assert_resumed(directory: &Path, what: &str) {
    let mut bytes = converted(directory);
    let words = plugin(directory);
    let words = words.each_ref().map(String::as_str);
    let read = directory.join("nbdkit.raw");
    let io =
        "qemu-io -f raw -c 'write -P 119 10000 30000' -c 'write -P 119 3000000 10000' \"$uri\"";
    let shell = format!("nbdcopy \"$uri\" {} && {io}", text(&read));
    let served = Setup::new().run(&words, &shell);
    assert!(
        served.status.success(),
        "{what}: {}{}",
        served.stdout,
        served.stderr
    );
    assert!(fs::read(&read).unwrap() == bytes, "{what}: a wrong read");

    let overlay = directory.join("diff.qcow2");
    check(&overlay);
    bytes[10_000..40_000].fill(119);
    bytes[3_000_000..3_010_000].fill(119);
    let expected = directory.join("expected.raw");
    fs::write(&expected, bytes).unwrap();
    compare(&overlay, &expected);
}

/// Each command of a shell with a copy of the pair as its directory. It must succeed.
pub fn after(disk: &Disk, shell: &str) -> TempDir {
    after_with(&Qemu::all()[0], disk, shell)
}

fn after_with(qemu: &Qemu, disk: &Disk, shell: &str) -> TempDir {
    let copy = copy(disk);
    qemu.run_script(copy.path(), shell);
    copy
}

pub fn write(command: &str) -> String {
    format!("qemu-io -d unmap -c '{command}' diff.qcow2")
}

fn assert_all_resumed(shells: &[String], changes_content: bool) {
    let disk = template();
    let before = fs::read(disk.model()).unwrap();
    for qemu in Qemu::all() {
        for shell in shells {
            let what = format!("{shell} ({})", qemu.name());
            let copy = after_with(qemu, &disk, shell);
            let is_changed = converted(copy.path()) != before;
            assert_eq!(is_changed, changes_content, "{what}");
            assert_resumed(copy.path(), &what);
        }
    }
}

#[test]
fn an_image_that_was_only_read_or_mended_is_resumed() {
    let shells = [
        "qemu-img info diff.qcow2",
        "qemu-img check diff.qcow2",
        "qemu-img check -r leaks diff.qcow2",
        "qemu-img check -r all diff.qcow2",
        "qemu-img map diff.qcow2",
        "qemu-img measure -O qcow2 diff.qcow2",
        "! qemu-img compare diff.qcow2 disk.img",
        "qemu-img convert -O qcow2 diff.qcow2 other.qcow2",
        "qemu-img create -q -f qcow2 -F qcow2 -b diff.qcow2 upper.qcow2",
        "qemu-img rebase -u -F raw -b ./disk.img diff.qcow2",
        "qemu-img rebase -u -F raw -b \"$PWD/disk.img\" diff.qcow2",
        "qemu-img resize diff.qcow2 4M",
        "qemu-img amend -o compat=1.1 diff.qcow2",
        "qemu-img snapshot -l diff.qcow2",
        "qemu-io -c 'read 0 4M' diff.qcow2",
        "qemu-io -c 'flush' diff.qcow2",
    ];
    assert_all_resumed(&shells.map(str::to_string), false);
}

/// Snapshots that are gone again leave nothing behind.
#[test]
fn an_image_that_had_snapshots_is_resumed_without_them() {
    let disk = template();
    let taken = "qemu-img snapshot -c s diff.qcow2";
    for shell in [
        taken.to_string(),
        format!("{taken}; qemu-img snapshot -a s diff.qcow2"),
    ] {
        let copy = after(&disk, &shell);
        let words = plugin(copy.path());
        let overlay = copy.path().join("diff.qcow2");
        let words = words.each_ref().map(String::as_str);
        assert_refused(&words, &overlay, &["internal snapshots", "snapshot -d"]);
        run_in(
            copy.path(),
            &["qemu-img", "snapshot", "-d", "s", "diff.qcow2"],
        );
        assert_resumed(copy.path(), &shell);
    }
}

/// In clusters that have data QEMU writes to the place that is theirs, and zeroes
/// need no place.
#[test]
fn an_image_that_qemu_wrote_to_in_place_is_resumed() {
    let shells = [
        "write -P 9 72k 4k",
        "write -P 9 66k 1k",
        "write -P 9 100000 3",
        "write -P 9 24k 4k",
        "write -P 9 40k 8k",
        "write -P 9 1M 128k",
        "write -z 64k 16k",
        "write -z 0 128k",
        "write -z 1M 64k",
        "write -z -u 64k 16k",
        "write -z -u 1M 128k",
        "write -z -u 3M 256k",
        "discard 1M 128k",
        "discard 3M 256k",
    ];
    assert_all_resumed(&shells.map(write), true);
}

/// New clusters for a disk that is written from its start to its end happen to find
/// room where they should be.
#[test]
fn an_image_that_qemu_wrote_all_of_is_resumed() {
    let shell = "qemu-img convert -n -O qcow2 disk.img diff.qcow2";
    assert_all_resumed(&[shell.to_string()], true);
}

/// What this filter can't keep up, or can't know.
#[test]
fn an_image_that_is_no_overlay_of_this_kind_any_more_is_refused() {
    let disk = template();
    for (shell, words) in [
        (
            write("write -c -P 9 3M 128k"),
            ["compressed", "qemu-img commit"],
        ),
        // The base was taken away, so that all of its data is in the image now.
        (
            "qemu-img rebase -b '' diff.qcow2".into(),
            ["no backing file name", "qemu-img rebase -u"],
        ),
        (
            "qemu-img resize diff.qcow2 +1M".into(),
            ["byte 24", "qemu-img resize --shrink IMAGE 4194304"],
        ),
        (
            "qemu-img resize --shrink diff.qcow2 2M".into(),
            ["byte 24", "qemu-img resize IMAGE 4194304"],
        ),
        (
            "qemu-img bitmap --add diff.qcow2 b".into(),
            ["autoclear", "qemu-img bitmap --remove"],
        ),
        (
            "qemu-img bitmap --add --disable diff.qcow2 b".into(),
            ["autoclear", "qemu-img bitmap --remove"],
        ),
        (
            "qemu-img rebase -u -F qcow2 -b disk.img diff.qcow2".into(),
            ["recorded as raw", "qemu-img rebase -u"],
        ),
    ] {
        let copy = after(&disk, &shell);
        assert_pair_refused(copy.path(), &words);
    }
}

fn assert_pair_refused(directory: &Path, words: &[&str]) {
    let plugin = plugin(directory);
    let plugin = plugin.each_ref().map(String::as_str);
    assert_refused(&plugin, &directory.join("diff.qcow2"), words);
}

/// What was not made by this filter, or not for this.
#[test]
fn an_image_of_another_kind_is_refused() {
    let disk = template();
    for (options, words) in [
        ("cluster_size=64k", ["extended L2", "qemu-img commit"]),
        (
            "extended_l2=on,cluster_size=128k",
            ["nbco", "qemu-img commit"],
        ),
        (
            "extended_l2=on,data_file=data,cluster_size=128k",
            ["in another file", "qemu-img commit"],
        ),
        (
            "extended_l2=on,cluster_size=128k,compression_type=zstd",
            ["compressed", "qemu-img commit"],
        ),
        ("compat=0.10", ["version", "qemu-img commit"]),
        (
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 \
             --object secret,id=s,data=abc",
            ["encrypted", "can't do"],
        ),
    ] {
        let shell = format!(
            "rm diff.qcow2; qemu-img create -q -f qcow2 -o {options} -F raw -b disk.img diff.qcow2"
        );
        let copy = after(&disk, &shell);
        assert_pair_refused(copy.path(), &words);
    }
}

#[test]
fn an_image_without_a_backing_file_is_refused() {
    let copy = after(
        &template(),
        "rm diff.qcow2; qemu-img create -q -f qcow2 diff.qcow2 4M",
    );
    assert_pair_refused(copy.path(), &["no backing file", "qemu-img convert -O raw"]);
}

/// The command that the messages have.
#[test]
fn what_is_in_an_image_of_another_kind_can_be_written_to_a_new_one() {
    let disk = template();
    let directory = after(
        &disk,
        "qemu-img create -q -f qcow2 -F raw -b disk.img other.qcow2 && \
         qemu-io -c 'write -P 9 1M 300k' -c 'write -z 2M 64k' -c 'write -c -P 8 3M 64k' \
         other.qcow2 && qemu-img convert -O raw other.qcow2 expected.raw && rm diff.qcow2",
    );
    let plugin = plugin(directory.path());
    let other = directory.path().join("other.qcow2");
    let shell = format!(
        "qemu-img rebase -u -F raw -b \"$uri\" {0} && qemu-img commit -q -d {0}",
        text(&other)
    );
    let served = Setup::new().run(&plugin.each_ref().map(String::as_str), &shell);
    assert!(served.status.success(), "{}", served.stderr);
    let overlay = directory.path().join("diff.qcow2");
    check(&overlay);
    compare(&overlay, &directory.path().join("expected.raw"));
    assert_resumed(directory.path(), "a new image");
}

/// What is committed is in the base, and the image says nothing more than that. (Unless
/// it is told not to, `qemu-img commit` then makes another, empty image of it.)
#[test]
fn a_committed_image_is_resumed() {
    let disk = template();
    let model = fs::read(disk.model()).unwrap();
    for command in [
        "qemu-img commit -d diff.qcow2",
        "qemu-img commit diff.qcow2",
    ] {
        let copy = after(&disk, command);
        assert!(converted(copy.path()) == model, "{command}");
        assert!(
            fs::read(copy.path().join("disk.img")).unwrap() == model,
            "{command}"
        );
        assert_resumed(copy.path(), command);
    }
}

/// A rebase that is safe copies what differs into the image: what has no place there
/// yet gets a new one. One between bases that are the same needs none.
#[test]
fn a_rebased_image_is_resumed_over_its_new_base() {
    let disk = template();
    let before = fs::read(disk.model()).unwrap();
    let rebase = "qemu-img rebase -F raw -b new.img diff.qcow2";
    let same = after(
        &disk,
        &format!("cp disk.img new.img; {rebase}; mv new.img moved; mv moved new.img"),
    );
    assert!(converted(same.path()) == before);
    let words = plugin(same.path());
    let overlay = same.path().join("diff.qcow2");
    assert_refused(
        &words.each_ref().map(String::as_str),
        &overlay,
        &["new.img"],
    );
    fs::rename(same.path().join("new.img"), same.path().join("disk.img")).unwrap();
    name_base(same.path(), "diff.qcow2", "disk.img");
    assert_resumed(same.path(), rebase);

    let differs = after(&disk, "cp disk.img new.img");
    let other = File::options()
        .write(true)
        .open(differs.path().join("new.img"))
        .unwrap();
    other.write_all_at(&[5; 4096], 3 << 20).unwrap();
    // The time of the base is not what this is about.
    run_in(differs.path(), &["touch", "-r", "disk.img", "new.img"]);
    run_in(differs.path(), &["sh", "-c", rebase]);
    assert!(converted(differs.path()) == before);
    fs::rename(
        differs.path().join("new.img"),
        differs.path().join("disk.img"),
    )
    .unwrap();
    name_base(differs.path(), "diff.qcow2", "disk.img");
    assert_resumed(differs.path(), "rebased to another disk");
}

/// QEMU refuses these itself, and leaves the image as it was.
#[test]
fn what_qemu_can_not_do_to_the_image_leaves_it_resumable() {
    let disk = template();
    for words in [
        &["qemu-img", "amend", "-o", "compat=0.10", "diff.qcow2"][..],
        &["qemu-img", "amend", "-o", "backing_file=x", "diff.qcow2"],
        &["qemu-img", "amend", "-o", "extended_l2=off", "diff.qcow2"],
        &[
            "qemu-img",
            "rebase",
            "-F",
            "raw",
            "-b",
            "missing",
            "diff.qcow2",
        ],
        &["qemu-img", "snapshot", "-a", "missing", "diff.qcow2"],
    ] {
        let copy = copy(&disk);
        let overlay = copy.path().join("diff.qcow2");
        let ended = attempt_beside(&overlay, words);
        assert!(!ended.status.success(), "{words:?}: {}", ended.stdout);
        assert_resumed(copy.path(), &words.join(" "));
    }
}
