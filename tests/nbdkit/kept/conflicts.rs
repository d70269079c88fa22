//! What can't go together with an image, or with the one that is there, and when
//! that is told.

use std::fs::{self, File};
use std::path::Path;

use super::small::{
    base, expected, kept_in, look, read_by_qemu, recorded, serve, two_exports, write_through,
};
use super::{
    Disk, assert_refused, assert_says, attempt, check, compare, name_base, refused_to_a_client,
    text,
};
use crate::harness::mount::Mount;
use crate::harness::{Base, Server, Setup, run, scratch};

#[test]
fn what_one_image_can_not_do_is_refused_at_start() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    let kept = kept_in(base.directory(), "diff.qcow2");
    for (parameter, words) in [
        ("cow-scope=connection", "cow-scope=connection"),
        ("cow-block-size=128K", "512 to 64K"),
        ("cow-block-size=256K", "512 to 64K"),
        ("cow-block-size=2G", "512 to 64K"),
        ("cow-overlay=", "cow-overlay="),
        ("cow-overlay=new.qcow2/", "cow-overlay=new.qcow2/: "),
        ("cow-backing=", "cow-backing="),
    ] {
        let error = Setup::new().error(&["file", base.path(), &kept, parameter]);
        assert_says(&error, &[words]);
        assert!(!overlay.exists(), "{parameter}");
    }
    let backing = format!("cow-backing={}", base.path());
    let error = Setup::new().error(&["file", base.path(), &backing]);
    assert_says(&error, &["cow-backing", "cow-overlay"]);
    // The smallest and the largest block.
    for (size, cluster) in [("512", 16 << 10), ("64K", 2 << 20)] {
        let block = format!("cow-block-size={size}");
        let server = Server::start(&["file", base.path(), &kept, &block]);
        run(&["nbdinfo", "--size", &server.uri()]);
        server.stop();
        let info = run(&["qemu-img", "info", "--output=json", text(&overlay)]);
        let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
        assert_eq!(info["cluster-size"], cluster);
        fs::remove_file(&overlay).unwrap();
    }
}

/// Another name may be another disk, even of the same size.
#[test]
fn a_second_export_is_refused_and_the_first_goes_on() {
    let directory = scratch();
    let [dir, backing] = two_exports(directory.path());
    let kept = kept_in(directory.path(), "diff.qcow2");
    let overlay = directory.path().join("diff.qcow2");
    for plugin in [
        &["file", &dir, &backing][..],
        &[
            "memory",
            "300000",
            r#"cow-backing=json:{"driver":"raw","file":{"driver":"null-co","size":300000}}"#,
        ],
    ] {
        let server = Server::start(&[plugin, &[&kept]].concat());
        server.python(
            r#"
            first = connect("one")
            first.pwrite(b"mine", 5000)
            for _ in range(2):
                refused("ENOENT", connect, "two")
            first.pwrite(b"more", 9000)
            again = connect("one")
            same(again.pread(4, 5000) + again.pread(4, 9000), b"minemore")
            "#,
        );
        let said = server.stop_and_tell();
        let refusal = said.lines().find(|line| line.contains("error: "));
        assert_says(
            refusal.expect("a message"),
            &["\"one\"", "\"two\"", text(&overlay)],
        );
        check(&overlay);
        fs::remove_file(&overlay).unwrap();
    }
}

#[test]
fn a_base_of_another_size_is_refused() {
    for size in [299_999, 300_001, 1 << 20, 0] {
        let mut base = base();
        let overlay = base.directory().join("diff.qcow2");
        let server = serve(base.path(), text(&overlay));
        write_through(&server.uri());
        server.stop();
        base.grow_to(size);
        let kept = kept_in(base.directory(), "diff.qcow2");
        let plugin = ["file", base.path(), &kept];
        let (is, was) = (format!(" {size}"), "300000 bytes");
        if size > 300_000 {
            assert_refused(&plugin, &overlay, &[&is, was]);
        } else {
            // A filter could make the same disk of a shorter file.
            let error = refused_to_a_client(&Setup::new(), &plugin);
            assert_says(&error, &[text(&overlay), &is, was]);
        }
    }
}

/// Where the base is no file, it is the export that tells.
#[test]
fn another_size_of_a_base_that_is_no_file_is_refused() {
    let directory = scratch();
    let kept = kept_in(directory.path(), "diff.qcow2");
    let plugin = |size| ["memory", size, &kept, "cow-backing=nbd:localhost:1"];
    let server = Server::start(&plugin("1M"));
    write_through(&server.uri());
    server.stop();
    let before = super::Seal::of(&directory.path().join("diff.qcow2"));
    for (size, bytes) in [("2M", "2097152"), ("1048577", "1048577"), ("0", " 0")] {
        let error = refused_to_a_client(&Setup::new(), &plugin(size));
        assert_says(&error, &["diff.qcow2", "1048576", bytes]);
    }
    assert_eq!(
        super::Seal::of(&directory.path().join("diff.qcow2")),
        before
    );
}

#[test]
fn a_base_that_is_resized_while_it_is_served_is_refused_to_new_connections() {
    let mut base = base();
    let overlay = base.directory().join("diff.qcow2");
    let server = serve(base.path(), text(&overlay));
    write_through(&server.uri());
    base.grow_to(400_000);
    let client = attempt(&["nbdinfo", &server.uri()]);
    assert!(!client.status.success(), "{}", client.stdout);
    base.grow_to(300_000);
    server.nbdsh("same(h.pread(5000, 100000), bytes([7]) * 5000)");
    assert_says(
        &server.stop_and_tell(),
        &["300000", "400000", text(&overlay)],
    );
    assert!(read_by_qemu(base.directory(), "diff.qcow2") == expected());
}

#[test]
fn a_base_that_was_modified_since_is_served_with_a_warning() {
    let mut base = base();
    let overlay = base.directory().join("diff.qcow2");
    look(base.path(), text(&overlay));
    let server = serve(base.path(), text(&overlay));
    write_through(&server.uri());
    assert_eq!(server.stop_and_tell(), "");

    // Its own bytes and its size are as they were; the promise is about the time.
    base.grow_to(300_000);
    run(&["touch", "-d", "2001-02-03 04:05:06.789", base.path()]);
    let server = serve(base.path(), text(&overlay));
    server.nbdsh("same(h.pread(5000, 100000), bytes([7]) * 5000)");
    let said = server.stop_and_tell();
    assert_says(
        &said,
        &["warning", "disk.img", "modified since", text(&overlay)],
    );
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn another_base_than_the_recorded_one_is_refused() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    look(base.path(), text(&overlay));
    let other = base.directory().join("other.img");
    fs::copy(base.path(), &other).unwrap();
    let kept = kept_in(base.directory(), "diff.qcow2");
    let words = ["disk.img", text(&other), "rebase -u"];
    assert_refused(&["file", text(&other), &kept], &overlay, &words);
    let backing = "cow-backing=nbd:localhost:1";
    assert_refused(
        &["file", base.path(), &kept, backing],
        &overlay,
        &["disk.img", "nbd:localhost:1"],
    );

    // What the message says to do helps, and the other name is then the only one.
    name_base(base.directory(), "diff.qcow2", "other.img");
    look(text(&other), text(&overlay));
    assert_eq!(recorded(base.directory(), "diff.qcow2"), "other.img");
    assert_refused(
        &["file", base.path(), &kept],
        &overlay,
        &["other.img", base.path()],
    );
    // By another path it is the same file.
    let link = base.directory().join("link.img");
    fs::hard_link(&other, &link).unwrap();
    look(text(&link), text(&overlay));
}

/// Whatever has the same size could be served under the image.
#[test]
fn a_base_that_nothing_names_is_refused_until_it_is_named() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    look(base.path(), text(&overlay));
    let kept = kept_in(base.directory(), "diff.qcow2");
    let backing = format!("cow-backing={}", base.path());
    let size = fs::metadata(base.path()).unwrap().len().to_string();
    assert_refused(&["memory", &size, &kept], &overlay, &[&backing]);
    Server::start(&["memory", &size, &kept, &backing]).stop();
}

#[test]
fn a_base_that_is_missing_is_said_to_be() {
    let base = base();
    let directory = base.directory();
    let overlay = directory.join("diff.qcow2");
    let kept = kept_in(directory, "diff.qcow2");
    let missing = format!("cow-backing={}", text(&directory.join("missing")));
    let plugin = ["memory", "300000", &kept, &missing];
    let words = [text(&overlay), "/missing", "No such file", "cow-backing"];
    assert_says(&Setup::new().error(&plugin), &words);
    assert!(!overlay.exists());

    fs::write(directory.join("missing"), [0; 300_000]).unwrap();
    let server = Server::start(&plugin);
    write_through(&server.uri());
    server.stop();
    fs::remove_file(directory.join("missing")).unwrap();
    assert_refused(&plugin, &overlay, &["/missing", "No such file"]);
    // A directory is no base either.
    fs::create_dir(directory.join("missing")).unwrap();
    let other = kept_in(directory, "other.qcow2");
    let error = Setup::new().error(&["memory", "300000", &other, &missing]);
    assert_says(&error, &["/missing", "no file"]);
}

#[test]
fn a_directory_that_can_not_hold_the_image_is_said_so_at_start() {
    let base = base();
    let missing = base.directory().join("missing/diff.qcow2");
    let inside_a_file = Path::new(base.path()).join("diff.qcow2");
    let read_only = Mount::tmpfs("4M");
    read_only.make_read_only();
    let on_read_only = read_only.path().join("diff.qcow2");
    let full = Mount::tmpfs("1M");
    full.fill();
    let on_full = full.path().join("diff.qcow2");
    for (overlay, reason) in [
        (&missing, "No such file or directory"),
        (&inside_a_file, "Not a directory"),
        (&on_read_only, "Read-only file system"),
        (&on_full, "No space left on device"),
    ] {
        let kept = format!("cow-overlay={}", text(overlay));
        let error = Setup::new().error(&["file", base.path(), &kept]);
        assert_says(&error, &[text(overlay), reason]);
        assert!(!overlay.exists(), "{overlay:?}");
    }
}

/// An image is a little larger than the disk that it is for.
#[test]
fn a_file_system_whose_files_are_too_small_is_said_so_at_start() {
    let mount = Mount::formatted("ext4");
    let base = mount.path().join("disk.img");
    let file = File::create(&base).expect("a base");
    // Nearly as large as it allows, which depends on the size of its blocks.
    let largest = (32..=44).rev().map(|bits| (1 << bits) - (1 << 20));
    let has_made = |size: u64| file.set_len(size).is_ok();
    assert!(largest.into_iter().any(has_made), "no large file at all");
    let overlay = mount.path().join("diff.qcow2");
    let kept = format!("cow-overlay={}", text(&overlay));
    let error = Setup::new().error(&["file", text(&base), &kept]);
    assert_says(&error, &[text(&overlay), "File too large"]);

    let plugin = ["null", "20T", &kept, "cow-backing=nbd:localhost:1"];
    let error = refused_to_a_client(&Setup::new(), &plugin);
    assert_says(&error, &[text(&overlay), "File too large"]);
    // Larger than any image with such blocks.
    let plugin = |size| ["null", size, &kept, "cow-backing=nbd:localhost:1"];
    let error = refused_to_a_client(&Setup::new(), &plugin("5P"));
    assert_says(&error, &["too large for a qcow2 image", "cow-block-size"]);
    // Or with any.
    let error = refused_to_a_client(&Setup::new(), &plugin("5E"));
    assert_says(&error, &["too large for a qcow2 image"]);
    assert!(!error.contains("cow-block-size"), "{error}");
    assert!(!overlay.exists());
}

/// Beyond that limit a write would not fail, but end nbdkit by SIGXFSZ.
#[test]
fn a_limit_on_file_sizes_is_told_at_start() {
    let disk = Disk::new(8 << 20, 4096);
    let kept = kept_in(disk.base.directory(), "diff.qcow2");
    let overlay = disk.overlay();
    let limited = || Setup::new().file_size_limit(8 << 20);
    let plugin = ["file", disk.base.path(), &kept];
    let words = [text(&overlay), "ulimit -f", "8388608"];
    assert_says(&limited().error(&plugin), &words);
    assert!(!overlay.exists());
    let unknown = ["memory", "8M", &kept, "cow-backing=nbd:localhost:1"];
    assert_says(&refused_to_a_client(&limited(), &unknown), &words);
    assert!(!overlay.exists());

    // An image that was made without the limit.
    let server = disk.serve();
    disk.client(&server, 1, "disk.run(20).save()");
    server.stop();
    let before = super::Seal::of(&overlay);
    assert_says(&limited().error(&plugin), &words);
    assert_eq!(super::Seal::of(&overlay), before);

    // A limit that is large enough.
    let server = disk.serve_with(&Setup::new().file_size_limit(10 << 20), &[]);
    let to_the_end = "disk.write(disk.size - 70000, noise(70000, 1)); disk.run(50).check().save()";
    disk.client(&server, 2, to_the_end);
    server.stop();
    disk.assert_sound();
    compare(&overlay, &disk.model());
}

/// The smallest disk there is has no block at all.
#[test]
fn an_empty_disk_can_be_kept() {
    let base = Base::new(b"");
    let overlay = base.directory().join("diff.qcow2");
    for _start in ["made", "resumed"] {
        let server = serve(base.path(), text(&overlay));
        server.nbdsh("assert h.get_size() == 0; h.flush()");
        server.stop();
        check(&overlay);
    }
}
