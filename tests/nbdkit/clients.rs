//! Clients that were not written for these tests, and that check what they get.

use std::fs;

use crate::harness::{Base, Server, noise, run, run_in, scratch};

#[test]
fn nbdcopy_writes_a_disk_and_reads_it_back() {
    let base = Base::new(&noise(1, 20_000_123));
    let server = Server::start(&["file", base.path()]);
    let files = scratch();
    let (source, copy) = (files.path().join("in"), files.path().join("out"));
    // With holes, for which nbdcopy sends zero requests.
    let mut content = noise(2, 20_000_123);
    content[3_000_000..9_500_000].fill(0);
    fs::write(&source, &content).unwrap();
    run(&["nbdcopy", source.to_str().unwrap(), &server.uri()]);
    run(&["nbdcopy", &server.uri(), copy.to_str().unwrap()]);
    assert!(
        fs::read(&copy).unwrap() == content,
        "nbdcopy read other bytes"
    );
}

#[test]
fn nbdcopy_reads_a_disk_that_was_not_written() {
    let content = noise(3, 5_000_001);
    let base = Base::new(&content);
    let server = Server::start(&["file", base.path()]);
    let files = scratch();
    let copy = files.path().join("out");
    run(&["nbdcopy", &server.uri(), copy.to_str().unwrap()]);
    assert!(
        fs::read(&copy).unwrap() == content,
        "nbdcopy read other bytes"
    );
}

#[test]
fn qemu_img_converts_into_the_export_and_finds_it_identical() {
    let base = Base::new(&noise(4, 8 << 20));
    let server = Server::start(&["file", base.path()]);
    let files = scratch();
    let source = files.path().join("in");
    let mut content = noise(5, 8 << 20);
    content[1 << 20..3 << 20].fill(0);
    fs::write(&source, &content).unwrap();
    let source = source.to_str().unwrap();
    let uri = server.uri();
    run(&[
        "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, &uri,
    ]);
    run(&[
        "qemu-img", "compare", "-f", "raw", "-F", "raw", source, &uri,
    ]);
}

/// fio writes blocks with checksums and their own place in them, 16 in flight,
/// and reads each of them back.
fn fio_verifies(parameters: &[&str], sizes: &[&str]) {
    let base = Base::new(&noise(6, 48 << 20));
    let server = Server::start(&[&["file", base.path()], parameters].concat());
    let files = scratch();
    let uri = format!("--uri={}", server.uri());
    let common = [
        "fio",
        "--name=verify",
        "--thread",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--iodepth=16",
        "--size=48M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        // Two writes to one place in flight have no order that fio could check.
        "--serialize_overlap=1",
        "--randrepeat=1",
        "--output-format=terse",
    ];
    run_in(files.path(), &[&common, sizes].concat());
}

const MIXED: [&str; 2] = ["--bsrange=512-128k", "--bs_unaligned"];

#[test]
fn fio_verifies_mixed_sizes() {
    fio_verifies(&[], &MIXED);
}

#[test]
fn fio_verifies_mixed_sizes_at_blocks_of_64k() {
    fio_verifies(&["cow-block-size=64K"], &MIXED);
}

#[test]
fn fio_verifies_mixed_sizes_while_reads_fill_blocks() {
    fio_verifies(&["cow-on-read=true", "cow-block-size=64K"], &MIXED);
}

#[test]
fn fio_verifies_blocks_of_4k() {
    fio_verifies(&[], &["--bs=4k"]);
}
