//! The command lines of those who use nbdkit's cow filter, word for word, and what each of
//! them does then.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::harness::command::{LIMIT, command, eventually, kill_group, outcome, spawn, success};
use crate::harness::daemon::has_ended;
use crate::harness::line::{Line, in_network_of};
use crate::harness::mount::{Mount, NbdFuse};
use crate::harness::{Base, Server, noise, run, scratch};

/// What virt-v2v puts before the filters, whatever its input.
const V2V: &str = "nbdkit --exit-with-parent --foreground --pidfile \"$P\" --unix \"$S\" \
                   --threads 16 -D nbdkit.backend.datapath=0";

/// What virt-v2v asks before it uses a filter, or a parameter of one.
#[test]
fn the_probes_of_virt_v2v_find_the_filter_and_its_parameters() {
    for probe in [
        "nbdkit null --filter=cow --version >/dev/null 2>&1",
        "nbdkit null --filter=cow --help | grep -sq 'cow-on-read=.*/PATH'",
        "nbdkit null --filter=cow --help | grep -sq 'cow-block-size'",
        // Which the filter that nbdkit ships does not have: this one is what the name finds.
        "nbdkit null --filter=cow --help | grep -sq 'cow-scope='",
    ] {
        let ended = Line::new(probe).outcome();
        assert!(ended.status.success(), "{probe}: {}", ended.stderr);
    }
}

/// A disk with 512-byte sectors whose end is in the middle of a block.
fn guest() -> Base {
    let size = (6 << 20) + 1536;
    let (system, data) = (noise(1, (2 << 20) + 512), noise(2, (1 << 20) + 1536));
    Base::sparse(
        size,
        &[(1 << 20, &system), (size - data.len() as u64, &data)],
    )
}

/// Goes through a conversion: a guest's writes while the file `convert` is there, which
/// virt-v2v removes before it copies the disk with nbdcopy.
fn converts(line: &str, disk: &Base) {
    let files = scratch();
    let convert = files.path().join("convert");
    let server = Line::new(&format!("{V2V} {line}"))
        .with("LANG", "C")
        .with("DIR", files.path())
        .with("DISK", disk.path())
        .start();

    let filled = |from: &str| {
        server.nbdsh(&format!("h.pread(512 * K, {from})"));
        server.overlay_bytes()
    };
    assert_eq!(filled("5 * M"), 0, "{line}: before");
    fs::write(&convert, "").unwrap();
    let kept = filled("5 * M");
    let fills = line.contains("cow-on-read=");
    assert_eq!(kept >= 512 << 10, fills, "{line}: {kept} bytes");
    fs::remove_file(&convert).unwrap();
    assert_eq!(filled("5 * M + 512 * K"), kept, "{line}: after");

    fs::write(&convert, "").unwrap();
    let (expected, copy) = (files.path().join("expected"), files.path().join("copy"));
    server.nbdsh_with(
        &[disk.path(), expected.to_str().unwrap()],
        r#"
        model = Model([h], open(ARGS[0], "rb").read(), 1).run(250)
        model.check()
        # As fstrim does.
        h.trim(M, M)
        h.flush()
        model.content[M:2 * M] = bytes(M)
        open(ARGS[1], "wb").write(model.content)
        "#,
    );
    fs::remove_file(&convert).unwrap();
    run(&["nbdcopy", "--flush", &server.uri(), copy.to_str().unwrap()]);
    let same = fs::read(copy).unwrap() == fs::read(expected).unwrap();
    assert!(same, "{line}: other bytes were copied");
    let said = server.stop_and_tell();
    assert!(!said.contains("error:"), "{line}: {said}");
    // What the datapath messages have for each request.
    assert!(!said.contains("offset="), "{line}: {said}");
}

#[test]
fn virt_v2v_converts_a_local_disk() {
    for line in [
        "--filter cow file file=\"$DISK\" cache=none",
        // Until version 2.6.
        "--filter cow file file=\"$DISK\" fadvise=sequential cache=none",
        "--verbose --filter cow file file=\"$DISK\" cache=none",
    ] {
        converts(line, &guest());
    }
}

/// As virt-v2v puts filters around ours: those that this nbdkit has.
fn filters(names: &[&str]) -> String {
    let there = |name: &&&str| {
        let probe = ["null", &format!("--filter={name}"), "--version"];
        outcome(command("nbdkit").args(probe)).status.success()
    };
    let found = names.iter().filter(there);
    found.map(|name| format!("--filter {name} ")).collect()
}

/// The options for the VDDK plugin, which has no free library, over plugins that we have.
#[test]
fn virt_v2v_converts_a_disk_of_vddk() {
    let parameters = "minblock=512 maxdata=2M multi-conn-mode=disable cow-block-size=4096 \
                      cow-on-read=\"$DIR/convert\"";
    for (around, more) in [
        (&["multi-conn", "cow", "blocksize", "retry"][..], ""),
        (
            &["multi-conn", "cow", "blocksize", "retry", "delay"],
            "delay-read=1ms",
        ),
        (
            &[
                "rate",
                "multi-conn",
                "cow",
                "blocksize",
                "noextents",
                "count",
                "retry",
            ],
            "rate=10G",
        ),
    ] {
        let around = filters(around);
        converts(
            &format!("{around} file file=\"$DISK\" {parameters} {more}"),
            &guest(),
        );
    }
}

/// Its filters for VMware's web server and for Xen's ssh server; curl reads a file as well.
#[test]
fn virt_v2v_converts_a_disk_of_curl() {
    let curl = "curl url=\"file://$DISK\" timeout=2000 cow-on-read=\"$DIR/convert\"";
    for (around, more) in [
        (&["cow", "cacheextents", "retry"][..], ""),
        (&["rate", "cow", "cacheextents", "retry"], "rate=10G"),
        (&["cow", "count", "retry"], ""),
    ] {
        let around = filters(around);
        converts(&format!("{around} {curl} {more}"), &guest());
    }
}

#[test]
fn virt_v2v_converts_a_disk_of_another_nbd_server() {
    let disk = guest();
    let server = Server::start(&["file", disk.path()]);
    let uri = server.uri();
    converts(&format!("--filter cow nbd uri='{uri}'"), &disk);
    let socket = server.socket();
    let socket = socket.display();
    converts(
        &format!("--filter cow nbd socket='{socket}' shared=true"),
        &disk,
    );
}

#[test]
fn nbdkit_ends_when_virt_v2v_does() {
    let disk = guest();
    let files = scratch();
    let (pidfile, socket) = (files.path().join("pid"), files.path().join("socket"));
    let overlays = files.path().join("overlays");
    fs::create_dir(&overlays).unwrap();
    let line = format!("{V2V} --filter cow file file=\"$DISK\" cache=none & wait");
    let mut parent = spawn(
        &mut Line::new(&line)
            .with("DISK", disk.path())
            .with("P", &pidfile)
            .with("S", &socket)
            .with("TMPDIR", &overlays)
            .command(),
    );
    let mut pid = None;
    let serves = eventually(LIMIT, || {
        let written = fs::read_to_string(&pidfile).unwrap_or_default();
        pid = written
            .strip_suffix('\n')
            .map(|pid| pid.parse().expect("a process id"));
        pid.is_some()
    });
    assert!(serves, "nbdkit does not serve");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    run(&["qemu-io", "-f", "raw", "-c", "write -P 1 512 1M", &uri]);

    // Only itself: nbdkit has to see that by itself.
    parent.kill().expect("kill the parent");
    parent.wait().expect("wait for the parent");
    let pid = pid.expect("seen above");
    let ended = eventually(LIMIT, || has_ended(pid));
    if !ended {
        kill_group(&mut parent);
    }
    assert!(ended, "nbdkit outlives its parent");
    assert_eq!(fs::read_dir(&overlays).unwrap().count(), 0);
}

#[test]
fn a_directory_of_disks_is_served() {
    let disks = scratch();
    let content = |name: &str| noise(name.len() as u64, 100_000 * name.len());
    for name in ["a", "bc"] {
        fs::write(disks.path().join(name), content(name)).unwrap();
    }
    let server = Line::new(&format!("{V2V} --filter cow file dir=\"$DIR\""))
        .with("DIR", disks.path())
        .start();
    server.python(
        r#"
        for turn in range(2):
            for name in ["a", "bc"]:
                c = connect(name)
                assert c.get_size() == 100_000 * len(name)
                Model([c, connect(name)], read(c), turn).run(50).check()
        "#,
    );
    server.stop();
    for name in ["a", "bc"] {
        assert!(fs::read(disks.path().join(name)).unwrap() == content(name));
    }
}

/// A disk with one partition, from 1 MiB on.
fn partitioned(partition: &[u8]) -> Base {
    let sectors = u32::try_from(partition.len() / 512).unwrap();
    let mut table = [0; 512];
    // Its entry: not active, Linux, the first sector, how many.
    table[446..462].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0]);
    table[458..462].copy_from_slice(&sectors.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    Base::sparse(3 << 20, &[(0, &table), (1 << 20, partition)])
}

/// Runs Python code that finds the `partition` as it was, with two connections over TCP.
fn net_boot(line: &str, directory: &Path, partition: &[u8]) {
    let server = Line::new(line)
        .with("DIR", directory)
        .in_own_network()
        .start();
    let files = scratch();
    let before = files.path().join("before");
    fs::write(&before, partition).unwrap();
    let first = r#"
def connect(export=""):
    c = nbd.NBD()
    c.set_export_name(export)
    c.connect_tcp("127.0.0.1", "10809")
    return c
"#;
    let code = r#"
        before = open(ARGS[0], "rb").read()
        c = connect(ARGS[1])
        assert c.can_multi_conn()
        same(read(c), before)
        model = Model([c, connect(ARGS[1])], before, 1).run(150)
        model.check()
        # A host that was switched off comes back to what it has written.
        same(read(connect(ARGS[1])), model.content)
    "#;
    let export = if line.contains(" dir=") {
        "disk.img"
    } else {
        ""
    };
    let client = server.script_after(first, code, &[before.to_str().unwrap(), export]);
    success(&mut in_network_of(&server, &client));
}

#[test]
fn a_net_boot_server_serves_a_partition() {
    let partition = noise(3, 1 << 20);
    let disk = partitioned(&partition);
    net_boot(
        "nbdkit -P \"$P\" -f --newstyle --filter=cow --filter=partition \
         file \"$DIR/disk.img\" partition=1",
        disk.directory(),
        &partition,
    );
}

#[test]
fn a_net_boot_server_serves_a_directory() {
    let content = noise(4, 300_000);
    let disk = Base::new(&content);
    net_boot(
        "nbdkit -p 10809 --ipaddr 127.0.0.1 -f --newstyle --filter=cow -P \"$P\" \
         file dir=\"$DIR\"",
        disk.directory(),
        &content,
    );
}

/// A plugin of a backup tool, in Python: the disk as it was, out of the pieces of it that
/// were saved.
const RESTORED: &str = r#"
import builtins
import json
import os

import nbdkit

API_VERSION = 2


def config(key, value):
    global pieces, backup
    if key == "blockmap":
        with builtins.open(value) as file:
            pieces = json.load(file)
    elif key == "disk":
        backup = value
    elif key not in ("maxlen", "debug"):
        raise RuntimeError(f"unknown parameter: {key}")


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly):
    return os.open(backup, os.O_RDONLY)


def get_size(fd):
    return sum(length for _, length, _ in pieces)


def pread(fd, buf, offset, flags):
    end = offset + len(buf)
    for start, length, place in pieces:
        first, last = max(start, offset), min(start + length, end)
        if first < last:
            count = last - first
            data = bytes(count) if place is None else os.pread(fd, count, place + first - start)
            buf[first - offset:last - offset] = data
"#;

/// Files of a disk that was saved, as somebody wants them back.
fn mounts_a_backup(line: &str, files: &Path, disk: &Path) {
    let server = Line::new(line)
        .with("DIR", files)
        .with("DISK", disk)
        .start();
    let fuse = NbdFuse::new(&server.export_uri("sda"));
    // Writable, because a file system that was in use has to replay its journal.
    let mount = Mount::image(&fuse.file());
    assert!(fs::read(mount.path().join("lost")).unwrap() == noise(5, 300_000));
    fs::write(mount.path().join("new"), noise(6, 200_000)).unwrap();
    fs::remove_file(mount.path().join("lost")).unwrap();
    mount.unmount();
    fuse.unmount();
    let fuse = NbdFuse::new(&server.export_uri("sda"));
    run(&["e2fsck", "-fn", fuse.file().to_str().unwrap()]);
    let mount = Mount::image(&fuse.file());
    assert!(fs::read(mount.path().join("new")).unwrap() == noise(6, 200_000));
    assert!(!mount.path().join("lost").exists());
    mount.unmount();
    fuse.unmount();
}

fn file_system() -> Base {
    let files = scratch();
    let lost = files.path().join("lost");
    fs::write(&lost, noise(5, 300_000)).unwrap();
    Base::make(|path| {
        let disk = path.to_str().unwrap();
        fs::File::create(path).unwrap().set_len(8 << 20).unwrap();
        run(&["mkfs.ext4", "-q", "-F", disk]);
        let write = format!("write {} lost", lost.display());
        run(&["debugfs", "-w", "-R", &write, disk]);
    })
}

#[test]
fn a_backup_tool_mounts_a_backup_through_a_plugin_in_python() {
    let disk = file_system();
    let files = scratch();
    fs::write(files.path().join("plugin.py"), RESTORED).unwrap();
    let content = fs::read(disk.path()).unwrap();
    // The pieces that have data, in another order than on the disk.
    let (mut pieces, mut saved) = (Vec::new(), Vec::new());
    for (number, piece) in content.chunks(64 << 10).enumerate().rev() {
        let place = if piece.iter().all(|byte| *byte == 0) {
            "null".to_string()
        } else {
            saved.extend_from_slice(piece);
            (saved.len() - piece.len()).to_string()
        };
        pieces.push(format!("[{}, {}, {place}]", number << 16, piece.len()));
    }
    fs::write(files.path().join("map"), format!("[{}]", pieces.join(","))).unwrap();
    let backup = Base::new(&saved);
    mounts_a_backup(
        "nbdkit -f --pidfile \"$P\" --unix \"$S\" -e sda --filter=blocksize --filter=cow -v \
         python \"$DIR/plugin.py\" maxlen=65536 blockmap=\"$DIR/map\" disk=\"$DISK\" debug=0 -t 8",
        files.path(),
        backup.path().as_ref(),
    );
}

#[test]
fn a_backup_tool_mounts_a_backup_through_a_plugin_in_shell() {
    let disk = file_system();
    let files = scratch();
    let script = r#"case $1 in
        config) test "$2" = disk && echo "$3" >"$tmpdir/disk" ;;
        thread_model) echo parallel ;;
        get_size) stat -L -c %s -- "$(cat "$tmpdir/disk")" ;;
        pread) dd if="$(cat "$tmpdir/disk")" skip="$4" count="$3" \
                  iflag=skip_bytes,count_bytes bs=64K status=none ;;
        *) exit 2 ;;
    esac"#;
    let plugin = files.path().join("plugin.sh");
    fs::write(&plugin, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).unwrap();
    mounts_a_backup(
        "nbdkit -f --pidfile \"$P\" --unix \"$S\" -e sda --filter=blocksize --filter=cow \
         sh \"$DIR/plugin.sh\" disk=\"$DISK\" -t 8",
        files.path(),
        disk.path().as_ref(),
    );
}

/// It has the size of an SD card, and its machine writes to it.
#[test]
fn an_image_builder_runs_a_machine_on_a_directory() {
    let tree = scratch();
    let kernel = tree.path().join("kernel.img");
    fs::write(&kernel, noise(7, 100_000)).unwrap();
    let files = scratch();
    let copy = files.path().join("card");
    let run = r#"qemu-io -f raw -c "read -P 0 200M 1M" -c "write -P 7 700000 3000" $nbd &&
                 nbdcopy "$uri" "$COPY""#;
    let line = format!(
        "nbdkit -U - --filter=truncate --filter=cow floppy dir=\"$DIR\" truncate=268435456 \
         --run '{run}'"
    );
    let ended = Line::new(&line)
        .with("DIR", tree.path())
        .with("COPY", &copy)
        .with("TMPDIR", files.path())
        .outcome();
    assert!(ended.status.success(), "{}{}", ended.stdout, ended.stderr);
    let card = fs::read(&copy).unwrap();
    assert_eq!(card.len(), 256 << 20);
    assert_eq!(card[510..512], [0x55, 0xaa]);
    assert!(card[700_000..703_000].iter().all(|byte| *byte == 7));
    assert!(fs::read(&kernel).unwrap() == noise(7, 100_000));
}
