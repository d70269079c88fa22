//! `cow-stats`: every figure against requests that are known, and the file as other
//! programs find it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::harness::command::{LIMIT, eventually};
use crate::harness::mount::Mount;
use crate::harness::{Base, Daemon, Server, Setup, noise, scratch};

fn read(path: &Path) -> Value {
    let text = fs::read_to_string(path).expect("the file of cow-stats");
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e} in {text}"))
}

/// Waits until the document is as `is_right` wants it.
fn await_document(path: &Path, is_right: impl Fn(&Value) -> bool) -> Value {
    let mut document = Value::Null;
    let in_time = eventually(LIMIT, || {
        // There is none before nbdkit has started.
        document = if path.exists() {
            read(path)
        } else {
            Value::Null
        };
        is_right(&document)
    });
    assert!(in_time, "the document stays as {document:#}");
    document
}

/// Waits for the one that is written when a client has disconnected and no other is there.
fn await_disconnect(path: &Path, connections: u64) -> Value {
    let connections = json!({"now": 0, "ever": connections});
    await_document(path, |document| {
        document["total"]["connections"] == connections
    })
}

/// Waits until the clients that there were have gone.
pub fn await_disconnects(path: &Path) {
    await_document(path, |document| {
        let connections = &document["total"]["connections"];
        connections["now"] == 0 && connections["ever"] != 0
    });
}

/// A directory for the file, and that file's path.
fn place() -> (tempfile::TempDir, PathBuf, String) {
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let parameter = format!("cow-stats={}", path.display());
    (directory, path, parameter)
}

/// What there is of an export that was used in no way.
fn nothing() -> Value {
    json!({
        "connections": {"now": 0, "ever": 0},
        "requests": {
            "read": {"count": 0, "bytes": 0},
            "write": {"count": 0, "bytes": 0},
            "trim": {"count": 0, "bytes": 0},
            "zero": {"count": 0, "bytes": 0},
            "flush": {"count": 0},
            "cache": {"count": 0, "bytes": 0},
            "extents": {"count": 0, "bytes": 0},
        },
        "base": {"reads": 0, "read_bytes": 0},
        "read_modify_writes": 0,
        "copied_blocks": {"cow_on_read": 0, "cow_on_cache": 0},
        "overlay": {"data_bytes": 0, "waiting_bytes": 0, "given_back_bytes": 0},
        "flushes": {"asked": 0, "done": 0, "shared": 0},
        "errors": {},
    })
}

/// [`nothing`], but for these: the path of a figure, and what it is.
fn only(changes: &[(&str, Value)]) -> Value {
    let mut figures = nothing();
    for (pointer, value) in changes {
        let place = figures.pointer_mut(pointer);
        *place.unwrap_or_else(|| panic!("no {pointer}")) = value.clone();
    }
    figures
}

/// Those figures of an export or of the total that [`nothing`] has. What the map takes
/// depends on how it is built.
fn comparable(figures: &Value) -> Value {
    let mut figures = figures.as_object().expect("figures").clone();
    let overlay = figures["overlay"].as_object_mut().expect("an object");
    assert!(overlay.remove("map_bytes").expect("a figure").is_u64());
    for key in ["name", "size", "block_size"] {
        figures.remove(key);
    }
    Value::Object(figures)
}

fn export<'a>(document: &'a Value, name: &str) -> &'a Value {
    let exports = document["exports"].as_array().expect("exports");
    let mut named = exports.iter().filter(|export| export["name"] == name);
    let export = named
        .next()
        .unwrap_or_else(|| panic!("{name:?} in {document:#}"));
    assert!(named.next().is_none(), "two of {name:?} in {document:#}");
    export
}

#[test]
fn each_figure_is_that_of_the_requests() {
    let (_directory, path, parameter) = place();
    let disks = scratch();
    for name in ["a", "b"] {
        fs::write(disks.path().join(name), noise(1, 1 << 20)).unwrap();
    }
    let dir = format!("dir={}", disks.path().display());
    let server = Server::start(&["file", &dir, "cow-block-size=4096", &parameter]);
    let document = await_document(&path, Value::is_object);
    assert_eq!(document["exports"], json!([]));
    assert_eq!(comparable(&document["total"]), nothing());
    assert_eq!(document["pid"], server.pid());
    assert_eq!(document["scope"], "export");
    assert_eq!(document["limit"], Value::Null);

    server.python(
        r#"
        a, also_a, b = connect("a"), connect("a"), connect("b")
        a.pwrite(b"1" * 8192, 0)
        a.pwrite(b"2" * 4096, 8192, FUA)
        also_a.pwrite(b"3" * 100, 20_000)  # a read-modify-write
        a.pwrite(b"4" * 100, 20_000)  # in place
        a.zero(8192, 0)
        a.trim(4096, 8192)
        a.pread(4096, 16384)
        a.pread(10_000, 500_000)
        a.flush()
        a.flush()
        a.cache(5000, 600_000)
        reply(a, 65536, 0)
        b.pread(512, 0)
        "#,
    );
    let document = await_document(&path, |document| {
        document["total"]["connections"] == json!({"now": 0, "ever": 3})
            && document["total"]["overlay"]["waiting_bytes"] == 0
    });
    let of_a = [
        ("/connections/ever", json!(2)),
        ("/requests/read", json!({"count": 2, "bytes": 14_096})),
        ("/requests/write", json!({"count": 4, "bytes": 12_488})),
        ("/requests/zero", json!({"count": 1, "bytes": 8192})),
        ("/requests/trim", json!({"count": 1, "bytes": 4096})),
        ("/requests/flush/count", json!(2)),
        ("/requests/cache", json!({"count": 1, "bytes": 5000})),
        ("/requests/extents", json!({"count": 1, "bytes": 65536})),
        ("/base", json!({"reads": 2, "read_bytes": 14_096})),
        ("/read_modify_writes", json!(1)),
        ("/overlay/data_bytes", json!(4096)),
        ("/overlay/given_back_bytes", json!(12_288)),
        ("/flushes/asked", json!(3)),
    ];
    let a = export(&document, "a");
    assert_eq!(comparable(a), only(&of_a));
    assert_eq!(a["size"], 1 << 20);
    assert_eq!(a["block_size"], 4096);
    assert!(a["overlay"]["map_bytes"].as_u64() > Some(0), "{a:#}");

    // Nothing was written to it: it is forgotten, and counts all the same.
    assert_eq!(document["exports"].as_array().unwrap().len(), 1);
    let of_both = [
        ("/connections/ever", json!(3)),
        ("/requests/read", json!({"count": 3, "bytes": 14_608})),
        ("/base", json!({"reads": 3, "read_bytes": 14_608})),
    ];
    let total = only(&[&of_a[..], &of_both].concat());
    assert_eq!(comparable(&document["total"]), total);
}

#[test]
fn exports_are_told_apart_while_they_are_used() {
    let (_directory, path, parameter) = place();
    let server = Server::start(&["memory", "1M", &parameter]);
    server.nbdsh_with(
        &[path.to_str().unwrap()],
        r#"
        import json
        others = [connect("other"), connect("other")]
        others[0].pwrite(b"1" * 512, 0)

        def document():
            return json.load(open(ARGS[0]))

        def seen():
            exports = document()["exports"]
            return [(e["name"], e["connections"]["now"], e["requests"]["write"]["count"])
                    for e in exports]

        # No client disconnects: this is what is written every second.
        expected = [("", 1, 0), ("other", 2, 1)]
        deadline = time.monotonic() + 60
        while seen() != expected and time.monotonic() < deadline:
            time.sleep(0.05)
        assert seen() == expected, seen()
        assert document()["total"]["connections"] == {"now": 3, "ever": 3}
        "#,
    );
}

#[test]
fn an_overlay_for_each_connection_counts_when_it_is_gone() {
    let (_directory, path, parameter) = place();
    let base = Base::new(&noise(2, 1 << 20));
    let server = Server::start(&["file", base.path(), "cow-scope=connection", &parameter]);
    server.nbdsh(
        r#"
        h.pwrite(b"1" * 4096, 0)
        c = connect()
        c.pwrite(b"2" * 8192, 0)
        c.pread(4096, 0)
        "#,
    );
    let document = await_disconnect(&path, 2);
    assert_eq!(document["scope"], "connection");
    assert_eq!(document["exports"], json!([]));
    let total = only(&[
        ("/connections/ever", json!(2)),
        ("/requests/write", json!({"count": 2, "bytes": 12_288})),
        ("/requests/read", json!({"count": 1, "bytes": 4096})),
    ]);
    assert_eq!(comparable(&document["total"]), total);
}

#[test]
fn copies_of_the_base_are_counted_in_blocks() {
    let (_directory, path, parameter) = place();
    let base = Base::new(&noise(3, 1 << 20));
    let server = Server::start(&[
        "file",
        base.path(),
        "cow-block-size=4096",
        "cow-on-read=true",
        "cow-on-cache=true",
        &parameter,
    ]);
    server.nbdsh("h.pread(8192, 0); h.pread(100, 4000); h.cache(100, 9000); h.cache(8192, 65536)");
    let document = await_disconnect(&path, 1);
    let total = only(&[
        ("/connections/ever", json!(1)),
        ("/requests/read", json!({"count": 2, "bytes": 8292})),
        ("/requests/cache", json!({"count": 2, "bytes": 8292})),
        ("/base", json!({"reads": 3, "read_bytes": 20_480})),
        (
            "/copied_blocks",
            json!({"cow_on_read": 2, "cow_on_cache": 3}),
        ),
        ("/overlay/data_bytes", json!(20_480)),
    ]);
    assert_eq!(comparable(&document["total"]), total);
}

#[test]
fn flushes_of_a_kept_overlay_that_share_one_are_counted() {
    let (directory, path, parameter) = place();
    let base = Base::new(&noise(4, 1 << 20));
    let overlay = format!("cow-overlay={}", directory.path().join("o.qcow2").display());
    let server = Server::start(&["file", base.path(), &overlay, &parameter]);
    server.nbdsh(
        r#"
        flight = Flight([h], 16)
        for turn in range(200):
            flight.write(h, b"1" * 4096, turn * 4096)
            flight.add(h, h.aio_flush())
        flight.finish()
        "#,
    );
    let document = await_disconnect(&path, 1);
    let flushes = |document: &Value, key| document["total"]["flushes"][key].as_u64().unwrap();
    let (asked, done) = (flushes(&document, "asked"), flushes(&document, "done"));
    let shared = flushes(&document, "shared");
    assert_eq!(asked, 200);
    assert_eq!(done + shared, asked);
    assert!(done > 0 && shared > 0, "{done} done, {shared} shared");
    server.stop();
    let document = read(&path);
    assert_eq!(document["running"], false);
    assert!(flushes(&document, "done") > done, "the last flush");
}

/// The image stays when the export is forgotten because nothing was written to it.
#[test]
fn an_export_that_is_forgotten_is_counted_once() {
    let (directory, path, parameter) = place();
    let base = Base::new(&noise(6, 1 << 20));
    let overlay = format!("cow-overlay={}", directory.path().join("o.qcow2").display());
    let server = Server::start(&["file", base.path(), &overlay, &parameter]);
    for connection in 1..=3 {
        server.nbdsh("h.pread(4096, 0); h.flush()");
        let document = await_disconnect(&path, connection);
        assert_eq!(document["exports"], json!([]));
        let total = &document["total"];
        let read = json!({"count": connection, "bytes": 4096 * connection});
        assert_eq!(total["requests"]["read"], read);
        let flushes = json!({"asked": connection, "done": connection, "shared": 0});
        assert_eq!(total["flushes"], flushes);
    }
}

/// By the errno of the failure, also those that the log does not have.
#[test]
fn errors_are_counted_by_kind() {
    let (_directory, path, parameter) = place();
    let mount = Mount::tmpfs("1536K");
    let server = Setup::new().tmpdir(mount.path()).below("error").start(&[
        "memory",
        "64M",
        "error-pread=EPERM",
        "error-pread-rate=100%",
        &parameter,
    ]);
    server.nbdsh(
        r#"
        for _ in range(3):
            refused("EPERM", h.pread, 512, 0)
        h.pwrite(b"1" * M, 0)
        for _ in range(50):
            refused("ENOSPC", h.pwrite, b"1" * M, M)
        "#,
    );
    let document = await_disconnect(&path, 1);
    let errors = json!({"read": {"EPERM": 3}, "write": {"ENOSPC": 50}});
    assert_eq!(document["total"]["errors"], errors);
    assert_eq!(export(&document, "")["errors"], errors);
}

/// Who reads it meets one document or the next.
#[test]
fn the_file_is_replaced_as_a_whole() {
    let (_directory, path, parameter) = place();
    let server = Server::start(&["null", "1M", &parameter]);
    await_document(&path, Value::is_object);
    let mut inodes = Vec::new();
    thread::scope(|scope| {
        let clients = scope.spawn(|| {
            server.python("for _ in range(100): connect().shutdown(); time.sleep(0.01)");
        });
        while !clients.is_finished() {
            assert_eq!(read(&path)["cow"]["package"], "nbdkit-cow-filter");
            inodes.push(fs::metadata(&path).unwrap().ino());
        }
    });
    assert_eq!(await_disconnect(&path, 100)["running"], true);
    inodes.dedup();
    assert!(inodes.len() > 3, "{inodes:?}");
}

#[test]
fn nothing_is_written_while_nothing_changes() {
    let (_directory, path, parameter) = place();
    let server = Server::start(&["null", "1M", &parameter]);
    server.nbdsh_with(
        &[path.to_str().unwrap()],
        r#"
        import json
        h.pwrite(b"1" * 512, 0)
        h.trim(M, 0)
        while json.load(open(ARGS[0]))["total"]["requests"]["trim"]["count"] != 1:
            time.sleep(0.05)
        # What was given back behind the request may be news.
        time.sleep(1.2)
        before = os.stat(ARGS[0])
        time.sleep(2.2)
        after = os.stat(ARGS[0])
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
        "#,
    );
}

#[test]
fn anybody_who_may_look_into_the_directory_can_read_it() {
    let (directory, path, parameter) = place();
    let umask = ["sh", "-c", "umask 077 && exec \"$@\"", "sh"];
    let server = Setup::new()
        .under(&umask)
        .start(&["null", "1M", &parameter]);
    server.nbdsh("h.pread(1, 0)");
    await_disconnect(&path, 1);
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o644);
    server.stop();
    let names = fs::read_dir(directory.path()).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["stats.json"]);
}

#[test]
fn a_relative_path_is_that_of_the_directory_where_nbdkit_was_started() {
    let (directory, path, _) = place();
    let setup = Setup::new();
    let plugin = ["null", "1M", "cow-stats=./stats.json"];
    let tmpdir = scratch();
    let daemon = Daemon::start(&setup, &plugin, tmpdir.path(), directory.path());
    let document = await_document(&path, Value::is_object);
    assert_eq!(
        document["pid"],
        daemon.pid(),
        "not of the process that has forked"
    );
    crate::harness::run(&["nbdinfo", "--size", &daemon.uri()]);
    await_disconnect(&path, 1);
    drop(daemon);
    assert_eq!(read(&path)["running"], false);
}

#[test]
fn a_file_that_can_not_be_is_refused_at_start() {
    let (directory, _, _) = place();
    let refused = |path: &Path, reason: &str| {
        let parameter = format!("cow-stats={}", path.display());
        let error = Setup::new().error(&["null", "1M", &parameter]);
        for word in [&*parameter, reason] {
            assert!(error.contains(word), "{word:?} in {error}");
        }
    };
    refused(
        &directory.path().join("missing/file"),
        "No such file or directory",
    );
    let file = directory.path().join("disk.img");
    fs::write(&file, "a disk").unwrap();
    refused(&file.join("file"), "Not a directory");
    refused(&file, "a file of another kind");
    assert_eq!(fs::read(&file).unwrap(), b"a disk");
    refused(directory.path(), "not a regular file");
    let link = directory.path().join("link");
    symlink("/dev/null", &link).unwrap();
    refused(&link, "not a regular file");
    let read_only = Mount::tmpfs("1M");
    read_only.make_read_only();
    refused(&read_only.path().join("file"), "Read-only file system");
    let full = Mount::tmpfs("1M");
    full.fill();
    refused(&full.path().join("file"), "No space left on device");
    let left = fs::read_dir(full.path()).unwrap();
    assert_eq!(left.count(), 2, "more than what fills it");

    let both = directory.path().join("both");
    let (stats, overlay) = ("cow-stats", "cow-overlay");
    let [stats, overlay] = [stats, overlay].map(|key| format!("{key}={}", both.display()));
    let error = Setup::new().error(&["null", "1M", &stats, &overlay, "cow-backing=nbd:x"]);
    assert!(error.contains("must be two files"), "{error}");
    assert!(!both.exists());
}

/// An empty file is what mktemp(1) leaves, or a crash of the machine.
#[test]
fn an_empty_file_and_an_older_document_are_replaced() {
    let (directory, path, parameter) = place();
    fs::write(&path, "").unwrap();
    for other in ["stats.json-abcdef", "x.json-abcdef", "stats.json-kept"] {
        fs::write(directory.path().join(format!(".cow-stats-{other}")), "{").unwrap();
    }
    let server = Server::start(&["null", "1M", &parameter]);
    let first = await_document(&path, Value::is_object)["pid"].clone();
    server.kill();
    assert_eq!(read(&path)["running"], true, "it was not asked");
    let server = Server::start(&["null", "1M", &parameter]);
    let second = await_document(&path, |document| document["pid"] != first);
    assert_eq!(second["pid"], server.pid());
    server.stop();
    // What a killed nbdkit has left for this file, and no other.
    let names = fs::read_dir(directory.path()).unwrap();
    let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    let expected = [
        ".cow-stats-stats.json-kept",
        ".cow-stats-x.json-abcdef",
        "stats.json",
    ];
    assert_eq!(names, expected);
}

/// It is told once, and is no trouble of the clients.
#[test]
fn a_file_that_can_not_be_written_later_is_told_once() {
    let (mount, base) = (Mount::tmpfs("1M"), Base::new(&noise(5, 1 << 20)));
    let path = mount.path().join("stats.json");
    let parameter = format!("cow-stats={}", path.display());
    let server = Server::start(&["file", base.path(), &parameter]);
    await_document(&path, Value::is_object);
    mount.fill();
    for connection in 0..3 {
        server.nbdsh_with(
            &[&connection.to_string()],
            "h.pwrite(b'1' * 4096, int(ARGS[0]) * 4096)",
        );
    }
    let told = || server.stderr().matches("cow-stats=").count();
    assert!(eventually(LIMIT, || told() > 0), "not told");
    // It is tried again when the clients have gone, too: by a file beside it.
    let gone = SystemTime::now();
    let last_try = || fs::metadata(mount.path()).unwrap().modified().unwrap();
    let is_tried = || last_try() > gone + Duration::from_secs(2);
    assert!(eventually(LIMIT, is_tried), "not tried again");
    assert_eq!(
        read(&path)["total"]["connections"]["ever"],
        0,
        "the last that was written"
    );
    // With space again it goes on.
    mount.make_room();
    let document = await_disconnect(&path, 3);
    assert_eq!(document["total"]["requests"]["write"]["count"], 3);
    let said = server.stop_and_tell();
    assert_eq!(said.matches("cow-stats=").count(), 1, "{said}");
    let warning = format!("warning: {parameter} can't be written: No space left on device");
    assert!(said.contains(&warning), "{said}");
}

/// nbdkit becomes another user after it has looked at the directory.
#[test]
fn with_u_the_file_is_that_user_s() {
    let (directory, path, parameter) = place();
    let nobody = 65534;
    let said_by_nobody = || {
        // Without the right to pass over permissions.
        let ended = Setup::new()
            .under(&["setpriv", "--bounding-set=-dac_override,-dac_read_search"])
            .option("-unobody")
            .without_tmpdir()
            .run(
                &["null", "1M", &parameter],
                "for i in 1 2; do qemu-io -f raw -c 'write -P 7 0 4k' $uri || exit; done",
            );
        assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
        ended.stderr
    };
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    assert_eq!(said_by_nobody(), "");
    assert_eq!(fs::metadata(&path).unwrap().uid(), nobody);
    assert_eq!(read(&path)["total"]["requests"]["write"]["count"], 2);

    fs::remove_file(&path).unwrap();
    chown(directory.path(), Some(0), Some(0)).unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let said = said_by_nobody();
    let warning = format!("warning: {parameter} can't be written: Permission denied");
    assert_eq!(said.matches("cow-stats").count(), 1, "{said}");
    assert!(said.contains(&warning), "{said}");
    assert!(!path.exists());
}

/// No thread can be had: who disconnects writes the document.
#[test]
fn without_a_thread_each_disconnect_writes_it() {
    let (_directory, path, parameter) = place();
    // The first three that its main thread starts are those of the filter.
    let inject = "--inject=clone3:error=EAGAIN:when=1..3";
    let server = Setup::new()
        .under(&["strace", "-D", "-o", "/dev/null", inject])
        .start(&["null", "1M", &parameter]);
    let connections = |now, ever| json!({"now": now, "ever": ever});
    for number in 1..=2 {
        server.nbdsh("h.pread(1, 0)");
        await_disconnect(&path, number);
    }
    server.nbdsh_with(
        &[path.to_str().unwrap()],
        r#"
        import json
        time.sleep(1.5)
        assert json.load(open(ARGS[0]))["total"]["connections"] == {"now": 0, "ever": 2}
        "#,
    );
    await_disconnect(&path, 3);
    let said = server.stop_and_tell();
    assert!(said.contains("no thread to write cow-stats"), "{said}");
    let document = read(&path);
    assert_eq!(document["running"], false);
    assert_eq!(document["total"]["connections"], connections(0, 3));
}

/// With a plugin that has every export of which a client thinks.
#[test]
fn names_that_a_client_makes_up_do_not_fill_the_file() {
    let (_directory, path, parameter) = place();
    let server = Server::start(&["null", "1M", &parameter]);
    server.python(
        r#"
        for i in range(1050):
            one = connect(f"{i:04}" + "\x01" * 4000)
            one.trim(M, 0)
            one.shutdown()
        "#,
    );
    let document = await_disconnect(&path, 1050);
    let exports = document["exports"].as_array().expect("an array");
    assert_eq!(exports.len(), 1000);
    assert_eq!(document["exports_left_out"], 50);
    assert_eq!(document["total"]["requests"]["trim"]["count"], 1050);
    let name = exports[999]["name"].as_str().expect("a name");
    assert_eq!(name, format!("0999{}", "\u{1}".repeat(251)));
    let length = fs::metadata(&path).expect("the file").len();
    assert!(length < 6 << 20, "{length} bytes");
}

#[test]
fn a_limit_is_told_with_what_counts_for_it() {
    let (_directory, path, parameter) = place();
    let server = Server::start(&[
        "memory",
        "1M",
        "cow-limit=64K",
        "cow-block-size=4096",
        &parameter,
    ]);
    server.python("connect().pwrite(b'1' * 8192, 0)");
    let document = await_disconnect(&path, 1);
    assert_eq!(document["limit"]["bytes"], 64 << 10);
    let map_bytes = document["total"]["overlay"]["map_bytes"].as_u64();
    // 16 KiB are for the overlay itself.
    let used_bytes = map_bytes.map(|map| map + 8192 + (16 << 10));
    assert_eq!(document["limit"]["used_bytes"].as_u64(), used_bytes);
}
