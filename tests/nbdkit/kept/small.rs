//! A small disk of known bytes, with one write that is always the same: for the tests
//! that are about the image and not about what is in it.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::text;
use crate::harness::{Base, Server, noise, run, run_in};

pub const SIZE: usize = 300_000;

/// What the clients here write, and what must then be in the disk.
pub fn write_through(uri: &str) {
    run(&["qemu-io", "-f", "raw", "-c", "write -P 7 100000 5000", uri]);
}

pub fn expected() -> Vec<u8> {
    let mut bytes = noise(1, SIZE);
    bytes[100_000..105_000].fill(7);
    bytes
}

pub fn base() -> Base {
    Base::new(&noise(1, SIZE))
}

pub fn serve(base: &str, overlay: &str) -> Server {
    Server::start(&["file", base, &format!("cow-overlay={overlay}")])
}

/// Has the image made, or taken up again, by a client that only looks.
pub fn look(base: &str, overlay: &str) {
    let server = serve(base, overlay);
    run(&["nbdinfo", "--size", &server.uri()]);
    server.stop();
}

/// The backing file's name in an image that is in this directory.
pub fn recorded(directory: &Path, image: &str) -> String {
    let info = run_in(
        directory,
        &["qemu-img", "info", "-U", "--output=json", image],
    );
    let info: Value = serde_json::from_str(&info).expect("JSON");
    assert_eq!(info["backing-filename-format"], "raw");
    info["backing-filename"]
        .as_str()
        .expect("a name")
        .to_string()
}

/// What QEMU reads of an image of such a disk that is in this directory.
pub fn read_by_qemu(directory: &Path, image: &str) -> Vec<u8> {
    let mut bytes = read_all_by_qemu(directory, image);
    bytes.truncate(SIZE);
    bytes
}

/// What QEMU reads of an image that is in this directory: whole sectors.
pub fn read_all_by_qemu(directory: &Path, image: &str) -> Vec<u8> {
    let words = [
        "qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, "read.raw",
    ];
    run_in(directory, &words);
    fs::read(directory.join("read.raw")).expect("the converted image")
}

/// A directory of two disks of one size, and the parameters of a plugin that exports
/// both, of which the first is the base.
pub fn two_exports(directory: &Path) -> [String; 2] {
    let files = directory.join("files");
    fs::create_dir(&files).expect("a directory");
    for (seed, name) in [(1, "one"), (2, "two")] {
        fs::write(files.join(name), noise(seed, SIZE)).expect("a disk");
    }
    [
        format!("dir={}", text(&files)),
        format!("cow-backing={}", text(&files.join("one"))),
    ]
}

pub fn kept_in(directory: &Path, name: &str) -> String {
    format!("cow-overlay={}", text(&directory.join(name)))
}
