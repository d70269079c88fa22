//! Where the image is made, and over what it is never made.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

use super::small::{SIZE, base, expected, kept_in, look, read_by_qemu, serve, write_through};
use super::{Seal, assert_refused, assert_says, check, text};
use crate::harness::command::{command, outcome};
use crate::harness::mount::Mount;
use crate::harness::setup::library;
use crate::harness::{Base, Server, Setup, noise, run, run_in, scratch};

#[test]
fn a_new_image_is_private_whatever_the_umask() {
    for umask in ["000", "022", "077", "777"] {
        let base = base();
        let overlay = base.directory().join("new.qcow2");
        let shell = format!("umask {umask}; exec \"$@\"");
        let kept = format!("cow-overlay={}", text(&overlay));
        let made = Setup::new()
            .under(&["sh", "-c", &shell, "sh"])
            .run(&["file", base.path(), &kept], "nbdinfo --size \"$uri\"");
        assert!(made.status.success(), "{}", made.stderr);
        let mode = fs::metadata(&overlay)
            .expect("the image")
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o600, "umask {umask}");
        check(&overlay);
    }
}

/// Nothing that is there is overwritten, and what is wrong is said before nbdkit goes
/// into the background.
#[test]
fn a_file_that_is_not_ours_is_left_alone() {
    let base = base();
    let directory = base.directory();
    let path = directory.join("theirs");
    let kept = format!("cow-overlay={}", text(&path));
    let qemu_img = |options: &[&str]| {
        let words = [&["qemu-img", "create", "-q", "-f", "qcow2"], options].concat();
        run_in(directory, &words);
    };
    let on_disk = ["-b", "disk.img", "-F", "raw"];
    type Make<'a> = Box<dyn Fn() + 'a>;
    let foreign: [(&str, Make); 9] = [
        (
            "no qcow2 image",
            Box::new(|| fs::write(&path, noise(2, 100_000)).unwrap()),
        ),
        ("no qcow2 image", Box::new(|| fs::write(&path, "").unwrap())),
        (
            "no qcow2 image",
            Box::new(|| fs::write(&path, b"QFI\xfb").unwrap()),
        ),
        (
            "extended L2",
            Box::new(|| qemu_img(&[&on_disk[..], &["theirs"]].concat())),
        ),
        (
            "nbco",
            Box::new(|| {
                let options = "extended_l2=on,cluster_size=128k";
                qemu_img(&[&on_disk[..], &["-o", options, "theirs"]].concat());
            }),
        ),
        (
            "backing file",
            Box::new(|| {
                qemu_img(&["-o", "extended_l2=on,cluster_size=128k", "theirs", "1M"]);
            }),
        ),
        (
            "Is a directory",
            Box::new(|| fs::create_dir(&path).unwrap()),
        ),
        (
            "no regular file",
            Box::new(|| drop(run(&["mkfifo", text(&path)]))),
        ),
        (
            "symbolic link",
            Box::new(|| symlink("nowhere", &path).unwrap()),
        ),
    ];
    for (words, make) in foreign {
        make();
        assert_refused(&["file", base.path(), &kept], &path, &[words]);
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            fs::remove_dir(&path).unwrap();
        } else {
            fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn a_file_that_may_not_be_written_to_is_refused() {
    use std::os::unix::process::CommandExt;
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    look(base.path(), text(&overlay));
    let before = Seal::of(&overlay);
    fs::set_permissions(base.directory(), fs::Permissions::from_mode(0o755)).unwrap();
    // The library may lie where only root can read.
    let copy = base.directory().join("filter.so");
    fs::copy(library(), &copy).unwrap();
    let mut nbdkit = command("nbdkit");
    nbdkit
        .args(["-U", "-"])
        .arg(format!("--filter={}", copy.display()))
        .args(["file", base.path()])
        .arg(format!("cow-overlay={}", overlay.display()))
        .args(["--run", "echo it serves"])
        .uid(65534)
        .gid(65534);
    let ended = outcome(&mut nbdkit);
    assert_eq!(
        (ended.status.code(), &*ended.stdout),
        (Some(1), ""),
        "{}",
        ended.stderr
    );
    assert_says(&ended.stderr, &[text(&overlay), "Permission denied"]);
    assert_eq!(Seal::of(&overlay), before);
}

/// Of two that start together, one finds nothing and comes too late.
#[test]
fn a_file_that_came_meanwhile_is_left_alone() {
    let base = base();
    let directory = base.directory();
    let overlay = directory.join("diff.qcow2");
    let kept = format!("cow-overlay={}", text(&overlay));
    let late = Server::start(&["file", base.path(), &kept]);
    assert!(!overlay.exists());
    look(base.path(), text(&overlay));
    let before = Seal::of(&overlay);
    late.python("refused('ENOENT', connect)");
    let said = late.stop_and_tell();
    assert_says(
        &said,
        &[text(&overlay), "by another program", "start nbdkit again"],
    );
    assert_eq!(Seal::of(&overlay), before);
    // Nothing else is left there.
    let left = fs::read_dir(directory).unwrap().count();
    assert_eq!(left, ["disk.img", "diff.qcow2"].len());

    let server = serve(base.path(), text(&overlay));
    write_through(&server.uri());
    server.stop();
    assert!(read_by_qemu(directory, "diff.qcow2") == expected());
}

/// Where a byte takes megabytes, a short file has no hole; an image has.
#[test]
fn a_file_system_that_allocates_in_large_units_is_accepted() {
    for kind in ["huge", "huge within size", "extsize", "bigalloc"] {
        let base = Base::sparse(SIZE as u64 + (1 << 30), &[(0, &noise(1, SIZE))]);
        let mount = Mount::of_large_units(kind);
        let overlay = mount.path().join("diff.qcow2");
        // The second one goes on with the image of the first.
        for fill in [3, 7] {
            let server = serve(base.path(), text(&overlay));
            let write = format!("write -P {fill} 100000 5000");
            run(&[
                "qemu-io",
                "-f",
                "raw",
                "-c",
                &write,
                "-c",
                "flush",
                &server.uri(),
            ]);
            server.stop();
        }
        check(&overlay);
        let read = "read -P 7 100000 5000";
        run(&["qemu-io", "-f", "qcow2", "-r", "-c", read, text(&overlay)]);
        let taken = fs::metadata(&overlay).unwrap().blocks() * 512;
        assert!(
            taken < 96 << 20,
            "{kind}: {taken} bytes for a write of 5000"
        );
    }
}

/// As on sshfs, where the file that is open has lost its name when it gets that of the
/// image.
#[test]
fn an_image_is_kept_where_a_second_name_makes_another_file() {
    let base = base();
    let mount = Mount::fuse("length", 1 << 30);
    let overlay = mount.path().join("diff.qcow2");
    let server = serve(base.path(), text(&overlay));
    // Not flushed by the client.
    write_through(&server.uri());
    let kept = format!("cow-overlay={}", text(&overlay));
    let error = Setup::new().error(&["file", base.path(), &kept]);
    assert_says(&error, &[text(&overlay), "in use by another program"]);
    let said = server.stop_and_tell();
    assert!(!said.contains("error"), "{said}");
    check(&overlay);
    assert!(read_by_qemu(base.directory(), text(&overlay)) == expected());
    let left = fs::read_dir(mount.path()).unwrap().count();
    assert_eq!(left, 1);
}

#[test]
fn an_image_is_not_made_where_holes_are_stored_and_a_doubt_is_told() {
    let base = base();
    for size in [1 << 30, 100 << 20] {
        let mount = Mount::fuse("data", size);
        let overlay = mount.path().join("diff.qcow2");
        let kept = format!("cow-overlay={}", text(&overlay));
        let error = Setup::new().error(&["file", base.path(), &kept]);
        assert_says(&error, &[text(&overlay), "stores holes as data"]);
        assert_eq!(fs::read_dir(mount.path()).unwrap().count(), 0);
    }
    let mount = Mount::fuse("unknown", 1 << 30);
    let overlay = mount.path().join("diff.qcow2");
    let server = serve(base.path(), text(&overlay));
    write_through(&server.uri());
    let said = server.stop_and_tell();
    assert_says(
        &said,
        &["warning", text(&overlay), "how much space is free"],
    );
    check(&overlay);
}

/// nbdkit becomes another user after it has opened an image, and before it makes one.
#[test]
fn the_user_of_minus_u_makes_the_image_and_need_not_own_one_that_exists() {
    let base = base();
    let directory = base.directory();
    let overlay = directory.join("diff.qcow2");
    let kept = format!("cow-overlay={}", text(&overlay));
    let allow = |mode| fs::set_permissions(directory, fs::Permissions::from_mode(mode)).unwrap();
    let as_nobody = |shell| {
        let setup = Setup::new().option("-unobody");
        setup.run(&["file", base.path(), &kept], shell)
    };
    let read = "qemu-io -f raw -c 'read -P 7 100000 5000' $uri";
    allow(0o755);
    let refused = as_nobody(read);
    assert!(!refused.status.success(), "{}", refused.stdout);
    assert_says(&refused.stderr, &[text(&overlay), "Permission denied"]);
    assert!(!overlay.exists());

    let server = serve(base.path(), text(&overlay));
    write_through(&server.uri());
    server.stop();
    let resumed = as_nobody(read);
    assert!(
        resumed.stdout.contains("read 5000/5000"),
        "{}",
        resumed.stderr
    );
    assert!(!resumed.stdout.contains("failed"), "{}", resumed.stdout);

    fs::remove_file(&overlay).unwrap();
    allow(0o777);
    let made = as_nobody("nbdinfo --size $uri");
    assert!(made.status.success(), "{}", made.stderr);
    assert_ne!(fs::metadata(&overlay).unwrap().uid(), 0);
    check(&overlay);
}

/// A new name in it could not be made safe.
#[test]
fn a_directory_that_can_be_written_to_and_not_read_gets_no_image() {
    let base = base();
    let directory = scratch();
    let place = directory.path();
    let overlay = place.join("diff.qcow2");
    let kept = format!("cow-overlay={}", text(&overlay));
    let plugin = ["file", base.path(), &kept];
    let allow = |mode| fs::set_permissions(place, fs::Permissions::from_mode(mode)).unwrap();
    let left = || fs::read_dir(place).unwrap().count();
    allow(0o300);
    // Without the right to pass over permissions: root is a user as all are.
    let as_a_user = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"];
    let error = Setup::new().under(&as_a_user).error(&plugin);
    let words = [text(place), text(&overlay), "Permission denied", "sync"];
    assert_says(&error, &words);
    assert_eq!(left(), 0);
    // As the one who nbdkit becomes.
    let nobody = 65534;
    chown(place, Some(nobody), Some(nobody)).unwrap();
    let as_nobody = || {
        Setup::new()
            .option("-unobody")
            .run(&plugin, "nbdinfo --size $uri")
    };
    let refused = as_nobody();
    assert!(!refused.status.success(), "{}", refused.stdout);
    assert_says(&refused.stderr, &words);
    assert_eq!(left(), 0);
    allow(0o700);
    let made = as_nobody();
    assert!(made.status.success(), "{}", made.stderr);
    check(&overlay);
}

/// A link to an image stands for it, as it does for QEMU: the base is looked for
/// where the link is.
#[test]
fn a_link_to_an_image_is_followed_as_qemu_follows_it() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    look(base.path(), text(&overlay));
    let beside = base.directory().join("link.qcow2");
    symlink("diff.qcow2", &beside).unwrap();
    let server = serve(base.path(), text(&beside));
    write_through(&server.uri());
    server.stop();
    assert!(read_by_qemu(base.directory(), "link.qcow2") == expected());
    assert!(read_by_qemu(base.directory(), "diff.qcow2") == expected());

    let elsewhere = scratch();
    let far = elsewhere.path().join("link.qcow2");
    symlink(&overlay, &far).unwrap();
    let kept = format!("cow-overlay={}", text(&far));
    assert_refused(
        &["file", base.path(), &kept],
        &far,
        &["its backing file is ", "/disk.img, not "],
    );
}

/// The path of the image is allowed, and that of the file which is to become the image is
/// too long: what the system says of it is told, in the form of all messages.
#[test]
fn why_an_image_can_not_be_made_is_said() {
    let base = base();
    let scratch = scratch();
    let mut directory = scratch.path().to_owned();
    while directory.as_os_str().len() < 3800 {
        directory.push("d".repeat(200));
    }
    directory.push("d".repeat(4080 - directory.as_os_str().len() - 1));
    fs::create_dir_all(&directory).expect("a directory");
    let kept = kept_in(&directory, "i.qcow2");
    let ended = Setup::new().run(&["file", base.path(), &kept], "nbdinfo --size \"$uri\"");
    let message = format!("making {kept}: File name too long\n");
    assert_says(&ended.stderr, &[&message]);
}
