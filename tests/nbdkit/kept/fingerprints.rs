//! A base is known again by its bytes: not by its name, its size and its time alone.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::small::{kept_in, read_all_by_qemu};
use super::{Seal, assert_says, attempt, check, name_base, refused_to_a_client, text};
use crate::harness::log::requests;
use crate::harness::{Server, Setup, noise, run, run_in, scratch};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
const SIZE: u64 = 8 * M;

/// How much a sample has.
const SAMPLE: u64 = 4 * K;

/// A base that the test may change, and an image beside it.
struct Pair {
    directory: TempDir,
    more: Vec<String>,
}

impl Pair {
    fn new(more: &[&str]) -> Pair {
        let directory = scratch();
        let pair = Pair {
            directory,
            more: more.iter().map(|word| word.to_string()).collect(),
        };
        pair.put(&noise(1, SIZE as usize), 0);
        pair
    }

    /// A base and an image to which was written: of the first cluster the blocks at 16K,
    /// and nothing where there are samples.
    fn written(more: &[&str]) -> Pair {
        let pair = Pair::new(more);
        let server = pair.serve();
        server.nbdsh("h.pwrite(b'mine' * 1024, 16 * K)");
        server.stop();
        pair
    }

    fn base(&self) -> PathBuf {
        self.directory.path().join("disk.img")
    }

    fn image(&self) -> PathBuf {
        self.directory.path().join("diff.qcow2")
    }

    /// Writes to the base and leaves no trace of it but the bytes.
    fn put(&self, bytes: &[u8], offset: u64) {
        let base = self.base();
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&base);
        file.unwrap().write_all_at(bytes, offset).unwrap();
        run(&["touch", "-d", "@1700000000", text(&base)]);
    }

    fn plugin(&self) -> Vec<String> {
        let base = text(&self.base()).to_string();
        let own = [
            "file".to_string(),
            base,
            kept_in(self.directory.path(), "diff.qcow2"),
        ];
        own.iter().chain(&self.more).cloned().collect()
    }

    fn serve(&self) -> Server {
        let plugin = self.plugin();
        Server::start(&plugin.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// It is served without a word.
    fn assert_served(&self) {
        let server = self.serve();
        server.nbdsh("h.pread(1, 0)");
        assert_eq!(server.stop_and_tell(), "");
        check(&self.image());
    }

    /// Its client is refused, and the image stays as it is.
    fn assert_refused(&self, words: &[&str]) {
        let before = Seal::of(&self.image());
        let plugin = self.plugin();
        let plugin: Vec<_> = plugin.iter().map(String::as_str).collect();
        let error = refused_to_a_client(&Setup::new(), &plugin);
        assert_says(&error, &[&[text(&self.image())], words].concat());
        assert_eq!(Seal::of(&self.image()), before, "{error}");
    }
}

#[test]
fn another_disk_of_the_same_size_and_time_is_refused() {
    for block in ["512", "4K", "64K"] {
        let pair = Pair::written(&[&format!("cow-block-size={block}")]);
        pair.assert_served();
        pair.put(&noise(2, SIZE as usize), 0);
        pair.assert_refused(&["not the disk", "offset ", "qemu-img convert"]);
        pair.put(&noise(1, SIZE as usize), 0);
        pair.assert_served();
    }
}

/// Two disks with the same content but for a superblock, or a partition table.
#[test]
fn a_disk_that_differs_where_disks_do_is_refused_with_the_offset() {
    let pair = Pair::written(&[]);
    for (offset, sample) in [
        (0, 0),
        (512, 0),
        (K + 56, 0),
        (64 * K + 32, 64 * K),
        (M + 3, M),
        (SIZE - 1, SIZE - SAMPLE),
    ] {
        let old = noise(1, SIZE as usize)[offset as usize];
        pair.put(&[!old], offset);
        pair.assert_refused(&[&format!("at offset {sample} ")]);
        pair.put(&[old], offset);
        pair.assert_served();
    }
}

/// What the image said can be done.
#[test]
fn a_refused_pair_can_be_made_one_disk() {
    let pair = Pair::written(&[]);
    pair.put(&[0], 0);
    pair.assert_refused(&["qemu-img convert -O raw"]);
    let directory = pair.directory.path();
    let mut expected = fs::read(pair.base()).unwrap();
    expected[16 << 10..20 << 10].copy_from_slice(&b"mine".repeat(1024));
    run_in(
        directory,
        &[
            "qemu-img",
            "convert",
            "-O",
            "raw",
            text(&pair.image()),
            "new",
        ],
    );
    assert!(fs::read(directory.join("new")).unwrap() == expected);
}

/// `qemu-img commit -d` writes to the base what the image has.
#[test]
fn a_base_that_has_changed_where_the_image_has_its_own_is_served() {
    for block in ["512", "4K", "64K"] {
        let pair = Pair::new(&[&format!("cow-block-size={block}")]);
        let server = pair.serve();
        // A part of the first sample, all of the second, a part of the last.
        server.nbdsh(
            "h.pwrite(b'mine' * 128, 512); h.pwrite(b'mine' * 4096, 60 * K);
h.trim(512 * K, 7 * M); h.pwrite(b'end', 8 * M - 3)",
        );
        server.stop();
        let before = read_all_by_qemu(pair.directory.path(), "diff.qcow2");
        run_in(
            pair.directory.path(),
            &["qemu-img", "commit", "-d", "diff.qcow2"],
        );
        assert!(fs::read(pair.base()).unwrap() == before);
        pair.put(&[], 0);
        pair.assert_served();
        // In a block that is trimmed the base does not count either.
        let server = pair.serve();
        server.nbdsh("h.trim(64 * K, 60 * K)");
        server.stop();
        pair.put(&noise(5, 4096), 64 * K);
        pair.assert_served();
        // Where nothing was written it does.
        pair.put(&noise(6, 4096), M);
        pair.assert_refused(&[&format!("at offset {M} ")]);
    }
}

/// With a bitmap QEMU empties an image without moving a table.
#[test]
fn a_base_that_has_changed_because_the_image_was_emptied_is_served() {
    for shell in [
        "qemu-img commit -q diff.qcow2",
        "qemu-img bitmap --add diff.qcow2 b && qemu-img commit -q diff.qcow2 &&
         qemu-img bitmap --remove diff.qcow2 b",
    ] {
        let pair = Pair::new(&[]);
        let server = pair.serve();
        server.nbdsh("h.pwrite(b'mine' * 2048, 0); h.pwrite(b'mine' * 1024, 64 * K)");
        server.stop();
        let directory = pair.directory.path();
        let write = "qemu-io -c 'write -q -P 2 3M 64k' diff.qcow2";
        run_in(directory, &["sh", "-c", &format!("{shell} && {write}")]);
        pair.put(&[], 0);
        // It is brought home by the first start, and has a fingerprint after it.
        let server = pair.serve();
        server.nbdsh("h.pread(1, 0)");
        server.stop();
        pair.assert_served();
    }
}

/// A snapshot moves tables, too, and empties nothing.
#[test]
fn another_disk_is_refused_after_a_snapshot_was_deleted() {
    let pair = Pair::written(&[]);
    let shell = "qemu-img snapshot -c s diff.qcow2 &&
        qemu-io -c 'write -q -P 2 3M 64k' diff.qcow2 && qemu-img snapshot -d s diff.qcow2";
    run_in(pair.directory.path(), &["sh", "-c", shell]);
    pair.put(&noise(2, SIZE as usize), 0);
    let plugin = pair.plugin();
    let plugin: Vec<_> = plugin.iter().map(String::as_str).collect();
    let error = refused_to_a_client(&Setup::new(), &plugin);
    assert_says(&error, &["not the disk"]);
    pair.put(&noise(1, SIZE as usize), 0);
    pair.assert_served();
}

/// So that it can be emptied by `qemu-img commit`, or get another disk.
#[test]
fn an_image_with_nothing_in_it_takes_any_disk() {
    let pair = Pair::new(&[]);
    pair.assert_served();
    let made = fs::read(pair.image()).unwrap();
    pair.put(&noise(2, SIZE as usize), 0);
    pair.assert_served();
    assert!(
        fs::read(pair.image()).unwrap() != made,
        "no new fingerprint"
    );
    // From then on it has to be that one.
    let server = pair.serve();
    server.nbdsh("h.pwrite(b'mine', 16 * K)");
    server.stop();
    pair.assert_served();
    pair.put(&noise(1, SIZE as usize), 0);
    pair.assert_refused(&["not the disk"]);
}

/// The time of the base is taken anew, too: no warning that it has changed since.
#[test]
fn an_image_with_nothing_in_it_takes_the_time_of_its_disk() {
    let pair = Pair::new(&[]);
    pair.assert_served();
    pair.put(&noise(2, SIZE as usize), 0);
    run(&["touch", "-d", "@1800000000", text(&pair.base())]);
    let server = pair.serve();
    server.nbdsh("h.pwrite(b'mine', 16 * K)");
    assert_says(&server.stop_and_tell(), &["modified since"]);
    pair.assert_served();
}

/// QEMU moves what it does not know within the header when it writes a new one.
#[test]
fn under_another_name_the_bytes_count() {
    let pair = Pair::written(&[]);
    let directory = pair.directory.path();
    fs::rename(pair.base(), directory.join("moved.img")).unwrap();
    name_base(directory, "diff.qcow2", "moved.img");
    fs::rename(directory.join("moved.img"), pair.base()).unwrap();
    name_base(directory, "diff.qcow2", "disk.img");
    pair.assert_served();
    fs::write(pair.base(), noise(2, SIZE as usize)).unwrap();
    name_base(directory, "diff.qcow2", "./disk.img");
    pair.assert_refused(&["not the disk"]);
}

#[test]
fn a_filter_that_changes_what_the_file_has_is_seen_when_the_image_is_made() {
    let pair = Pair::new(&[]);
    let plugin = pair.plugin();
    let plugin: Vec<_> = plugin.iter().map(String::as_str).collect();
    let setup = Setup::new().below("swab");
    let error = refused_to_a_client(&setup, &plugin);
    let words = [
        "filter below changes",
        "offset 0",
        "cow-backing=",
        "disk.img",
    ];
    assert_says(&error, &words);
    assert_eq!(fs::read_dir(pair.directory.path()).unwrap().count(), 1);

    // With the name of what is served it works, now and later.
    let swapped = pair.directory.path().join("swapped.img");
    let bytes = noise(1, SIZE as usize);
    let pairs = bytes.chunks(2).flat_map(|pair| [pair[1], pair[0]]);
    fs::write(&swapped, pairs.collect::<Vec<_>>()).unwrap();
    let backing = format!("cow-backing={}", text(&swapped));
    let plugin = [&plugin[..], &[&backing]].concat();
    for _start in ["made", "resumed"] {
        let server = setup.start(&plugin);
        server.nbdsh("h.pwrite(b'mine', 16 * K)");
        server.stop();
    }
    // Without the filter it is another disk.
    let error = refused_to_a_client(&Setup::new(), &plugin);
    assert_says(&error, &["not the disk"]);
}

fn sample_count(image: &Path) -> u8 {
    let bytes = fs::read(image).unwrap();
    bytes[175]
}

/// A disk with bad sectors can be used: what can't be read is left out.
#[test]
fn what_can_not_be_read_is_left_out() {
    let pair = Pair::new(&[]);
    // The superblock of btrfs and the last sector.
    let map = pair.directory.path().join("map");
    let last = SIZE - 512;
    let lines = format!(
        "0x0 + 1\n0x0 0x10000 +\n0x10000 0x1000 -\n0x11000 {:#x} +\n{last:#x} 0x200 -\n",
        last - 0x11000
    );
    fs::write(&map, lines).unwrap();
    let plugin = pair.plugin();
    let map = format!("ddrescue-mapfile={}", text(&map));
    let plugin: Vec<_> = plugin.iter().map(String::as_str).chain([&*map]).collect();
    let bad = || Setup::new().below("ddrescue").start(&plugin);
    let server = bad();
    server.nbdsh("h.pwrite(b'mine', 16 * K)");
    server.stop();
    let taken = sample_count(&pair.image());
    assert!((8..=14).contains(&taken), "{taken}");
    // Read at last, they tell nothing.
    pair.assert_served();
    pair.put(&[0; 4096], 64 * K);
    pair.assert_served();
    pair.put(&[0; 4096], M);
    pair.assert_refused(&[&format!("at offset {M} ")]);

    // Sectors that have gone bad since are left out, and the others are compared.
    pair.put(&noise(1, SIZE as usize), 0);
    fs::remove_file(pair.image()).unwrap();
    let server = pair.serve();
    server.nbdsh("h.pwrite(b'mine', 16 * K)");
    server.stop();
    assert_eq!(sample_count(&pair.image()), taken + 2);
    pair.put(&[0; 4096], 64 * K);
    let server = bad();
    server.nbdsh("same(h.pread(4, 16 * K), b'mine')");
    server.stop();
    pair.put(&[0; 4096], M);
    let server = bad();
    server.python("refused('ENOENT', connect)");
    assert_says(&server.stop_and_tell(), &[&format!("at offset {M} ")]);
}

/// Nothing could be read when the image was made: the next run takes it.
#[test]
fn a_fingerprint_that_is_missing_is_taken_later() {
    let pair = Pair::new(&[]);
    let switch = pair.directory.path().join("switch");
    fs::write(&switch, "").unwrap();
    let error = format!("error-pread-file={}", text(&switch));
    let plugin = pair.plugin();
    let parameters = ["error-pread=EIO", "error-pread-rate=100%", &error];
    let plugin: Vec<_> = plugin
        .iter()
        .map(String::as_str)
        .chain(parameters)
        .collect();
    let server = Setup::new().below("error").start(&plugin);
    server.nbdsh("h.pwrite(b'mine' * 1024, 16 * K)");
    server.stop();
    assert_eq!(sample_count(&pair.image()), 0);
    let server = pair.serve();
    server.nbdsh("h.pread(1, 0)");
    assert_says(&server.stop_and_tell(), &["is taken for the one below"]);
    pair.assert_served();
    assert!(sample_count(&pair.image()) > 8);
    pair.put(&noise(2, SIZE as usize), 0);
    pair.assert_refused(&["not the disk"]);
}

/// The first of them; the others wait for it, or are late enough.
#[test]
fn of_connections_at_once_one_looks_at_the_base() {
    let pair = Pair::new(&[]);
    let log = pair.directory.path().join("log");
    let logged = format!("logfile={}", text(&log));
    let plugin = pair.plugin();
    let plugin: Vec<_> = plugin
        .iter()
        .map(String::as_str)
        .chain([&*logged, "rdelay=5ms"])
        .collect();
    let mut expected = 0;
    for start in ["made", "resumed"] {
        let server = Setup::new().below("log").below("delay").start(&plugin);
        server.python(
            r#"
            from threading import Thread
            connected = []
            clients = [Thread(target=lambda: connected.append(connect())) for _ in range(8)]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            assert len(connected) == 8
            connected[0].pwrite(b"mine" * 1024, 16 * K)
            "#,
        );
        server.stop();
        expected = usize::from(sample_count(&pair.image()));
        assert!(expected > 8);
        assert_eq!(requests(&log, "Read").len(), expected, "{start}");
        fs::remove_file(&log).unwrap();
    }
    // And none of it is a client's read, to be saved.
    let plugin = [&plugin[..], &["cow-on-read=true", "cow-on-cache=true"]].concat();
    let before = super::map(&pair.image());
    let server = Setup::new().below("log").below("delay").start(&plugin);
    run(&["nbdinfo", "--size", &server.uri()]);
    server.stop();
    assert_eq!(super::map(&pair.image()), before);
    assert_eq!(requests(&log, "Read").len(), expected);
}

/// The export that has the image is the one that was written to.
#[test]
fn a_client_that_has_looked_at_another_export_does_no_harm() {
    let directory = scratch();
    let [dir, _] = super::small::two_exports(directory.path());
    let kept = kept_in(directory.path(), "diff.qcow2");
    let plugin = ["file", &dir, &kept, "cow-backing=nbd:localhost:1"];
    let server = Server::start(&plugin);
    run(&["nbdinfo", "--size", &server.export_uri("two")]);
    server.stop();
    let server = Server::start(&plugin);
    server.python("connect('one').pwrite(b'mine', 100_000)");
    server.stop();
    let server = Server::start(&plugin);
    server.python("same(connect('one').pread(4, 100_000), b'mine')");
    server.stop();
    // The files change places.
    let [one, two, other] =
        ["one", "two", "other"].map(|name| directory.path().join("files").join(name));
    fs::rename(&one, &other).unwrap();
    fs::rename(&two, &one).unwrap();
    let server = Server::start(&plugin);
    let refused = attempt(&["nbdinfo", &server.export_uri("one")]);
    assert!(!refused.status.success(), "{}", refused.stdout);
    assert_says(&server.stop_and_tell(), &["not the disk"]);
}
