//! nbdkit with the library under valgrind's memcheck: no error, and nothing is lost.
//!
//! `make checkers` runs this: it takes long, and needs valgrind.

use crate::harness::{Base, Setup, noise, scratch};

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
/// that the model takes for some; extents and cache; requests that fail; a flush.
const ALL_OPERATIONS: &str = r#"
    Model([h, connect()], read(h), 1).run(80).check()
    fly_together(neighbours([h, connect()], read(h), 4, 5), 20)
    h.cache(M, 5)
    extents(h)
    refused("EINVAL", h.pread, 512, h.get_size())
    h.flush()
"#;

fn finds_nothing(parameters: &[&str], code: &str) {
    let base = Base::new(&noise(1, 3_000_001));
    for _ in 0..2 {
        // The second time, what is kept is resumed.
        let server = Setup::new()
            .under(&VALGRIND)
            .start(&[&["file", base.path()], parameters].concat());
        server.nbdsh(code);
        let said = server.stop_and_tell();
        assert!(!said.contains("=="), "valgrind said: {said}");
    }
}

#[test]
#[ignore = "make checkers runs it"]
fn memcheck_finds_nothing_in_temporary_overlays() {
    finds_nothing(&["cow-on-cache=true", "cow-on-read=true"], ALL_OPERATIONS);
}

/// Its overlay, with the block map, goes away while nbdkit runs: others live as long as it
/// does.
#[test]
#[ignore = "make checkers runs it"]
fn memcheck_finds_nothing_in_an_overlay_of_one_connection() {
    let code = ALL_OPERATIONS.replace("[h, connect()]", "[h]");
    finds_nothing(&["cow-scope=connection"], &code);
}

#[test]
#[ignore = "make checkers runs it"]
fn memcheck_finds_nothing_in_a_kept_overlay() {
    let directory = scratch();
    let image = format!("cow-overlay={}", directory.path().join("i.qcow2").display());
    finds_nothing(&[&image, "cow-on-read=true"], ALL_OPERATIONS);
}
