//! The name under which the image records its base, and by which QEMU finds it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::Value;

use super::small::{
    SIZE, base, expected, kept_in, look, read_by_qemu, recorded, serve, write_through,
};
use super::{assert_refused, assert_says, attempt_beside, name_base, refused_to_a_client, text};
use crate::harness::command::success;
use crate::harness::{Base, Daemon, Server, Setup, noise, run, run_in, scratch};

/// nbdkit leaves the directory in which it was started.
#[test]
fn relative_names_are_those_of_the_start() {
    let base = base();
    let directory = base.directory();
    for parameters in [
        &["disk.img", "cow-overlay=one.qcow2"][..],
        &["file=disk.img", "cow-overlay=./one.qcow2"],
        &["./disk.img", "cow-overlay=sub/../two.qcow2"],
        &["sub/../disk.img", "cow-overlay=sub/three.qcow2"],
        &[
            "disk.img",
            "cow-overlay=four.qcow2",
            "cow-backing=sub/../disk.img",
        ],
    ] {
        fs::create_dir_all(directory.join("sub")).unwrap();
        let image = parameters[1].strip_prefix("cow-overlay=").unwrap();
        for _start in ["made", "resumed"] {
            let plugin = [&["file"], parameters].concat();
            let daemon = Daemon::start(&Setup::new(), &plugin, "/var/tmp".as_ref(), directory);
            write_through(&daemon.uri());
            drop(daemon);
            assert!(
                read_by_qemu(directory, image) == expected(),
                "{parameters:?}"
            );
        }
        let name = recorded(directory, image);
        if image == "sub/three.qcow2" {
            assert!(Path::new(&name).is_absolute(), "{name}");
        } else {
            assert_eq!(name, "disk.img");
        }
    }
}

#[test]
fn a_base_in_another_directory_is_recorded_with_its_whole_path() {
    let base = base();
    let elsewhere = scratch();
    let overlay = elsewhere.path().join("diff.qcow2");
    for _start in ["made", "resumed"] {
        let server = serve(base.path(), text(&overlay));
        write_through(&server.uri());
        server.stop();
        assert_eq!(recorded(elsewhere.path(), "diff.qcow2"), base.path());
        assert!(read_by_qemu(elsewhere.path(), "diff.qcow2") == expected());
    }
}

/// A name goes to QEMU as it is; only one with a colon, which QEMU would take for a
/// protocol's, needs something before it.
#[test]
fn unusual_names_are_recorded_so_that_qemu_finds_them() {
    let names = [
        "with space",
        "nbd:colon",
        "json:{}",
        "quote'\"`$x\\",
        "comma,size=5",
        "ünïcødé-\u{1f427}",
        "new\nline",
        "-dash",
        "%s%n",
    ];
    for name in names {
        let directory = scratch();
        let base = directory.path().join(name);
        fs::write(&base, noise(1, SIZE)).unwrap();
        let overlay = directory.path().join(format!("{name}.qcow2"));
        let shown = recorded_as(name);
        for _start in ["made", "resumed"] {
            let server = Server::start(&[
                "file",
                &format!("file={}", text(&base)),
                &format!("cow-overlay={}", text(&overlay)),
            ]);
            write_through(&server.uri());
            server.stop();
        }
        // QEMU itself is given a plain name.
        fs::rename(&overlay, directory.path().join("plain")).unwrap();
        assert_eq!(recorded(directory.path(), "plain"), shown);
        assert!(
            read_by_qemu(directory.path(), "plain") == expected(),
            "{name:?}"
        );
        assert!(
            fs::read(&base).unwrap() == noise(1, SIZE),
            "{name:?} changed"
        );
    }
}

fn recorded_as(name: &str) -> String {
    let prefix = if name.contains(':') { "./" } else { "" };
    format!("{prefix}{name}")
}

#[test]
fn a_name_need_not_be_utf8() {
    let directory = scratch();
    let base = directory.path().join(OsStr::from_bytes(b"\xff\xfe.img"));
    fs::write(&base, noise(1, SIZE)).unwrap();
    let overlay = directory.path().join("diff.qcow2");
    for _start in ["made", "resumed"] {
        let mut nbdkit = Setup::new().command(&[], directory.path(), |nbdkit| {
            nbdkit.args(["-U", "-", "--run"]);
            nbdkit.arg("qemu-io -f raw -c 'write -P 7 100000 5000' \"$uri\"");
        });
        nbdkit.arg("file").arg(&base);
        nbdkit.arg(format!("cow-overlay={}", text(&overlay)));
        success(&mut nbdkit);
        assert!(read_by_qemu(directory.path(), "diff.qcow2") == expected());
    }
}

#[test]
fn cow_backing_is_a_path_or_anything_that_qemu_opens() {
    // The disk that the plugin serves.
    let base = Base::sparse(SIZE as u64, &[(0x40000, &[1]), (0x493df, &[1])]);
    let directory = base.directory();
    let uri = "nbd+unix:///?socket=/some/where/else";
    let long = format!("nbd:unix:{}", "x".repeat(1023 - 9));
    for (backing, name) in [
        (base.path(), "disk.img"),
        (uri, uri),
        ("nbd:localhost:10809", "nbd:localhost:10809"),
        (
            "json:{\"driver\":\"null-co\"}",
            "json:{\"driver\":\"null-co\"}",
        ),
        (&long, &long),
    ] {
        let parameters = [
            format!("cow-backing={backing}"),
            kept_in(directory, "diff.qcow2"),
        ];
        let plugin = [
            "data",
            "data=@0x40000 1 @0x493df 1",
            &parameters[0],
            &parameters[1],
        ];
        let server = Server::start(&plugin);
        write_through(&server.uri());
        server.stop();
        // And goes on.
        let server = Server::start(&plugin);
        server.nbdsh("same(h.pread(5000, 100000), bytes([7]) * 5000)");
        server.stop();
        let words = ["qemu-img", "info", "--output=json", "diff.qcow2"];
        let info: Value = serde_json::from_str(&run_in(directory, &words)).expect("JSON");
        assert_eq!(info["backing-filename"], name);
        fs::remove_file(directory.join("diff.qcow2")).unwrap();
    }
}

/// What comes with a protocol is no path, even if QEMU finds the same file by it.
#[test]
fn a_name_with_a_protocol_has_to_be_given_as_it_was_recorded() {
    let base = base();
    let directory = base.directory();
    let overlay = directory.join("diff.qcow2");
    let kept = kept_in(directory, "diff.qcow2");
    look(base.path(), text(&overlay));
    name_base(directory, "diff.qcow2", "file:disk.img");
    let backing = "cow-backing=file:disk.img";
    assert_refused(&["file", base.path(), &kept], &overlay, &[backing]);
    let server = Server::start(&["file", base.path(), &kept, backing]);
    write_through(&server.uri());
    server.stop();
    assert!(read_by_qemu(directory, "diff.qcow2") == expected());
}

#[test]
fn a_name_that_qemu_does_not_read_is_refused() {
    let directory = scratch();
    let kept = kept_in(directory.path(), "diff.qcow2");
    let long = format!("cow-backing=nbd:unix:{}", "x".repeat(1024 - 9));
    let error = Setup::new().error(&["memory", "1M", &kept, &long]);
    assert_says(&error, &["1024 bytes", "1023", "diff.qcow2"]);

    // The path of a file that lies deep down: too long for QEMU, not for the system.
    let part = "d".repeat(200);
    let deep = [&*part; 5]
        .iter()
        .fold(directory.path().to_owned(), |path, part| path.join(part));
    fs::create_dir_all(&deep).unwrap();
    let base = deep.join("disk.img");
    File::create(&base)
        .and_then(|file| file.set_len(1 << 20))
        .unwrap();
    let error = Setup::new().error(&["file", text(&base), &kept]);
    assert_says(&error, &["1023", "diff.qcow2"]);
    assert!(!directory.path().join("diff.qcow2").exists());
    // Beside it, it has a short one.
    let beside = kept_in(&deep, "diff.qcow2");
    let server = Server::start(&["file", text(&base), &beside]);
    run(&["nbdinfo", "--size", &server.uri()]);
    server.stop();
    assert_eq!(recorded(&deep, "diff.qcow2"), "disk.img");
}

#[test]
fn without_a_name_for_the_base_cow_backing_is_asked_for() {
    let (base, directory) = (base(), scratch());
    let overlay = directory.path().join("diff.qcow2");
    let kept = kept_in(directory.path(), "diff.qcow2");
    let other = directory.path().join("other.img");
    fs::copy(base.path(), &other).unwrap();
    let (one, two, dir) = (
        format!("file={}", base.path()),
        format!("file={}", text(&other)),
        format!("dir={}", text(directory.path())),
    );
    for plugin in [
        &["memory", "1M"][..],
        &["pattern", "1M"],
        &["data", "data=1"],
        &["partitioning", &one, &two],
        // Not even one that is named twice: the disk is made of both.
        &["partitioning", &one, &one],
        &["file", &dir],
    ] {
        let error = Setup::new().error(&[plugin, &[&kept]].concat());
        assert_says(&error, &[text(&overlay), "cow-backing="]);
        assert!(!overlay.exists());
    }
}

/// With a filter below that shows something else than the file, the file is not the
/// base. That is seen at the size, which is known when the first client comes.
#[test]
fn the_file_of_a_plugin_is_not_the_base_if_its_size_is_another() {
    let base = Base::make(|path| {
        let mut disk = noise(1, 4 << 20);
        // A master boot record with one partition, the second megabyte.
        disk[446..512].fill(0);
        disk[450] = 0x83;
        disk[454..458].copy_from_slice(&2048u32.to_le_bytes());
        disk[458..462].copy_from_slice(&2048u32.to_le_bytes());
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        fs::write(path, disk).unwrap();
    });
    let directory = base.directory();
    run_in(directory, &["xz", "-k", "disk.img"]);
    let xz = format!("{}.xz", base.path());
    let overlay = directory.join("diff.qcow2");
    let kept = kept_in(directory, "diff.qcow2");
    let part = directory.join("part.img");
    let whole = fs::read(base.path()).unwrap();
    fs::write(&part, &whole[1 << 20..2 << 20]).unwrap();
    let (named, named_xz) = (
        format!("cow-backing={}", text(&part)),
        format!("cow-backing={}", base.path()),
    );
    for (filter, plugin, name) in [
        (
            "partition",
            &["file", base.path(), "partition=1"][..],
            &named,
        ),
        (
            "offset",
            &["file", base.path(), "offset=1M", "range=1M"],
            &named,
        ),
        ("xz", &["file", &xz], &named_xz),
    ] {
        let setup = || Setup::new().below(filter);
        let plugin = [plugin, &[&kept]].concat();
        let error = refused_to_a_client(&setup(), &plugin);
        assert_says(&error, &[text(&overlay), "cow-backing="]);
        assert!(!overlay.exists(), "{filter}");
        let left: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert!(
            !left.iter().any(|name| name.as_bytes().starts_with(b".")),
            "{left:?}"
        );

        // With the name of what is exported it works, now and later.
        let plugin = [&plugin[..], &[name]].concat();
        for _start in ["made", "resumed"] {
            let server = setup().start(&plugin);
            write_through(&server.uri());
            server.stop();
        }
        let words = ["qemu-io", "-r", "-c", "read -P 7 100000 5000", "diff.qcow2"];
        let read = attempt_beside(&overlay, &words);
        assert!(!read.stdout.contains("failed"), "{}", read.stdout);
        fs::remove_file(&overlay).unwrap();
    }
}

#[test]
fn a_pair_that_was_moved_works() {
    let directory = scratch();
    let (old, new) = (directory.path().join("old"), directory.path().join("new"));
    fs::create_dir(&old).unwrap();
    fs::write(old.join("disk.img"), noise(1, SIZE)).unwrap();
    let server = serve(text(&old.join("disk.img")), text(&old.join("diff.qcow2")));
    write_through(&server.uri());
    server.stop();
    fs::rename(&old, &new).unwrap();
    assert!(read_by_qemu(&new, "diff.qcow2") == expected());
    let server = serve(text(&new.join("disk.img")), text(&new.join("diff.qcow2")));
    run(&[
        "qemu-io",
        "-f",
        "raw",
        "-c",
        "write -P 9 5 5",
        &server.uri(),
    ]);
    assert_eq!(server.stop_and_tell(), "");
    let mut expected = expected();
    expected[5..10].fill(9);
    assert!(read_by_qemu(&new, "diff.qcow2") == expected);
}
