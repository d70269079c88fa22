//! A disk that is larger than its base: `truncate` below shows zeroes beyond the end of
//! the file, and so does QEMU beyond that of a backing file.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::small::kept_in;
use super::{assert_says, check, compare, map, refused_to_a_client, text};
use crate::harness::{Base, Server, Setup, noise, run, run_in, scratch};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
const G: u64 = 1 << 30;

/// A base that the test may change, with an image and a model of the disk beside it.
struct Larger {
    base: Base,
    size: u64,
    truncate: String,
    kept: String,
}

impl Larger {
    /// The file has `length` bytes, the disk `size`, as this parameter says.
    fn new(length: u64, size: u64, truncate: &str) -> Larger {
        let base = Base::new(&noise(1, length as usize));
        let kept = kept_in(base.directory(), "diff.qcow2");
        let larger = Larger {
            base,
            size,
            truncate: truncate.to_string(),
            kept,
        };
        let model = larger.model();
        run(&["cp", larger.base.path(), text(&model)]);
        let file = File::options().write(true).open(model).unwrap();
        file.set_len(size.next_multiple_of(512)).unwrap();
        larger
    }

    fn image(&self) -> PathBuf {
        self.base.directory().join("diff.qcow2")
    }

    fn model(&self) -> PathBuf {
        self.base.directory().join("model")
    }

    fn plugin(&self) -> [&str; 4] {
        ["file", self.base.path(), &self.truncate, &self.kept]
    }

    fn serve(&self) -> Server {
        Setup::new().below("truncate").start(&self.plugin())
    }

    /// Writes through nbdkit, and to the model.
    fn write(&self, server: &Server, places: &[u64]) {
        let model = File::options().write(true).open(self.model()).unwrap();
        for offset in places.iter().filter(|offset| **offset < self.size) {
            let len = (self.size - offset).min(5000);
            let args = [offset, &len].map(u64::to_string);
            let write = "at, length = map(int, ARGS); h.pwrite(b'\\x07' * length, at)";
            server.nbdsh_with(&args.each_ref().map(String::as_str), write);
            model.write_all_at(&vec![7; len as usize], *offset).unwrap();
        }
    }

    /// QEMU and nbdkit read what the model has.
    fn assert_same(&self) {
        check(&self.image());
        compare(&self.image(), &self.model());
        let server = self.serve();
        let size = run(&["nbdinfo", "--size", &server.uri()]);
        assert_eq!(size.trim(), self.size.to_string());
        let (model, size) = (self.model(), self.size.to_string());
        let args = [text(&model), &*size];
        // Where either has data, and around it.
        let code = r#"
            model, size = open(ARGS[0], "rb"), int(ARGS[1])
            places = {0, size - 1}
            for at, length, kind in extents(h):
                places.update([at, at + length - 1])
            at = 0
            while at < size:
                try:
                    at = os.lseek(model.fileno(), at, os.SEEK_DATA)
                except OSError:
                    break
                places.add(at)
                at = os.lseek(model.fileno(), at, os.SEEK_HOLE)
            for place in places:
                start = max(0, place - 300 * K)
                count = min(600 * K, size - start)
                same(h.pread(count, start), os.pread(model.fileno(), count, start), start)
        "#;
        server.nbdsh_with(&args, code);
        server.stop();
    }
}

#[test]
fn a_large_disk_of_a_small_file_is_what_qemu_reads() {
    for (length, size, truncate) in [
        (2 * M, 20 * G, "truncate=20G"),
        // No whole number of sectors, nor of blocks.
        (300_001, G, "truncate=1G"),
        (300_001, 5_000_001, "truncate=5000001"),
        (300_001, 300_032, "round-up=512"),
        (300_001, 303_104, "round-up=4K"),
        (0, M, "truncate=1M"),
    ] {
        let larger = Larger::new(length, size, truncate);
        let server = larger.serve();
        larger.write(
            &server,
            &[
                0,
                100_000,
                length.saturating_sub(2000),
                4 * M,
                900 * M,
                19 * G,
            ],
        );
        server.stop();
        larger.assert_same();
        let server = larger.serve();
        larger.write(&server, &[length, 50_000, size - 5]);
        // A trim must not let the base show again, nor make zeroes of it that QEMU sees.
        server.nbdsh("h.trim(64 * K, 128 * K)");
        server.stop();
        let model = File::options().write(true).open(larger.model()).unwrap();
        let trimmed = size.min(192 * K) - size.min(128 * K);
        model
            .write_all_at(&vec![0; trimmed as usize], 128 * K)
            .unwrap();
        larger.assert_same();
        let directory = larger.base.directory();
        let words = ["qemu-img", "convert", "-O", "raw", "diff.qcow2", "read.raw"];
        run_in(directory, &words);
        let words = [
            "qemu-img", "compare", "-f", "raw", "-F", "raw", "read.raw", "model",
        ];
        run_in(directory, &words);
        // What the base does not have is not said to be in it.
        let end = length.next_multiple_of(512);
        let base = map(&larger.image())
            .into_iter()
            .filter(|run| run.2 == super::State::Base);
        assert!(
            base.clone().all(|(at, len, _)| at + len <= end),
            "{:?}",
            map(&larger.image())
        );
    }
}

/// The file grows to the size of the disk, and the bytes stay what they were.
#[test]
fn a_small_file_to_which_was_committed_goes_on() {
    let mut larger = Larger::new(300_001, G, "truncate=1G");
    let server = larger.serve();
    larger.write(&server, &[0, 100_000, 299_000, 4 * M, 900 * M]);
    server.stop();
    run_in(
        larger.base.directory(),
        &["qemu-img", "commit", "-d", "diff.qcow2"],
    );
    // It is not looked at any more.
    larger.base.grow_to(G);
    compare(&larger.image(), larger.base.path().as_ref());
    larger.assert_same();
    let server = larger.serve();
    larger.write(&server, &[300_000, 500 * M]);
    server.stop();
    larger.assert_same();
    // The filter that made it larger is not needed any more.
    let server = Server::start(&["file", larger.base.path(), &larger.kept]);
    larger.write(&server, &[G - 7]);
    server.stop();
    larger.assert_same();
}

/// How long the file was is not recorded. What is served counts.
#[test]
fn a_small_file_that_was_made_longer_or_shorter_is_known_by_its_bytes() {
    let mut larger = Larger::new(2 * M, G, "truncate=1G");
    let server = larger.serve();
    larger.write(&server, &[100_000]);
    server.stop();
    // With zeroes, it is the same disk.
    larger.base.grow_to(3 * M);
    larger.assert_same();
    larger.base.grow_to(2 * M);
    larger.assert_same();

    larger.base.grow_to(M);
    let setup = || Setup::new().below("truncate");
    let error = refused_to_a_client(&setup(), &larger.plugin());
    assert_says(&error, &["not the disk", text(&larger.image())]);
    fs::write(larger.base.path(), noise(1, 3 << 20)).unwrap();
    let error = refused_to_a_client(&setup(), &larger.plugin());
    assert_says(&error, &["not the disk", &format!("at offset {} ", 2 * M)]);
    fs::write(larger.base.path(), noise(1, 2 << 20)).unwrap();
    larger.assert_same();
}

#[test]
fn without_the_filter_that_makes_it_larger_it_is_another_disk() {
    let larger = Larger::new(300_001, G, "truncate=1G");
    let server = larger.serve();
    larger.write(&server, &[100_000]);
    server.stop();
    let plugin = ["file", larger.base.path(), &larger.kept];
    let error = refused_to_a_client(&Setup::new(), &plugin);
    assert_says(&error, &["300001", &G.to_string()]);
    larger.assert_same();
}

/// What is served beyond the end of the file has to be zeroes, for QEMU reads those.
#[test]
fn other_bytes_beyond_the_end_of_the_file_are_refused() {
    let directory = scratch();
    let whole = noise(1, 2 << 20);
    let (one, two) = (directory.path().join("one"), directory.path().join("two"));
    fs::write(&one, &whole).unwrap();
    let dir = format!("dir={}", text(directory.path()));
    let kept = kept_in(directory.path(), "diff.qcow2");
    let backing = format!("cow-backing={}", text(&two));
    let plugin = ["file", &dir, &kept, &backing];
    // At a border of sectors, of samples, and at none.
    for end in [M, 3 * 512, 4096, 100_001] {
        fs::write(&two, &whole[..end as usize]).unwrap();
        let server = Server::start(&plugin);
        server.python("refused('ENOENT', connect, 'one')");
        let said = server.stop_and_tell();
        assert_says(&said, &["offset", text(&two), "cow-backing="]);
        assert!(!directory.path().join("diff.qcow2").exists());
    }
    let ends = format!("has {M} bytes, ");
    fs::write(&two, &whole[..M as usize]).unwrap();
    let server = Server::start(&plugin);
    server.python("refused('ENOENT', connect, 'one')");
    assert_says(&server.stop_and_tell(), &[&ends, &format!("at offset {M}")]);

    // Nor is a longer file the base: QEMU would not show its end, but a commit would.
    fs::write(&two, [&whole[..], &[0; 512]].concat()).unwrap();
    let server = Server::start(&plugin);
    server.python("refused('ENOENT', connect, 'one')");
    assert_says(
        &server.stop_and_tell(),
        &["2097152", "2097664", "cow-backing="],
    );
}
