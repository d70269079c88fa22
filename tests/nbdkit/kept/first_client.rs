//! The layer below is opened for a client, and never before: some layers count that as
//! a client, and which export is the default is not known yet.

use std::fs;

use super::small::{
    SIZE, base, expected, kept_in, read_by_qemu, serve, two_exports, write_through,
};
use super::{assert_says, attempt, check, text};
use crate::harness::{Base, Server, Setup, noise, scratch};

#[test]
fn a_filter_that_ends_with_the_last_client_waits_for_the_first() {
    let base = base();
    let kept = kept_in(base.directory(), "diff.qcow2");
    let setup = || Setup::new().below("exitlast");
    for _start in ["made", "resumed"] {
        let server = setup().start(&["file", base.path(), &kept]);
        write_through(&server.uri());
        assert_eq!(server.end_by_itself(), "");
        assert!(read_by_qemu(base.directory(), "diff.qcow2") == expected());
    }
}

/// A plugin of two exports, of which the default one, `one`, is the base.
fn two_sizes<'a>(base: &'a Base, kept: &'a str) -> [&'a str; 10] {
    [
        "eval",
        "config=exit 0",
        "default_export=echo one",
        "list_exports=echo NAMES; echo one; echo two",
        "open=echo \"$3\"",
        "get_size=if [ \"$2\" = one ]; then echo 300000; else echo 400000; fi",
        "pread=dd if=\"$FILE\" bs=1 skip=$4 count=$3 2>/dev/null",
        base.path(),
        kept,
        "cow-serialize=true",
    ]
}

#[test]
fn a_connection_that_does_not_fit_is_refused_and_the_next_is_served() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    let kept = kept_in(base.directory(), "diff.qcow2");
    let file = format!("file={}", base.path());
    let plugin = two_sizes(&base, &kept).map(|word| if word == base.path() { &file } else { word });
    let setup = Setup::new().env("FILE", base.path());
    let server = setup.start(&plugin);
    assert!(!overlay.exists(), "made before there was a client");
    // Not by a client either that has not the disk it is for.
    let refused = attempt(&["nbdinfo", &server.export_uri("two")]);
    assert!(!refused.status.success(), "{}", refused.stdout);
    assert_eq!(
        fs::read_dir(base.directory()).unwrap().count(),
        1,
        "a refused connection left something"
    );
    write_through(&server.uri());
    server.python(
        r#"
        refused("ENOENT", connect, "two")
        for export in ["", "one"]:
            same(connect(export).pread(5000, 100_000), b"\x07" * 5000)
        "#,
    );
    assert_says(
        &server.stop_and_tell(),
        &["400000", "300000", text(&overlay)],
    );
    assert!(read_by_qemu(base.directory(), "diff.qcow2") == expected());

    // And so it goes with an image that exists.
    let server = setup.start(&plugin);
    server.python(
        r#"
        refused("ENOENT", connect, "two")
        same(connect().pread(5000, 100_000), b"\x07" * 5000)
        "#,
    );
    server.stop();
    assert!(read_by_qemu(base.directory(), "diff.qcow2") == expected());
}

/// Neither the claim of an export nor a count of connections.
#[test]
fn a_refused_connection_leaves_nothing() {
    let directory = scratch();
    let [dir, _] = two_exports(directory.path());
    fs::write(directory.path().join("files/small"), noise(3, SIZE / 2)).unwrap();
    let overlay = directory.path().join("diff.qcow2");
    let kept = kept_in(directory.path(), "diff.qcow2");
    let plugin = [
        "file",
        &dir,
        &kept,
        r#"cow-backing=json:{"driver":"raw","file":{"driver":"null-co","size":300000}}"#,
    ];
    let server = Server::start(&plugin);
    server.python(
        r#"
        h = connect("one")
        for _ in range(20):
            refused("ENOENT", connect, "small")
            refused("ENOENT", connect, "two")
        h.shutdown()
        # Nothing was written, so that another may have the image now. (nbdkit may take
        # a moment to see that the first has gone.)
        for _ in range(1000):
            try:
                other = connect("two")
                break
            except nbd.Error:
                time.sleep(0.01)
        other.pwrite(b"mine", 5000)
        "#,
    );
    server.stop();
    check(&overlay);
    let server = Server::start(&plugin);
    server
        .python("same(connect('two').pread(4, 5000), b'mine'); refused('ENOENT', connect, 'one')");
    server.stop();
}

/// Without a client nothing is made; what can be known of the parameters is told.
#[test]
fn without_a_client_there_is_no_image() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    serve(base.path(), text(&overlay)).stop();
    assert_eq!(fs::read_dir(base.directory()).unwrap().count(), 1);
}
