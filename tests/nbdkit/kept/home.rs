//! Images in which QEMU has put something elsewhere than this filter does: they are brought
//! home before they are served, and QEMU reads the same bytes from them, whatever ended
//! the work in between.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::qemu::{after, assert_resumed, converted, plugin, template, write};
use super::{Disk, Seal, assert_says, check, check_after_a_crash, compare, map, text};
use crate::harness::command::Outcome;
use crate::harness::mount::Mount;
use crate::harness::{Base, Setup, noise, run, run_in, scratch};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
/// Of the images here.
const CLUSTER: u64 = 128 * K;
/// What is said when an image is not at home.
const AWAY: &str = "another program has written to it";

/// An nbdkit that serves the pair in a directory, and a client that reads all of it to
/// "read.raw".
fn serve(setup: &Setup, directory: &Path) -> Outcome {
    let read = directory.join("read.raw");
    let shell = format!("nbdcopy \"$uri\" {}", text(&read));
    setup.run(&plugin(directory).each_ref().map(String::as_str), &shell)
}

/// The first start brings it home, and the next one has nothing to do. What the first
/// one said.
fn assert_brought_home(directory: &Path, what: &str) -> String {
    let bytes = converted(directory);
    let overlay = directory.join("diff.qcow2");
    let first = serve(&Setup::new(), directory);
    assert!(first.status.success(), "{what}: {}", first.stderr);
    assert!(first.stderr.contains(AWAY), "{what}: {}", first.stderr);
    let read = fs::read(directory.join("read.raw")).expect("what was read");
    assert!(read == bytes, "{what}: a wrong read");
    check(&overlay);
    assert!(converted(directory) == bytes, "{what}: other bytes");
    assert_home(directory, what);
    first.stderr
}

fn assert_home(directory: &Path, what: &str) {
    map(&directory.join("diff.qcow2"));
    let next = serve(&Setup::new(), directory);
    assert!(next.status.success(), "{what}: {}", next.stderr);
    assert!(!next.stderr.contains(AWAY), "{what}: {}", next.stderr);
}

#[test]
fn clusters_that_qemu_put_elsewhere_are_moved() {
    let disk = template();
    for shell in [
        write("write -P 9 3M 128k"),
        write("write -P 9 3M 1k"),
        write("write -P 9 2M 4k"),
        // A cluster of zeroes that leads to one of the file, which is given up.
        format!(
            "{}; {}",
            write("write -P 9 3M 128k"),
            write("write -z 3M 128k")
        ),
        // Where others belong, and those in the way of further ones.
        write("write -P 9 256k 3M"),
        format!(
            "{}; {}",
            write("write -P 8 3M 100k"),
            write("write -P 9 256k 3584k")
        ),
        // From the end to the start.
        format!(
            "for at in 3840 3584 3328 3072 512 384 256 128; do {}; done",
            "qemu-io -d unmap -c \"write -P 7 ${at}k 70k\" diff.qcow2"
        ),
    ] {
        let copy = after(&disk, &shell);
        assert_brought_home(copy.path(), &shell);
    }
}

#[test]
fn tables_that_qemu_put_elsewhere_are_moved() {
    let disk = template();
    let writes = write("write -P 9 256k 3M");
    for shell in [
        "qemu-img resize diff.qcow2 +1G; qemu-img resize --shrink diff.qcow2 4M".to_string(),
        "qemu-img resize diff.qcow2 900G; qemu-img resize --shrink diff.qcow2 4M".to_string(),
        format!("qemu-img resize --shrink diff.qcow2 1M; qemu-img resize diff.qcow2 4M; {writes}"),
        format!("qemu-img resize diff.qcow2 10G; {writes}; qemu-img resize --shrink diff.qcow2 4M"),
        format!("qemu-img snapshot -c s diff.qcow2; {writes}; qemu-img snapshot -d s diff.qcow2"),
        "qemu-img amend -o refcount_bits=1 diff.qcow2".to_string(),
        format!("{writes}; qemu-img amend -o refcount_bits=64 diff.qcow2; {writes}"),
        "qemu-img commit diff.qcow2".to_string(),
        format!("qemu-img commit diff.qcow2; {writes}"),
        format!(
            "qemu-img bitmap --add diff.qcow2 b; {writes}; qemu-img bitmap --remove diff.qcow2 b"
        ),
        format!("{writes}; qemu-img check -q -r all diff.qcow2"),
        // All is at home, and the file longer than it was.
        "truncate -s +1M diff.qcow2".to_string(),
    ] {
        let copy = after(&disk, &shell);
        assert_brought_home(copy.path(), &shell);
    }
}

/// Lazy refcounts are written when the image is closed, and not if that never happens.
#[test]
fn refcounts_that_qemu_did_not_write_are_rebuilt() {
    let disk = template();
    let lazy = "qemu-img amend -o lazy_refcounts=on diff.qcow2";
    let killed = |writes: &str| {
        format!("{lazy}; qemu-io -d unmap {writes} -c flush -c 'sigraise 9' diff.qcow2 || true")
    };
    for shell in [
        lazy.to_string(),
        killed("-c 'write -P 9 3M 512k'"),
        killed("-c 'write -P 9 256k 3M' -c 'discard 1M 128k'"),
        format!(
            "qemu-img commit diff.qcow2; {}",
            killed("-c 'write -P 9 0 4M'")
        ),
        format!(
            "qemu-img amend -o refcount_bits=8 diff.qcow2; {}",
            killed("-c 'write -P 9 0 4M'")
        ),
        // Without them a killed QEMU leaves leaks at most.
        "qemu-io -c 'write -P 9 3M 512k' -c 'discard 1M 256k' -c 'sigraise 9' diff.qcow2 || true"
            .to_string(),
    ] {
        let copy = after(&disk, &shell);
        assert_brought_home(copy.path(), &shell);
    }
}

/// A disk of 16M that has data in its first cluster alone.
fn nearly_empty() -> Disk {
    let disk = Disk::new(16 * M, 4096);
    let server = disk.serve();
    disk.client(
        &server,
        1,
        "disk.write(0, noise(K, 1)); disk.check().save()",
    );
    server.stop();
    disk
}

/// A guest that writes from the start to the end has each cluster where the next one
/// belongs.
#[test]
fn a_long_chain_is_moved_with_few_more_copies() {
    let disk = nearly_empty();
    let shell = write("write -P 9 256k 12M");
    let copy = after(&disk, &shell);
    let said = assert_brought_home(copy.path(), &shell);
    let copied = (96 + 96 / 16) * CLUSTER;
    let wanted = format!("96 of 96 clusters moved, {copied} bytes copied");
    assert!(said.contains(&wanted), "{wanted:?} in {said}");
}

/// Gives each of these clusters of the disk the place of the next one, and the first that of
/// the last. All have data.
fn rotate(overlay: &Path, clusters: &[u64]) {
    let file = File::options().read(true).write(true).open(overlay);
    let file = file.expect("the image");
    let number = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).expect("in the file");
        u64::from_be_bytes(bytes) & !(1 << 63)
    };
    let entry = |cluster: u64| number(number(40)) + 16 * cluster;
    let places: Vec<u64> = clusters.iter().map(|c| number(entry(*c))).collect();
    let contents = places.iter().map(|place| {
        let mut bytes = vec![0; CLUSTER as usize];
        file.read_exact_at(&mut bytes, *place).expect("data");
        bytes
    });
    let contents: Vec<_> = contents.collect();
    for (i, cluster) in clusters.iter().enumerate() {
        let place = places[(i + 1) % places.len()];
        file.write_all_at(&contents[i], place).expect("data");
        let descriptor = place | (1 << 63);
        let at = entry(*cluster);
        file.write_all_at(&descriptor.to_be_bytes(), at)
            .expect("an entry");
    }
}

/// Two that are each in the other's place, and more of them.
#[test]
fn rings_are_moved() {
    let disk = nearly_empty();
    for (clusters, tables) in [
        (vec![vec![1, 2]], "true"),
        (
            vec![vec![5, 9, 3], vec![20, 10], (40..80).collect()],
            "true",
        ),
        (vec![(1..127).rev().collect()], "true"),
        (
            vec![vec![1, 2], (40..80).collect()],
            "qemu-img amend -o refcount_bits=32 diff.qcow2",
        ),
    ] {
        let copy = after(&disk, "qemu-img convert -n -O qcow2 disk.img diff.qcow2");
        run_in(
            copy.path(),
            &["sh", "-c", &write("write -P 9 512 16776704")],
        );
        let overlay = copy.path().join("diff.qcow2");
        let before = converted(copy.path());
        for clusters in &clusters {
            rotate(&overlay, clusters);
        }
        run_in(copy.path(), &["sh", "-c", tables]);
        check(&overlay);
        let what = format!("{clusters:?}, {tables}");
        assert!(converted(copy.path()) == before, "{what}");
        assert_brought_home(copy.path(), &what);
    }
}

/// Killed at every so many calls of a kind: after each, QEMU finds a sound image with the same
/// bytes, and the next start goes on.
fn killed_at_every(call: &str, shell: &str) {
    let disk = nearly_empty();
    let copy = after(&disk, shell);
    let overlay = copy.path().join("diff.qcow2");
    let expected = copy.path().join("expected.raw");
    fs::write(&expected, converted(copy.path())).expect("write a file");
    let log = copy.path().join("strace");
    let mut kills = 0;
    // Later and later, so that each gets further than the one before.
    for when in (1..).map(|n| n * (n + 1) / 2) {
        let inject = format!("inject={call}:signal=SIGKILL:when={when}");
        let strace = ["strace", "-f", "-o", text(&log), "-e", &inject];
        // No client that could be the one to be killed.
        let words = plugin(copy.path());
        let words = words.each_ref().map(String::as_str);
        let ended = Setup::new().under(&strace).run(&words, "true");
        check_after_a_crash(&overlay);
        compare(&overlay, &expected);
        if ended.status.code().is_some() {
            assert!(ended.status.success(), "{}", ended.stderr);
            break;
        }
        kills += 1;
    }
    assert!(kills > 1, "killed {kills} times only");
    check(&overlay);
    assert_home(copy.path(), shell);
    assert_resumed(copy.path(), shell);
}

const CHAIN: &str = "qemu-io -d unmap -c 'write -P 9 256k 5M' diff.qcow2";
const CHAIN_AND_TABLES: &str = "qemu-img amend -o refcount_bits=8 diff.qcow2; \
                                qemu-io -d unmap -c 'write -P 9 256k 5M' diff.qcow2";

#[test]
fn nothing_is_lost_by_a_kill_before_a_sync() {
    killed_at_every("fdatasync", CHAIN);
    killed_at_every("fdatasync", CHAIN_AND_TABLES);
}

#[test]
fn nothing_is_lost_by_a_kill_before_a_table_is_written() {
    killed_at_every("pwrite64", CHAIN);
    killed_at_every("pwrite64", CHAIN_AND_TABLES);
}

#[test]
fn nothing_is_lost_by_a_kill_before_space_is_given_back() {
    killed_at_every("fallocate,ftruncate", CHAIN_AND_TABLES);
}

/// What has been moved stays so, qemu can go on with the image, and so can the next start.
#[test]
fn a_full_file_system_loses_nothing() {
    let base = Base::new(&noise(1, 16 << 20));
    let mount = Mount::tmpfs("24m");
    let overlay = mount.path().join("diff.qcow2");
    let kept = format!("cow-overlay={}", text(&overlay));
    let plugin = ["file", base.path(), &kept, "cow-block-size=4096"];
    let made = Setup::new().run(&plugin, "qemu-io -f raw -c 'write -P 1 0 4k' \"$uri\"");
    assert!(made.status.success(), "{}", made.stderr);
    let io = ["qemu-io", "-c", "write -P 9 256k 12M", text(&overlay)];
    run(&io);
    let files = scratch();
    let expected = files.path().join("expected.raw");
    run(&[
        "qemu-img",
        "convert",
        "-O",
        "raw",
        text(&overlay),
        text(&expected),
    ]);

    // Room for a part of what is copied twice.
    mount.leave_free(300 << 10);
    let error = Setup::new().refusal(&plugin);
    let last = error.lines().last().expect("a message");
    assert_says(last, &["No space left", text(&overlay), "nothing is lost"]);
    check_after_a_crash(&overlay);
    compare(&overlay, &expected);

    fs::remove_file(mount.path().join("filler")).expect("make room");
    let goes_on = Setup::new().run(&plugin, "true");
    assert!(goes_on.status.success(), "{}", goes_on.stderr);
    assert!(goes_on.stderr.contains(AWAY), "{}", goes_on.stderr);
    check(&overlay);
    compare(&overlay, &expected);
    map(&overlay);
}

/// A chain needs room beyond the image's end for a moment.
#[test]
fn a_limit_on_the_length_of_files_is_told_before_anything_is_changed() {
    let disk = nearly_empty();
    let copy = after(&disk, CHAIN);
    let overlay = copy.path().join("diff.qcow2");
    let end = fs::metadata(&overlay).expect("the image").len();
    let before = Seal::of(&overlay);
    let plugin = plugin(copy.path());
    let plugin = plugin.each_ref().map(String::as_str);
    let error = Setup::new().file_size_limit(end).error(&plugin);
    assert_says(&error, &["ulimit -f", text(&overlay)]);
    assert_eq!(Seal::of(&overlay), before);
    let served = Setup::new()
        .file_size_limit(end + 4 * M)
        .run(&plugin, "true");
    assert!(served.status.success(), "{}", served.stderr);
    check(&overlay);
}

/// What belongs to another disk, or has blocks of another size, is left as it is.
#[test]
fn an_image_that_is_not_wanted_is_not_moved() {
    let disk = nearly_empty();
    let copy = after(&disk, &format!("{CHAIN}; cp disk.img other.img"));
    let overlay = copy.path().join("diff.qcow2");
    let before = Seal::of(&overlay);
    let other = copy.path().join("other.img");
    let plugin = plugin(copy.path());
    let [file, base, kept] = plugin.each_ref().map(String::as_str);
    let error = Setup::new().error(&[file, text(&other), kept]);
    assert_says(&error, &["its backing file is"]);
    let error = Setup::new().error(&[file, base, kept, "cow-block-size=8192"]);
    assert_says(&error, &["blocks of 4096"]);
    assert_eq!(Seal::of(&overlay), before);
}
