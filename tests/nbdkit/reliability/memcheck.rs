//! nbdkit with the library under valgrind's memcheck: no error, and nothing is lost.
//!
//! `make checkers` runs this: it takes long, and needs valgrind.

use crate::harness::{Base, Setup, noise, scratch};
use crate::stats::await_disconnects;

/// What memcheck finds ends nbdkit with a status of its own, and the harness fails a test
/// then. Without debug information kept, what is lost can't be told where it came from,
/// because nbdkit has unloaded the library when memcheck looks.
const VALGRIND: [&str; 8] = [
    "valgrind",
    "--quiet",
    "--error-exitcode=99",
    "--leak-check=full",
    "--show-leak-kinds=definite",
    "--errors-for-leak-kinds=definite",
    "--keep-debuginfo=yes",
    concat!(
        "--suppressions=",
        env!("CARGO_MANIFEST_DIR"),
        "/tests/nbdkit/reliability/memcheck.supp"
    ),
];

/// Requests of all kinds, on two connections that are in flight together, with the flags
/// that the model takes for some; extents and cache; requests that fail; a flush. At last
/// the block map gives up all its leaves, and takes some of them back.
const ALL_OPERATIONS: &str = r#"
    Model([h, connect()], read(h), 1).run(80).check()
    fly_together(neighbours([h, connect()], read(h), 4, 5), 20)
    h.cache(M, 5)
    extents(h)
    refused("EINVAL", h.pread, 512, h.get_size())
    h.flush()
    h.trim(h.get_size(), 0)
    h.pwrite(noise(2 * M, 6), 5)
"#;

/// Of two overlays, the second finds the limit.
const OVER_THE_LIMIT: &str = r#"
    refused("ENOSPC", connect("other").pwrite, noise(2 * M, 7), 0)
"#;

fn finds_nothing(parameters: &[&str], code: &str) {
    let base = Base::new(&noise(1, 3_000_001));
    let directory = scratch();
    let stats = directory.path().join("stats");
    let parameter = format!("cow-stats={}", stats.display());
    // Blocks so small that the map has more than a leaf.
    let common = ["file", base.path(), "cow-block-size=512", &parameter];
    for _ in 0..2 {
        // The second time, what is kept is resumed.
        let server = Setup::new()
            .under(&VALGRIND)
            .start(&[&common, parameters].concat());
        server.nbdsh(code);
        await_disconnects(&stats);
        // The memory of an overlay that has gone away is not freed before another one is
        // made, and to memcheck what it pointed to is not lost before that.
        server.nbdsh("h.pwrite(b'x', 0)");
        await_disconnects(&stats);
        let said = server.stop_and_tell();
        assert!(!said.contains("=="), "valgrind said: {said}");
    }
}

#[test]
#[ignore = "make checkers runs it"]
fn memcheck_finds_nothing_in_temporary_overlays() {
    let copies = ["cow-on-cache=true", "cow-on-read=true"];
    let code = [ALL_OPERATIONS, OVER_THE_LIMIT].concat();
    finds_nothing(&[&copies[..], &["cow-limit=3500K"]].concat(), &code);
}

/// Its overlay, with the block map, goes away while nbdkit runs: others live as long as it
/// does.
#[test]
#[ignore = "make checkers runs it"]
fn memcheck_finds_nothing_in_an_overlay_of_one_connection() {
    let code = ALL_OPERATIONS.replace("[h, connect()]", "[h]") + OVER_THE_LIMIT;
    finds_nothing(&["cow-scope=connection", "cow-limit=3500K"], &code);
}

#[test]
#[ignore = "make checkers runs it"]
fn memcheck_finds_nothing_in_a_kept_overlay() {
    let directory = scratch();
    let image = format!("cow-overlay={}", directory.path().join("i.qcow2").display());
    let parameters = [&image, "cow-on-read=true", "cow-limit=4M"];
    finds_nothing(&parameters, ALL_OPERATIONS);
}
