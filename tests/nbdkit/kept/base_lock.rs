//! While an image is served nothing writes to its base that asks for locks, as qemu does.

use std::fs;

use super::locks::Holder;
use super::small::{SIZE, base, expected, kept_in, look, read_by_qemu, serve, write_through};
use super::{Seal, assert_refused, assert_says, attempt, check, text};
use crate::harness::{Base, Server, Setup, run};

/// A second image over the base, with something in it.
fn other_image(base: &Base) -> String {
    let other = base.directory().join("other.qcow2");
    let server = serve(base.path(), text(&other));
    write_through(&server.uri());
    server.stop();
    text(&other).to_string()
}

#[test]
fn what_would_write_to_the_base_is_refused_while_it_is_served() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    let other = other_image(&base);
    // As a new image is made, and as one is taken up again.
    for _start in ["made", "resumed"] {
        let server = serve(base.path(), text(&overlay));
        server.nbdsh("h.pwrite(b'x' * 512, 0)");
        let before = Seal::of(base.path().as_ref());
        for words in [
            &[
                "qemu-io",
                "-f",
                "raw",
                "-c",
                "write -P 1 0 512",
                base.path(),
            ][..],
            &["qemu-img", "commit", "-d", &other],
            &["qemu-img", "resize", "-f", "raw", base.path(), "+1M"],
        ] {
            let ended = attempt(words);
            // (qemu-io of old versions says so and ends with success.)
            let said = format!("{}{}", ended.stdout, ended.stderr);
            assert!(said.contains("lock"), "{words:?}: {said}");
            assert_eq!(Seal::of(base.path().as_ref()), before, "{words:?}");
        }
        server.stop();
    }
    check(&overlay);
}

#[test]
fn what_only_reads_the_base_works_while_it_is_served() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    let other = other_image(&base);
    let (image, path) = (text(&overlay), base.path());
    let server = serve(path, image);
    write_through(&server.uri());
    server.nbdsh("h.flush()");
    let out = base.directory().join("out.raw");
    run(&["qemu-img", "info", path]);
    run(&["qemu-img", "map", "-f", "raw", path]);
    run(&["qemu-img", "compare", "-f", "raw", "-F", "raw", path, path]);
    run(&[
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        "raw",
        path,
        text(&out),
    ]);
    for words in [&["info"][..], &["map"], &["convert", "-O", "raw"]] {
        let to = (words[0] == "convert").then_some(text(&out));
        let words = [&["qemu-img"], words, &["-U", image]].concat();
        run(&words.into_iter().chain(to).collect::<Vec<_>>());
    }
    run(&[
        "qemu-img",
        "compare",
        "-U",
        "-f",
        "qcow2",
        "-F",
        "raw",
        image,
        text(&out),
    ]);
    // Others that have the same base.
    run(&["qemu-img", "check", &other]);
    run(&["qemu-io", "-c", "write -P 9 0 512", &other]);
    let second = serve(path, text(&base.directory().join("second.qcow2")));
    write_through(&second.uri());
    let plain = Server::start(&["file", path]);
    write_through(&plain.uri());
    plain.stop();
    second.stop();
    server.stop();
    assert!(read_by_qemu(base.directory(), "diff.qcow2") == expected());
    assert!(read_by_qemu(base.directory(), "second.qcow2") == expected());
}

/// When nbdkit has ended, however it did, the base is anybody's.
#[test]
fn the_lock_on_the_base_goes_with_its_nbdkit() {
    let mut base = base();
    base.grow_to(300_032);
    let overlay = base.directory().join("diff.qcow2");
    for end in [Server::stop, Server::kill] {
        let server = serve(base.path(), text(&overlay));
        write_through(&server.uri());
        server.nbdsh("h.flush()");
        end(server);
        run(&["qemu-img", "commit", "-q", "-d", text(&overlay)]);
        let committed = fs::read(base.path()).unwrap();
        assert!(committed[..SIZE] == expected());
    }
}

/// One that serves a raw file, and writes to it if a client does.
fn qemu_nbd<'a>(socket: &'a str, file: &'a str) -> [&'a str; 7] {
    ["qemu-nbd", "-t", "-f", "raw", "-k", socket, file]
}

// What qemu-nbd does with a raw file, and that it does not share its size, are two ranges.

#[test]
fn a_base_that_is_written_to_is_refused_at_start() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    let kept = kept_in(base.directory(), "diff.qcow2");
    let socket = base.directory().join("qemu-nbd");
    let qemu_nbd = qemu_nbd(text(&socket), base.path());
    let plugin = ["file", base.path(), &kept];
    let words = ["disk.img", "another program", "writes"];

    let holder = Holder::start(&qemu_nbd, 2);
    let error = Setup::new().error(&plugin);
    assert_says(&error, &[&words[..], &[text(&overlay)]].concat());
    assert!(!overlay.exists());
    holder.stop();
    look(base.path(), text(&overlay));

    let holder = Holder::start(&qemu_nbd, 2);
    assert_refused(&plugin, &overlay, &words);
    holder.stop();
    // One that reads is no reason.
    let reader = [&qemu_nbd[..1], &["-r"], &qemu_nbd[1..]].concat();
    let holder = Holder::start(&reader, 2);
    look(base.path(), text(&overlay));
    holder.stop();
}

/// As the manual says: under another kind of name it is not locked.
#[test]
fn a_base_with_a_protocol_is_not_locked() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    let kept = kept_in(base.directory(), "diff.qcow2");
    let backing = format!("cow-backing=file:{}", base.path());
    let server = Server::start(&["file", base.path(), &kept, &backing]);
    write_through(&server.uri());
    run(&["qemu-io", "-f", "raw", "-c", "read 0 512", base.path()]);
    let socket = base.directory().join("qemu-nbd");
    let qemu_nbd = qemu_nbd(text(&socket), base.path());
    Holder::start(&qemu_nbd, 2).stop();
    server.stop();
    check(&overlay);
}

#[test]
fn where_there_are_no_locks_this_is_told_once() {
    let base = base();
    let kept = kept_in(base.directory(), "diff.qcow2");
    let log = base.directory().join("strace");
    let inject = "inject=fcntl:error=ENOLCK";
    let setup = Setup::new().under(&[
        "strace",
        "-D",
        "-f",
        "-o",
        text(&log),
        "-P",
        base.path(),
        "-e",
        "trace=fcntl",
        "-e",
        inject,
    ]);
    for _start in ["made", "resumed"] {
        let server = setup.start(&["file", base.path(), &kept]);
        write_through(&server.uri());
        server.nbdsh("same(h.pread(5000, 100_000), bytes([7]) * 5000)");
        let said = server.stop_and_tell();
        let words = [
            "warning",
            base.path(),
            "can't be locked",
            "No locks available",
        ];
        assert_says(&said, &words);
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(fs::read_to_string(&log).unwrap().contains("INJECTED"));
    }
    assert!(read_by_qemu(base.directory(), "diff.qcow2") == expected());
}
