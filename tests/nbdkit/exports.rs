//! Which overlay a connection gets, and over what.

use std::fs;

use crate::harness::{Base, Server, noise, run, scratch};

#[test]
fn each_export_has_its_own_overlay_and_its_own_size() {
    let directory = scratch();
    let files = [("small", 5_001), ("large", 300_000)];
    for (name, size) in files {
        fs::write(directory.path().join(name), noise(size as u64, size)).unwrap();
    }
    let dir = directory.path().to_str().unwrap();
    let server = Server::start(&["file", &format!("dir={dir}")]);
    server.python(
        r#"
        small, large = connect("small"), connect("large")
        assert (small.get_size(), large.get_size()) == (5001, 300_000)
        expected = {"small": read(small), "large": read(large)}
        # The same place in both, and the end that only one of them has.
        for name, c, start in [("small", small, 100), ("large", large, 100),
                               ("small", small, 4900), ("large", large, 299_900)]:
            data = noise(100, name + str(start))
            c.pwrite(data, start)
            expected[name][start:start + 100] = data
        small.trim(4096, 0)
        expected["small"][:4096] = bytes(4096)
        for name in ["small", "large"]:
            same(read(connect(name)), expected[name])
        Model([small, connect("small")], expected["small"], 1).run(150).check()
        Model([large, connect("large")], expected["large"], 2).run(150).check()
        "#,
    );
    server.stop();
    for (name, size) in files {
        let left = fs::read(directory.path().join(name)).unwrap();
        assert!(left == noise(size as u64, size), "{name} changed");
    }
}

#[test]
fn an_overlay_outlives_the_connections_that_wrote_it() {
    let base = Base::new(&noise(1, 100_000));
    let server = Server::start(&["file", base.path()]);
    server.nbdsh("h.pwrite(b'kept', 5000); h.shutdown()");
    server.nbdsh("same(h.pread(4, 5000), b'kept')");
}

/// Which file a name stands for is the plugin's secret: another name may be another disk.
#[test]
fn each_export_name_has_its_own_overlay() {
    let base = Base::new(&noise(8, 100_000));
    let server = Server::start(&["file", base.path()]);
    server.python(
        r#"
        one, two = connect("one"), connect("two")
        before = two.pread(4, 5000)
        one.pwrite(b"mine", 5000)
        same(two.pread(4, 5000), before)
        same(connect("one").pread(4, 5000), b"mine")
        "#,
    );
}

#[test]
fn the_default_export_is_the_same_disk_by_either_name() {
    let server = Server::start(&[
        "eval",
        "default_export=echo main",
        "open=echo handle",
        "get_size=echo 65536",
        "pread=head -c $3 /dev/zero",
    ]);
    server.python(
        r#"
        connect("").pwrite(b"mine", 5000)
        same(connect("main").pread(4, 5000), b"mine")
        same(connect("other").pread(4, 5000), bytes(4))
        "#,
    );
}

#[test]
fn the_scope_export_is_the_default_under_its_own_name() {
    let base = Base::new(&noise(2, 100_000));
    let server = Server::start(&["file", base.path(), "cow-scope=export"]);
    server.nbdsh("h.pwrite(b'kept', 5000); same(connect().pread(4, 5000), b'kept')");
}

#[test]
fn with_the_scope_connection_each_connection_starts_from_the_base() {
    let base = Base::new(&noise(3, 100_000));
    let server = Server::start(&["file", base.path(), "cow-scope=connection"]);
    server.nbdsh_with(
        &[base.path()],
        r#"
        base = open(ARGS[0], "rb").read()
        other = connect()
        assert not h.can_multi_conn()
        h.pwrite(b"mine", 5000)
        h.trim(8192, 16384)
        same(read(other), base)
        other.pwrite(b"theirs", 5000)
        expected = bytearray(base)
        expected[5000:5004] = b"mine"
        expected[16384:24576] = bytes(8192)
        same(read(h), expected)
        h.shutdown()
        same(read(connect()), base)
        same(other.pread(6, 5000), b"theirs")
        Model([connect()], base, 1).run(100).check()
        "#,
    );
}

#[test]
fn the_overlay_of_a_connection_goes_with_it() {
    let base = Base::new(&noise(4, 1 << 20));
    let server = Server::start(&["file", base.path(), "cow-scope=connection"]);
    let open = server.overlay_files().len();
    for _ in 0..5 {
        server.nbdsh("h.pwrite(noise(M, 1), 0); connect().pwrite(noise(M, 1), 0)");
    }
    // The clients are gone a moment before nbdkit has closed their handles.
    let closed = crate::harness::command::eventually(crate::harness::command::LIMIT, || {
        server.overlay_files().len() <= open
    });
    assert!(closed, "overlays of connections that are gone stay open");
}

/// A base that grew has no overlay that fits it: better no service than a wrong disk.
#[test]
fn a_base_that_changed_its_size_is_refused_to_new_connections_only() {
    let mut base = Base::new(&noise(5, 100_000));
    let server = Server::start(&["file", base.path()]);
    let uri = server.uri();
    server.nbdsh("h.pwrite(b'kept', 5000)");
    base.grow_to(200_000);
    let mut client = crate::harness::command::command("nbdinfo");
    let refused = crate::harness::command::outcome(client.arg(&uri));
    assert!(!refused.status.success(), "served: {}", refused.stdout);
    let said = server.stderr();
    let error = said.lines().find(|line| line.contains("error: "));
    let error = error.unwrap_or_else(|| panic!("no error message in {said:?}"));
    assert!(
        error.contains("100000") && error.contains("200000"),
        "both sizes in {error:?}"
    );
    base.grow_to(100_000);
    assert_eq!(run(&["nbdinfo", "--size", &uri]).trim(), "100000");
    server.nbdsh("same(h.pread(4, 5000), b'kept')");
}

#[test]
fn a_connection_from_before_the_base_grew_goes_on() {
    let mut base = Base::new(&noise(6, 100_000));
    let server = Server::start(&["file", base.path()]);
    let grow = [base.path()];
    server.nbdsh_with(
        &grow,
        r#"
        expected = read(h)
        os.truncate(ARGS[0], 200_000)
        try:
            connect()
            raise AssertionError("a base of another size was served")
        except nbd.Error:
            pass
        h.pwrite(b"still", 99_000)
        expected[99_000:99_005] = b"still"
        assert h.get_size() == 100_000
        same(read(h), expected)
        "#,
    );
    base.grow_to(200_000);
}

#[test]
fn the_scope_connection_serves_a_base_at_the_size_it_has_now() {
    let mut base = Base::new(&noise(7, 100_000));
    let server = Server::start(&["file", base.path(), "cow-scope=connection"]);
    server.nbdsh("h.pwrite(b'x', 99_999)");
    base.grow_to(200_000);
    server.nbdsh("h.pwrite(b'x', 199_999); assert h.get_size() == 200_000");
}
