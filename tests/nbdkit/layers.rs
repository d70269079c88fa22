//! The library is loaded once, however often the command line names it.

use std::fs;

use crate::harness::setup::library;
use crate::harness::{Base, Server, Setup, noise, scratch};

/// What two layers would do to each other's overlay shows only in wrong bytes.
#[test]
fn a_second_layer_is_refused_at_start() {
    let base = Base::new(&noise(1, 100_000));
    let files = scratch();
    let overlay = files.path().join("diff.qcow2");
    let kept = format!("cow-overlay={}", overlay.display());
    for below in [
        &[library()][..],
        &["swab", library()],
        &[library(), library()],
    ] {
        let setup = below
            .iter()
            .fold(Setup::new(), |setup, filter| setup.below(filter));
        for plugin in [
            &["file", base.path()][..],
            &["file", base.path(), "cow-on-read=true"],
            &["file", base.path(), &kept],
            &["null", "size=1M"],
        ] {
            let error = setup.error(plugin);
            for word in ["--filter=cow", "once"] {
                assert!(error.contains(word), "{word:?} in {error:?}");
            }
        }
    }
    assert_eq!(fs::read_dir(files.path()).unwrap().count(), 0);
}

#[test]
fn what_needs_no_layer_to_work_takes_any_number_of_them() {
    let setup = || Setup::new().below(library()).below("swab").below(library());
    for option in ["--help", "--version", "--dump-plugin"] {
        let shown = setup().option(option).output(&["null"]);
        assert!(shown.status.success(), "{option}: {}", shown.stderr);
        assert!(shown.stdout.contains("null"), "{option}: {}", shown.stdout);
    }
}

/// As the manual has it for who keeps a clean state to go back to.
#[test]
fn an_overlay_can_lie_over_that_of_another_nbdkit() {
    let base = Base::new(&noise(5, 300_001));
    let lower = Server::start(&["file", base.path()]);
    lower.nbdsh("h.pwrite(b'lower', 5000)");
    let upper = Server::start(&["nbd", &format!("uri={}", lower.uri())]);
    upper.nbdsh(
        "same(h.pread(5, 5000), b'lower'); Model([h, connect()], read(h), 1).run(150).check()",
    );
    upper.stop();
    lower.nbdsh_with(
        &[base.path()],
        r#"
        expected = bytearray(open(ARGS[0], "rb").read())
        expected[5000:5005] = b"lower"
        same(read(h), expected)
        "#,
    );
}
