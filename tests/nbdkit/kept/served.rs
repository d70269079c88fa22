//! Which export an image keeps, and what is told while it is served and at the end.

use std::fs::{self, File};

use super::small::{
    SIZE, base, expected, kept_in, read_by_qemu, serve, two_exports, write_through,
};
use super::{State, assert_says, check, map, text};
use crate::harness::{Server, Setup, noise, scratch};

#[test]
fn an_image_keeps_its_export_also_the_next_time() {
    let directory = scratch();
    let [dir, backing] = two_exports(directory.path());
    let kept = kept_in(directory.path(), "diff.qcow2");
    let plugin = ["file", &dir, &backing, &kept];
    let server = Server::start(&plugin);
    server.python("connect('one').pwrite(b'mine', 5000)");
    server.stop();

    let server = Server::start(&plugin);
    server.python(
        r#"
        refused("ENOENT", connect, "two")
        same(connect("one").pread(4, 5000), b"mine")
        "#,
    );
    let said = server.stop_and_tell();
    assert_says(&said, &["another export than \"two\""]);
    check(&directory.path().join("diff.qcow2"));
}

#[test]
fn a_client_that_only_looked_does_not_keep_others_out() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    let server = serve(base.path(), text(&overlay));
    server.python(
        r#"
        looking = connect("typo")
        refused("ENOENT", connect, "")
        looking.pread(512, 0)
        looking.shutdown()
        # nbdkit may take a moment to see that it has gone.
        for _ in range(1000):
            try:
                h = connect("")
                break
            except nbd.Error:
                time.sleep(0.01)
        h.pwrite(b"\x07" * 5000, 100_000)
        h.shutdown()
        for _ in range(3):
            refused("ENOENT", connect, "typo")
        "#,
    );
    server.stop();
    assert!(read_by_qemu(base.directory(), "diff.qcow2") == expected());
}

/// The first client decides how large the image is, also if it takes the wrong export.
#[test]
fn an_image_that_was_made_for_one_who_only_looked_is_said_to_be_empty() {
    let directory = scratch();
    let [dir, _] = two_exports(directory.path());
    let larger = directory.path().join("files/larger");
    fs::write(larger, noise(3, 2 * SIZE)).unwrap();
    let overlay = directory.path().join("diff.qcow2");
    let kept = kept_in(directory.path(), "diff.qcow2");
    let plugin = ["file", &dir, &kept, "cow-backing=nbd:localhost:1"];
    let said = |code: &str| {
        let server = Server::start(&plugin);
        server.python(code);
        server.stop_and_tell()
    };
    let refused = "refused('ENOENT', connect, 'one')";
    let (sizes, hint) = (["600000 bytes", "300000"], "can be removed");
    let looked = format!("assert connect('larger').get_size() == 600_000; {refused}");
    for code in [&looked, refused] {
        assert_says(&said(code), &[&sizes[..], &[hint]].concat());
    }
    // Something is in it, for those who are here and for those who come later.
    let wrote = format!("connect('larger').pwrite(b'mine', 5000); {refused}");
    for code in [&wrote, refused] {
        let said = said(code);
        assert_says(&said, &sizes);
        assert!(!said.contains(hint), "{said}");
    }
    // What the hint says to do helps.
    fs::remove_file(&overlay).unwrap();
    assert_eq!(said("connect('one').pwrite(b'mine', 5000)"), "");
}

/// The option is about clients, and not about the image.
#[test]
fn minus_r_keeps_what_is_copied_and_lets_no_client_write() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    let plugin = [
        "file",
        base.path(),
        &kept_in(base.directory(), "diff.qcow2"),
    ];
    let with = |more: &str| {
        Setup::new()
            .option("-r")
            .start(&[&plugin[..], &[more]].concat())
    };
    let server = with("cow-on-read=false");
    server.nbdsh("refused('EPERM', h.pwrite, b'x', 0); h.pread(4096, 8192)");
    let second = Setup::new().error(&plugin);
    assert_says(&second, &["in use by another program"]);
    server.stop();
    assert!(map(&overlay).iter().all(|run| run.2 == State::Base));
    let server = with("cow-on-read=true");
    server.nbdsh("h.pread(4096, 8192)");
    server.stop();
    check(&overlay);
    let copied = map(&overlay);
    assert_eq!(copied[1], (8192, 4096, State::Data), "{copied:?}");
    assert!(read_by_qemu(base.directory(), "diff.qcow2") == noise(1, SIZE));
}

/// nbdkit is in the background by then, and its parent waits for the command.
#[test]
fn a_size_that_shows_to_the_first_client_is_told_and_does_not_hang() {
    let base = base();
    let kept = kept_in(base.directory(), "diff.qcow2");
    let plugin = ["file", base.path(), "offset=512", &kept];
    let setup = Setup::new().below("offset");
    let outcome = setup.run(&plugin, "nbdinfo --size \"$uri\"");
    assert!(!outcome.status.success());
    assert_says(&outcome.stderr, &["299488 bytes", "300000", "cow-backing="]);
    assert!(outcome.stdout.is_empty(), "{}", outcome.stdout);
    assert!(!base.directory().join("diff.qcow2").exists());
}

#[test]
fn an_image_that_was_removed_is_missed_at_the_end_and_one_that_was_moved_is_not() {
    let base = base();
    let (overlay, moved) = (
        base.directory().join("diff.qcow2"),
        base.directory().join("moved.qcow2"),
    );
    let server = serve(base.path(), text(&overlay));
    write_through(&server.uri());
    fs::rename(&overlay, &moved).unwrap();
    assert_eq!(server.stop_and_tell(), "");
    assert!(read_by_qemu(base.directory(), "moved.qcow2") == expected());

    let server = serve(base.path(), text(&overlay));
    write_through(&server.uri());
    fs::remove_file(&overlay).unwrap();
    let said = server.stop_and_tell();
    assert_says(&said, &[text(&overlay), "was removed", "lost"]);
}

/// Nothing that is written to it is there when nbdkit has ended. As long as it has a name
/// somewhere it is.
#[test]
fn nothing_is_safe_in_an_image_that_has_no_name_any_more() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    let [moved, link] = ["moved.qcow2", "link.qcow2"].map(|name| base.directory().join(name));
    let server = serve(base.path(), text(&overlay));
    let flush = "h.pwrite(b'x' * 512, 0, FUA); h.flush()";
    server.nbdsh(flush);
    fs::rename(&overlay, &moved).unwrap();
    server.nbdsh(flush);
    fs::hard_link(&moved, &link).unwrap();
    fs::remove_file(&moved).unwrap();
    server.nbdsh(flush);
    fs::remove_file(&link).unwrap();
    // Another file by that name is not the one that is served.
    fs::write(&overlay, "").unwrap();
    server.nbdsh(
        r#"
        for _ in range(2):
            refused("EIO", h.flush)
            refused("EIO", h.pwrite, b"y" * 512, 0, FUA)
            refused("EIO", connect().flush)
        h.pwrite(b"z" * 512, 0)
        same(h.pread(512, 0), b"z" * 512)
        "#,
    );
    let said = server.stop_and_tell();
    assert_says(&said, &[text(&overlay), "was removed", "will be lost"]);
}

#[test]
fn an_image_that_was_cut_while_it_is_served_makes_flushes_fail() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    let server = serve(base.path(), text(&overlay));
    server.nbdsh("h.pwrite(b'x' * 4096, 0); h.flush()");
    File::options()
        .write(true)
        .open(&overlay)
        .and_then(|file| file.set_len(1000))
        .unwrap();
    server.nbdsh(
        r#"
        h.pwrite(b"y" * 4096, 8192)
        for _ in range(2):
            refused("EIO", h.flush)
        "#,
    );
    let said = server.stop_and_tell();
    assert_says(&said, &["truncated to", "incomplete"]);
}
