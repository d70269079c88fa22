//! TMPDIR is tried before any client connects: it is too late to find out at the first write.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use crate::harness::command::{command, success};
use crate::harness::mount::Mount;
use crate::harness::{Base, Daemon, Setup, noise, run, scratch};

fn assert_refused(directory: &Path, reason: &str) {
    let error = Setup::new().tmpdir(directory).error(&["null", "size=1M"]);
    for word in [directory.to_str().unwrap(), reason, "TMPDIR"] {
        assert!(error.contains(word), "{word:?} in {error:?}");
    }
}

#[test]
fn a_directory_that_is_not_there_is_refused() {
    let files = scratch();
    assert_refused(&files.path().join("missing"), "No such file or directory");
}

#[test]
fn a_file_in_the_place_of_the_directory_is_refused() {
    let files = scratch();
    let file = files.path().join("file");
    fs::write(&file, "").unwrap();
    assert_refused(&file, "Not a directory");
}

/// Root may write everywhere but to a file system that is read-only.
#[test]
fn a_directory_that_can_not_be_written_to_is_refused() {
    let mount = Mount::tmpfs("4M");
    mount.make_read_only();
    assert_refused(mount.path(), "Read-only file system");
}

#[test]
fn a_full_file_system_is_refused() {
    for mount in [Mount::tmpfs("1M"), Mount::formatted("ext4")] {
        mount.fill();
        assert_refused(mount.path(), "No space left on device");
    }
}

/// nbdkit becomes another user, or of another group, after the directory was tried. One
/// file is open by then, and is the overlay.
#[test]
fn a_directory_that_nbdkit_can_not_write_to_any_more_has_one_overlay() {
    let mount = Mount::tmpfs("4M");
    let nobody = 65534;
    chown(mount.path(), Some(nobody), Some(0)).unwrap();
    let as_another = |option: &str, mode| {
        fs::set_permissions(mount.path(), fs::Permissions::from_mode(mode)).unwrap();
        // Without the right to pass over permissions: root is a user as all are.
        let setup = Setup::new().tmpdir(mount.path()).under(&[
            "setpriv",
            "--bounding-set=-dac_override,-dac_read_search",
            "--regid=0",
            "--clear-groups",
        ]);
        [option, "-U", "-", "--run"]
            .into_iter()
            .fold(setup, Setup::option)
            .option("qemu-io -f raw -c 'write -P 7 5 100' -c 'read -P 7 5 100' $uri")
            .output(&["null", "size=1M"])
    };
    for (option, mode, other_mode) in [("-unobody", 0o075, 0o777), ("-gnogroup", 0o770, 0o777)] {
        let warned = as_another(option, mode);
        assert_eq!(warned.status.code(), Some(0), "{}", warned.stderr);
        assert!(warned.stdout.contains("read 100/100"), "{}", warned.stdout);
        for word in [
            "warning",
            mount.path().to_str().unwrap(),
            "Permission denied",
            "TMPDIR",
        ] {
            assert!(
                warned.stderr.contains(word),
                "{option}: {word:?} in {:?}",
                warned.stderr
            );
        }
        let served = as_another(option, other_mode);
        assert!(served.stdout.contains("read 100/100"), "{}", served.stdout);
        assert!(!served.stderr.contains("warning"), "{}", served.stderr);
    }
}

/// Not a place for each of a billion segments, but one for each that is there.
#[test]
fn a_disk_of_7_eib_in_small_files_takes_no_more_memory_than_another() {
    let server = Setup::new()
        .file_size_limit(4 << 20)
        .start(&["null", "size=7E"]);
    let before = server.memory();
    server.nbdsh(
        r#"
        for place in [0, 300 * M - 2000, 1 << 50, (7 << 60) - 5000]:
            h.pwrite(noise(5000, place), place)
        for place in [0, 300 * M - 2000, 1 << 50, (7 << 60) - 5000]:
            same(connect().pread(5000, place), noise(5000, place))
        h.trim(5000, 1 << 50)
        same(h.pread(5000, 1 << 50), bytes(5000))
        "#,
    );
    let grown = server.memory().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more than before");
}

/// The overlay is a row of files: one of them is as large as a file may be here.
#[test]
fn a_disk_can_be_larger_than_a_file_may_be() {
    let server = Setup::new()
        .file_size_limit(8 << 20)
        .start(&["null", "size=1G"]);
    server.nbdsh(
        r#"
        # Across the border of two files, over several of them, and at the end.
        h.pwrite(noise(5000, 1), 8 * M - 100)
        h.pwrite(noise(20 * M, 2), 100 * M + 5)
        h.pwrite(noise(5000, 3), G - 5000)
        h.trim(10 * M, 105 * M)
        same(h.pread(5000, 8 * M - 100), noise(5000, 1))
        expected = bytearray(noise(20 * M, 2))
        expected[5 * M - 5:15 * M - 5] = bytes(10 * M)
        same(h.pread(20 * M, 100 * M + 5), expected)
        same(h.pread(5000, G - 5000), noise(5000, 3))
        "#,
    );
}

#[test]
fn a_refused_directory_is_left_as_it_was() {
    let mount = Mount::tmpfs("1M");
    mount.fill();
    let before = run(&[
        "ls",
        "-la",
        "--time-style=full-iso",
        mount.path().to_str().unwrap(),
    ]);
    assert_refused(mount.path(), "No space left on device");
    let after = run(&[
        "ls",
        "-la",
        "--time-style=full-iso",
        mount.path().to_str().unwrap(),
    ]);
    assert_eq!(
        before.lines().skip(2).collect::<Vec<_>>(),
        after.lines().skip(2).collect::<Vec<_>>()
    );
}

#[test]
fn without_tmpdir_the_overlay_is_in_var_tmp() {
    let base = Base::new(&noise(1, 100_000));
    let server = Setup::new().without_tmpdir().start(&["file", base.path()]);
    server.nbdsh("h.pwrite(b'x' * 4096, 0)");
    assert!(server.overlay_bytes() >= 4096, "no overlay in /var/tmp");
}

#[test]
fn the_overlay_is_private_and_has_no_name() {
    let base = Base::new(&noise(2, 100_000));
    let directory = scratch();
    let server = Setup::new()
        .tmpdir(directory.path())
        .start(&["file", base.path()]);
    server.nbdsh("h.pwrite(b'x' * 4096, 0)");
    let files = server.overlay_files();
    assert!(!files.is_empty(), "no overlay in {:?}", directory.path());
    for file in files {
        assert_eq!(file.mode, 0o600, "the mode of the overlay");
        assert!(
            file.close_on_exec,
            "children of nbdkit would inherit the overlay"
        );
    }
    let names = fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(names, 0, "an overlay with a name would stay after a crash");
}

/// nbdkit's own filter has it there, and scripts look for it.
#[test]
fn the_overlay_is_descriptor_3() {
    let base = Base::new(&noise(6, 100_000));
    let plugin = ["file", base.path()];
    let directory = scratch();
    // Whoever runs the tests may have given them a descriptor 3.
    let setup = Setup::new()
        .under(&["sh", "-c", "exec \"$@\" 3>&-", "sh"])
        .tmpdir(directory.path());
    let assert_overlay = |target: &Path| {
        let target = target.to_str().unwrap();
        let is_overlay = target.starts_with(directory.path().to_str().unwrap())
            && target.ends_with(" (deleted)");
        assert!(is_overlay, "descriptor 3 is {target}");
    };
    let write = "write -P 7 8192 4096";
    let assert_served = |uri: &str, pid: u32| {
        run(&["qemu-io", "-f", "raw", "-c", write, uri]);
        let descriptor = format!("/proc/{pid}/fd/3");
        assert_overlay(&fs::read_link(&descriptor).unwrap());
        let content = fs::read(&descriptor).unwrap();
        assert!(content[8192..12288] == [7; 4096], "{descriptor}");
    };

    let server = setup.start(&plugin);
    assert_served(&server.uri(), server.pid());
    let daemon = Daemon::start(&setup, &plugin, directory.path(), "/".as_ref());
    assert_served(&daemon.uri(), daemon.pid());

    let copies = scratch();
    let copy = copies.path().join("copy");
    let shell = format!(
        "qemu-io -f raw -c '{write}' $uri >&2
        readlink /proc/$PPID/fd/3
        test -f /proc/$PPID/fd/3 && cat /proc/$PPID/fd/3 >{}",
        copy.display()
    );
    let said = setup.run(&plugin, &shell);
    assert_overlay(said.stdout.trim().as_ref());
    let content = fs::read(&copy).unwrap();
    assert!(content[8192..12288] == [7; 4096], "{}", said.stderr);
}

/// As a daemon, nbdkit changes to the root directory before the first client comes.
#[test]
fn a_relative_directory_is_that_of_the_start() {
    let base = Base::new(&noise(3, 100_000));
    let files = scratch();
    fs::create_dir(files.path().join("relative")).unwrap();
    let daemon = Daemon::start(
        &Setup::new(),
        &["file", base.path(), "cow-scope=connection"],
        "relative".as_ref(),
        files.path(),
    );
    let source = files.path().join("source");
    fs::write(&source, noise(4, 100_000)).unwrap();
    success(
        command("nbdcopy")
            .arg("--flush")
            .arg(&source)
            .arg(daemon.uri()),
    );
}

/// Space that can't be given back is a pity, and no reason to refuse the service.
#[test]
fn a_file_system_without_hole_punching_is_accepted() {
    let mount = Mount::ramfs();
    let base = Base::new(&noise(5, 500_000));
    let server = Setup::new()
        .option("-v")
        .tmpdir(mount.path())
        .start(&["file", base.path()]);
    let directory = mount.path().to_str().unwrap();
    let said = server.stderr();
    let told = said
        .lines()
        .any(|line| line.contains("debug: ") && line.contains(directory));
    assert!(told, "nothing about {directory} in {said}");
    server.nbdsh("Model([h, connect()], read(h), 1).run(200).check()");
}
