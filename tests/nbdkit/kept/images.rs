//! An image after random requests: sound, and block by block what it should be.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::{Disk, text};
use crate::harness::run;

const G: u64 = 1 << 30;
const T: u64 = 1 << 40;

/// Around sectors, blocks, clusters and L2 tables, and far beyond memory.
const SIZES: [u64; 13] = [
    1,
    511,
    512,
    513,
    4095,
    4096,
    65537,
    (2 << 20) + 512,
    (10 << 20),
    (16 << 20) + 1,
    G + 1,
    64 * G - 513,
    T + 512,
];

fn random_requests(block: u64, sizes: &[u64]) {
    for &size in sizes {
        let disk = Disk::new(size, block);
        let server = disk.serve();
        disk.client(&server, size + block, "disk.run(70).check().save()");
        server.stop();
        disk.assert_sound();
        let said = run(&[
            "qemu-img",
            "info",
            "-U",
            "--output=json",
            text(&disk.overlay()),
        ]);
        let info: serde_json::Value = serde_json::from_str(&said).expect("JSON");
        assert_eq!(info["virtual-size"], size.next_multiple_of(512));
        assert_eq!(info["cluster-size"], 32 * block);
    }
}

#[test]
fn blocks_of_512() {
    random_requests(512, &SIZES);
}

#[test]
fn blocks_of_4k() {
    random_requests(4096, &SIZES);
}

#[test]
fn blocks_of_64k() {
    random_requests(65536, &SIZES);
}

/// Most of the above are in few clusters; this is many requests to one small disk.
#[test]
fn a_disk_that_is_rewritten_many_times() {
    let disk = Disk::new((1 << 20) + 777, 4096);
    let server = disk.serve();
    disk.client(&server, 1, "disk.run(900).check().save()");
    server.stop();
    disk.assert_sound();
}

/// A disk whose every block was written, and one whose every block was trimmed.
#[test]
fn a_disk_that_is_full_and_one_that_is_empty() {
    for block in [512, 4096, 65536] {
        let disk = Disk::new((9 << 20) + 513, block);
        let server = disk.serve();
        disk.client(
            &server,
            2,
            "disk.write(0, noise(disk.size, 1)); disk.check().save()",
        );
        server.stop();
        disk.assert_sound();
        let taken = || 512 * fs::metadata(disk.overlay()).expect("the image").blocks();
        let full = taken();

        let server = disk.serve();
        disk.client(&server, 3, "disk.trim(0, disk.size); disk.check().save()");
        server.stop();
        disk.assert_sound();
        let given_back = full.saturating_sub(taken());
        // A page in which the file goes on may stay.
        assert!(given_back >= 9 << 20, "only {given_back} bytes");
        // No data cluster is counted.
        let said = run(&["qemu-img", "check", "--output=json", text(&disk.overlay())]);
        let check: serde_json::Value = serde_json::from_str(&said).expect("JSON");
        assert_eq!(check["allocated-clusters"].as_u64().unwrap_or(0), 0);
    }
}
