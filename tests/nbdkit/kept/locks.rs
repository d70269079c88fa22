//! One program writes to an image at a time, be it nbdkit or one of QEMU's.

use std::fs;
use std::process::{Child, Stdio};

use super::small::{SIZE, base, serve};
use super::{Disk, Seal, assert_says, attempt, compare, text};
use crate::harness::command::{LIMIT, command, eventually, kill_group, signal, spawn, wait};
use crate::harness::{Setup, noise, run, scratch};

fn disk() -> Disk {
    let disk = Disk::new((3 << 20) + 512, 4096);
    let server = disk.serve();
    disk.client(&server, 1, "disk.run(60).check().save()");
    server.stop();
    disk
}

fn assert_in_use(disk: &Disk) {
    let before = Seal::of(&disk.overlay());
    let plugin = disk.plugin(&[]);
    let plugin: Vec<_> = plugin.iter().map(String::as_str).collect();
    let error = Setup::new().error(&plugin);
    assert_says(
        &error,
        &[text(&disk.overlay()), "in use by another program"],
    );
    assert_eq!(Seal::of(&disk.overlay()), before);
}

#[test]
fn a_second_nbdkit_is_refused_and_the_first_goes_on() {
    let disk = disk();
    let server = disk.serve();
    disk.client(&server, 2, "disk.run(20).save()");
    for _ in 0..3 {
        assert_in_use(&disk);
    }
    disk.client(&server, 3, "disk.check().run(20).check().save()");
    server.stop();
    disk.assert_sound();
}

/// Also while the image has just been made, and when its only client has gone.
#[test]
fn an_image_that_was_made_a_moment_ago_is_locked() {
    let disk = Disk::new(1 << 20, 4096);
    let server = disk.serve();
    run(&["nbdinfo", "--size", &server.uri()]);
    assert_in_use(&disk);
    server.stop();
}

#[test]
fn what_would_write_to_a_served_image_is_refused() {
    let disk = disk();
    let server = disk.serve();
    // Nothing is trimmed, whose space would be given back while the image is looked at.
    let write = "[disk.write(i * 9999, bytes([i + 1]) * 5000) for i in range(20)]";
    disk.client(&server, 2, &format!("{write}; h.flush(); disk.save()"));
    let overlay = disk.overlay();
    let image = text(&overlay);
    let before = Seal::of(&overlay);
    for words in [
        &["qemu-io", "-c", "write -P 1 0 4096", image][..],
        &["qemu-img", "commit", image],
        &["qemu-img", "rebase", "-F", "raw", "-b", "", image],
        &["qemu-img", "rebase", "-u", "-F", "raw", "-b", "x", image],
        &["qemu-img", "resize", image, "+1M"],
        &["qemu-img", "check", "-r", "all", image],
        &["qemu-img", "snapshot", "-c", "s", image],
        &["qemu-img", "amend", "-o", "lazy_refcounts=on", image],
        &[
            "qemu-img",
            "convert",
            "-n",
            "-O",
            "qcow2",
            disk.base.path(),
            image,
        ],
        // Neither is one that reads, and does not want it to change meanwhile.
        &["qemu-img", "info", image],
        &["qemu-img", "check", image],
    ] {
        let ended = attempt(words);
        // (qemu-io of old versions says so and ends with success.)
        let said = format!("{}{}", ended.stdout, ended.stderr);
        assert!(said.contains("lock"), "{words:?}: {said}");
        assert_eq!(Seal::of(&overlay), before, "{words:?}");
    }
    server.stop();
    disk.assert_sound();
}

#[test]
fn what_only_reads_and_says_so_works_while_it_is_served() {
    let disk = disk();
    let server = disk.serve();
    disk.client(&server, 2, "disk.run(20); h.flush(); disk.save()");
    let (overlay, model) = (disk.overlay(), disk.model());
    let (image, model) = (text(&overlay), text(&model));
    let out = disk.base.directory().join("out.raw");
    run(&["qemu-img", "info", "-U", image]);
    run(&["qemu-img", "map", "-U", image]);
    run(&[
        "qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", image, model,
    ]);
    run(&["qemu-img", "convert", "-U", "-O", "raw", image, text(&out)]);
    assert!(fs::read(&out).unwrap() == fs::read(model).unwrap());
    // And leaves it to nbdkit.
    disk.client(&server, 3, "disk.check().run(20).check().save()");
    server.stop();
    disk.assert_sound();
}

/// As the manual says: what is in a block that the image has is written in place.
#[test]
fn what_is_read_while_it_is_served_is_flushed_or_newer() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    let server = serve(base.path(), text(&overlay));
    let shown = |code: &str| {
        server.nbdsh(code);
        let out = base.directory().join("out.raw");
        let words = ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw"];
        run(&[&words[..], &[text(&overlay), text(&out)]].concat());
        let mut bytes = fs::read(out).unwrap();
        bytes.truncate(SIZE);
        bytes
    };
    let mut expected = noise(1, SIZE);
    expected[..4096].fill(1);
    assert!(shown("h.pwrite(bytes([1]) * 4096, 0); h.flush()") == expected);
    expected[..4096].fill(2);
    let both = "h.pwrite(bytes([2]) * 4096, 0); h.pwrite(bytes([3]) * 4096, 8192)";
    assert!(shown(both) == expected);
    expected[..4096].fill(0);
    assert!(shown("h.trim(4096, 0)") == expected);
    expected[8192..12288].fill(3);
    assert!(shown("h.flush()") == expected);
    server.stop();
}

pub struct Holder(Child);

impl Holder {
    /// Starts a program, and waits until it has its locks on a file: so many ranges.
    pub fn start(words: &[&str], ranges: usize) -> Holder {
        let mut holder = command(words[0]);
        holder
            .args(&words[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        let holder = Holder(spawn(&mut holder));
        let descriptors = format!("/proc/{}/fdinfo", holder.0.id());
        let has_locks = || {
            let files = fs::read_dir(&descriptors).into_iter().flatten().flatten();
            let texts = files.filter_map(|file| fs::read_to_string(file.path()).ok());
            let locks = |text: String| {
                text.lines()
                    .filter(|line| line.starts_with("lock:"))
                    .count()
            };
            texts.map(locks).any(|count| count >= ranges)
        };
        assert!(eventually(LIMIT, has_locks), "{words:?} locks nothing");
        holder
    }

    pub fn stop(mut self) {
        kill_group(&mut self.0);
        assert!(wait(&mut self.0, LIMIT).is_some(), "a program does not end");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        kill_group(&mut self.0);
        let _ = self.0.wait();
    }
}

#[test]
fn nbdkit_is_refused_while_qemu_has_the_image() {
    let disk = disk();
    let overlay = disk.overlay();
    let socket = disk.base.directory().join("qemu-nbd");
    for words in [
        &[
            "qemu-nbd",
            "-t",
            "-f",
            "qcow2",
            "-k",
            text(&socket),
            text(&overlay),
        ][..],
        &["qemu-io", "-f", "qcow2", text(&overlay)],
    ] {
        // What it has and what it does not share, of which writing is one.
        let holder = Holder::start(words, 3);
        assert_in_use(&disk);
        holder.stop();
        let server = disk.serve();
        disk.client(&server, 5, "disk.check()");
        server.stop();
    }
}

/// Who opens that one finds no lock on it, and writes to it as well.
#[test]
fn a_file_that_is_put_in_the_place_of_the_image_before_it_is_locked_is_not_passed_by() {
    let disk = disk();
    let (overlay, directory) = (disk.overlay(), disk.base.directory());
    let [other, old] = ["other", "old"].map(|name| directory.join(name));
    fs::copy(&overlay, &other).unwrap();
    let [before, other_before] = [&overlay, &other].map(|path| Seal::of(path));
    let plugin = disk.plugin(&[]);
    let plugin: Vec<_> = plugin.iter().map(String::as_str).collect();
    // It is stopped at its first call for a lock on the image.
    let log = directory.join("strace");
    let setup = Setup::new().under(&[
        "strace",
        "-D",
        "-o",
        text(&log),
        "-P",
        text(&overlay),
        "-e",
        "trace=fcntl",
        "-e",
        "inject=fcntl:signal=SIGSTOP:when=1",
    ]);
    let scratch = scratch();
    let mut nbdkit = setup.command(&plugin, scratch.path(), |nbdkit| {
        nbdkit.args(["-U", "-", "--run", "true"]);
    });
    let stderr = scratch.path().join("stderr");
    nbdkit.stderr(fs::File::create(&stderr).unwrap());
    let mut child = spawn(&mut nbdkit);
    let is_stopped =
        || fs::read_to_string(&log).is_ok_and(|log| log.contains("stopped by SIGSTOP"));
    assert!(eventually(LIMIT, is_stopped), "nbdkit asks for no lock");
    fs::rename(&overlay, &old).unwrap();
    fs::rename(&other, &overlay).unwrap();
    signal(child.id(), libc::SIGCONT);
    let ended = wait(&mut child, LIMIT);
    kill_group(&mut child);
    assert_eq!(ended.and_then(|status| status.code()), Some(1));
    let said = fs::read_to_string(&stderr).unwrap();
    assert_says(
        &said,
        &[text(&overlay), "another file was put in its place"],
    );
    assert_eq!(Seal::of(&old), before);
    assert_eq!(Seal::of(&overlay), other_before);
}

/// One of another size, though it has a base of the same name.
#[test]
fn a_file_that_is_put_in_the_place_of_a_new_image_is_looked_at_as_any_other() {
    let directory = scratch();
    let [overlay, other] = ["diff.qcow2", "other"].map(|name| directory.path().join(name));
    let backing = "cow-backing=nbd:localhost:1";
    let kept = |path| format!("cow-overlay={}", text(path));
    let server = Setup::new().start(&["memory", "2M", &kept(&other), backing]);
    run(&["nbdinfo", "--size", &server.uri()]);
    server.stop();
    let before = Seal::of(&other);

    // Stopped when the new one has got its name.
    let files = scratch();
    let log = files.path().join("strace");
    let server = Setup::new()
        .under(&[
            "strace",
            "-D",
            "-f",
            "-o",
            text(&log),
            "-P",
            text(directory.path()),
            "-e",
            "trace=fsync",
            "-e",
            "inject=fsync:signal=SIGSTOP:when=1",
        ])
        .start(&["memory", "1M", &kept(&overlay), backing]);
    let mut client = spawn(&mut server.script("refused('ENOENT', connect)"));
    let is_stopped =
        || fs::read_to_string(&log).is_ok_and(|log| log.contains("stopped by SIGSTOP"));
    assert!(eventually(LIMIT, is_stopped), "the directory is not synced");
    fs::rename(&other, &overlay).unwrap();
    signal(server.pid(), libc::SIGCONT);
    let ended = wait(&mut client, LIMIT);
    kill_group(&mut client);
    assert!(ended.is_some_and(|status| status.success()), "{ended:?}");
    let words = [text(&overlay), "2097152", "1048576"];
    assert_says(&server.stop_and_tell(), &words);
    assert_eq!(Seal::of(&overlay), before);
}

#[test]
fn a_lock_goes_with_its_nbdkit() {
    let disk = disk();
    for round in 0..3 {
        let server = disk.serve();
        disk.client(
            &server,
            round,
            "disk.check().run(20); h.flush(); disk.save()",
        );
        server.kill();
    }
    let server = disk.serve();
    disk.client(&server, 9, "disk.check()");
    server.stop();
    run(&["qemu-io", "-c", "write -P 1 0 4096", text(&disk.overlay())]);
    let words = ["qemu-io", "-f", "raw", "-c", "write -P 1 0 4096"];
    run(&[&words[..], &[text(&disk.model())]].concat());
    compare(&disk.overlay(), &disk.model());
}
