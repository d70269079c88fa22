//! cow-limit, with real clients: it is kept beside many writers, and who is over it is
//! served all the same. What is exact to the byte is in tests/core/limit.rs.

use std::fs;

use crate::harness::command::success;
use crate::harness::{Base, Server, Setup, noise, run, scratch};

/// One of the leaves of the block map, and one of its nodes, in bytes.
const LEAF: u64 = 520;
const NODE: u64 = 4104;
/// What an overlay takes beside them.
const OVERLAY: u64 = 16 << 10;
const BLOCK: u64 = 4096;

/// What the tests have in common: clients beside each other.
const CLIENTS: &str = r#"
import threading

BLOCK = 4096

def together(count, work, export=""):
    """Runs work(connection, number) for `count` clients at once."""
    failures = []
    def run(number):
        try:
            work(connect(export), number)
        except BaseException as error:
            failures.append(error)
    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure

def put(connection, block, byte=7, count=1):
    """Whether there was room for it."""
    try:
        connection.pwrite(bytes([byte]) * (count * BLOCK), block * BLOCK)
    except nbd.Error as error:
        assert error.errno == "ENOSPC", error
        return False
    return True

def fill(connection, start):
    """Writes block after block until there is no room; how many."""
    block = start
    while put(connection, block):
        block += 1
    return block - start
"#;

fn null(size: &str, more: &[&str]) -> Server {
    let size = format!("size={size}");
    let plugin = [&["null", &size, "cow-block-size=4K"], more].concat();
    Setup::new().start(&plugin)
}

#[test]
fn what_16_writers_have_stored_is_the_limit_to_a_block() {
    const LIMIT: u64 = 16 << 20;
    let limit = format!("cow-limit={LIMIT}");
    let server = null("64M", &[&limit]);
    let said = server.nbdsh_after(
        CLIENTS,
        &[],
        r#"
        stored = [0] * 16
        def write(connection, number):
            start = number * 1024
            stored[number] = fill(connection, start)
            # What is stored can be overwritten, in whole and in part, and read.
            for i in range(min(stored[number], 50)):
                assert put(connection, start + i, 8)
                connection.pwrite(b"part", (start + i) * BLOCK + 9)
            assert connection.pread(4, start * BLOCK + 9) == b"part"
            # A single block fits nowhere.
            assert not put(connection, start + 1023)
        together(16, write)
        print(sum(stored))
        "#,
    );
    let blocks: u64 = said.trim().parse().expect("a number");
    // The disk has 8 leaves below one node.
    let taken = blocks * BLOCK + 8 * LEAF + NODE + OVERLAY;
    assert!(
        (LIMIT - BLOCK + 1..=LIMIT).contains(&taken),
        "{taken} of {LIMIT}"
    );
    // The file system may need some for itself.
    let on_disk = server.overlay_bytes();
    let data = blocks * BLOCK;
    assert!(
        (data..=data + (1 << 20)).contains(&on_disk),
        "{on_disk} on the disk, {data} of data"
    );
    let log = server.stop_and_tell();
    assert!(log.contains(&limit), "{log}");
}

#[test]
fn who_trims_before_he_writes_is_never_refused() {
    let limit = format!("cow-limit={}", OVERLAY + NODE + 8 * LEAF + 16 * BLOCK);
    null("64M", &[&limit]).nbdsh_after(
        CLIENTS,
        &[],
        r#"
        def write_and_trim(connection, number):
            for i in range(300):
                block = number * 1024 + i % 13
                assert put(connection, block), f"refused at {i}"
                connection.trim(BLOCK, block * BLOCK)
                assert connection.pread(BLOCK, block * BLOCK) == bytes(BLOCK)
        together(16, write_and_trim)
        "#,
    );
}

/// All of the map would take 50 GiB.
#[test]
fn a_client_that_trims_or_zeroes_parts_of_a_huge_disk_takes_no_more_memory() {
    for request in ["trim", "zero"] {
        let server = null("1E", &["cow-limit=4M"]);
        server.nbdsh_after(
            CLIENTS,
            &[request],
            r#"
            request = getattr(h, ARGS[0])
            done, refused = 0, 0
            # Every second block of 30 parts, then of one block of each part.
            places = [2 * i * BLOCK for i in range(30 * 1024)]
            places += [i * 8 * M + BLOCK for i in range(31, 12_000)]
            for at in places:
                try:
                    request(BLOCK, at)
                    done += 1
                except nbd.Error as error:
                    assert error.errno == "ENOSPC", error
                    refused += 1
            assert done > 30 * 1024 + 5000, done
            assert refused > 1000, refused
            # It is served all the same, and what needs no memory goes on.
            other = connect()
            assert other.pread(BLOCK, 0) == bytes(BLOCK)
            request(BLOCK, BLOCK)
            # Of whole parts.
            request(16 * M, 8 * M * 3)
            assert not put(other, 20_000 * 2048 * 100)
            "#,
        );
        let memory = server.memory();
        assert!(memory < 64 << 20, "{request}: {memory} bytes");
        server.stop();
    }
}

#[test]
fn exports_share_one_limit() {
    let directory = scratch();
    for name in ["one", "other"] {
        fs::write(directory.path().join(name), noise(1, 8 << 20)).expect("a disk");
    }
    let dir = format!("dir={}", directory.path().display());
    let plugin = ["file", &dir, "cow-block-size=4K", "cow-limit=4M"];
    let server = Setup::new().start(&plugin);
    // There is no default export.
    success(&mut server.script_after(
        CLIENTS,
        r#"
        one, other = connect("one"), connect("other")
        assert put(one, 0, count=512)
        stored = fill(other, 0)
        # 1 MiB of the limit is 256 blocks: of 1024, 512 are taken, and some is for the map.
        assert 500 < stored < 512, stored
        assert not put(one, 600)
        one.trim(100 * BLOCK, 0)
        assert put(other, 1000, count=100)
        assert not put(one, 600)
        "#,
        &[],
    ));
}

/// With a plugin that has every export of which a client thinks.
#[test]
fn a_client_that_makes_up_names_of_exports_takes_no_more_memory() {
    let server = null("64M", &["cow-limit=1M"]);
    server.nbdsh_after(
        CLIENTS,
        &[],
        r#"
        def trim_all(name):
            one = connect(name)
            try:
                one.trim(64 * M, 0)
                return True
            except nbd.Error as error:
                assert error.errno == "ENOSPC", error
                assert one.pread(BLOCK, 0) == bytes(BLOCK)
                return False
            finally:
                one.shutdown()
        trimmed = [trim_all("x" * 4000 + str(i)) for i in range(200)]
        assert trimmed == [True] * 64 + [False] * 136, sum(trimmed)
        # Who was there before is served.
        assert trim_all("x" * 4000 + "0")
        "#,
    );
    server.stop();
}

/// Each export to which something is written has a file.
#[test]
fn a_client_that_writes_to_many_exports_leaves_files_for_others() {
    let setup = Setup::new().under(&["prlimit", "--nofile=160"]);
    let server = setup.start(&["null", "size=64M", "cow-block-size=4K"]);
    server.nbdsh_after(
        CLIENTS,
        &[],
        r#"
        def write(name):
            one = connect(name)
            stored = put(one, 0)
            one.shutdown()
            return stored
        stored = [write(str(i)) for i in range(200)]
        # How many connections are open at a time differs by one or two.
        assert 100 < sum(stored) < 130, stored
        # An export without a file is read, and one with a file is written to.
        others = [connect("0") for i in range(8)]
        for other in others:
            assert put(other, 1)
        assert connect("another").pread(BLOCK, 0) == bytes(BLOCK)
        "#,
    );
    let log = server.stop_and_tell();
    assert!(log.contains("ulimit -n"), "{log}");

    // Where each connection has a file of its own, none is left to others: all are used up.
    let server = null("64M", &["cow-scope=connection"]);
    server.nbdsh_after(
        CLIENTS,
        &[&server.pid().to_string()],
        r#"
        import os, resource

        others = [connect() for i in range(30)]
        server = int(ARGS[0])
        used = {int(file) for file in os.listdir(f"/proc/{server}/fd")}
        free = [file for file in range(1000) if file not in used]
        _, hard = resource.prlimit(server, resource.RLIMIT_NOFILE)
        resource.prlimit(server, resource.RLIMIT_NOFILE, (free[10], hard))
        stored = [put(other, 0) for other in others]
        written = stored.index(False)
        assert 10 <= written and not any(stored[written:]), stored
        assert others[0].pread(1, 0) == b"\7" and others[-1].pread(1, 0) == b"\0"
        "#,
    );
    server.stop();
}

#[test]
fn a_connection_that_ends_gives_its_own_back() {
    let more = ["cow-scope=connection", "cow-limit=4M"];
    null("64M", &more).nbdsh_after(
        CLIENTS,
        &[],
        r#"
        for round in range(5):
            one, other = connect(), connect()
            assert fill(one, 0) > 1000
            assert not put(other, 0)
            one.shutdown()
            # nbdkit hears of it when it hears of it.
            deadline = time.monotonic() + 20
            while not put(other, 0):
                assert time.monotonic() < deadline, "nothing was given back"
                time.sleep(0.02)
            assert fill(other, 1) > 1000
            other.shutdown()
            while True:
                try:
                    last = connect()
                    assert put(last, 0)
                    last.shutdown()
                    break
                except AssertionError:
                    assert time.monotonic() < deadline, "nothing was given back"
        "#,
    );
}

#[test]
fn copies_take_at_most_half_and_reads_go_on() {
    let base = Base::new(&noise(5, 16 << 20));
    for (parameter, request) in [("cow-on-read=true", "read"), ("cow-on-cache=true", "cache")] {
        let plugin = [
            "file",
            base.path(),
            "cow-block-size=4K",
            "cow-limit=8M",
            parameter,
        ];
        let server = Setup::new().start(&plugin);
        server.nbdsh_after(
            CLIENTS,
            &[base.path(), request],
            r#"
            content = open(ARGS[0], "rb").read()
            def ask(connection, number):
                for i in range(64):
                    at = (i * 16 + number) * 16 * K
                    if ARGS[1] == "cache":
                        connection.cache(16 * K, at)
                    else:
                        same(connection.pread(16 * K, at), content[at:at + 16 * K])
            together(16, ask)
            same(read(h), content)
            "#,
        );
        let copied = server.overlay_bytes();
        assert!(
            (3 << 20..(4 << 20) + (1 << 18)).contains(&copied),
            "{parameter}: {copied}"
        );
        server.nbdsh_after(
            CLIENTS,
            &[],
            r#"
            written = sum(put(h, block, 9) for block in range(4096))
            # What was copied could be overwritten as well, so there is more than half.
            assert written >= 1900, written
            "#,
        );
        server.stop();
    }
}

#[test]
fn an_image_that_is_over_the_limit_is_used_and_grows_no_further() {
    let base = Base::new(&noise(6, 16 << 20));
    let image = base.directory().join("diff.qcow2");
    let overlay = format!("cow-overlay={}", image.display());
    let plugin = ["file", base.path(), "cow-block-size=4K", &overlay];
    let server = Setup::new().start(&plugin);
    server.nbdsh_after(
        CLIENTS,
        &[],
        "assert put(h, 0, 3, count=1024)\nh.flush()\nassert put(h, 3000, 4)",
    );
    server.stop();

    let limited = [&plugin[..], &["cow-limit=2M"]].concat();
    let server = Setup::new().start(&limited);
    server.nbdsh_after(
        CLIENTS,
        &[],
        r#"
        same(read(h, 0, 4 * M), b"\3" * (4 * M))
        assert not put(h, 2000)
        assert put(h, 0, 5, count=1024)
        h.flush()
        h.trim(BLOCK, 0)
        assert not put(h, 2000)
        h.trim(3 * M, 0)
        # 1 MiB is left, and one block.
        stored = fill(h, 2000)
        assert 240 < stored < 256, stored
        h.flush()
        same(read(h, 3 * M, M), b"\5" * M)
        same(read(h, 0, 3 * M), bytes(3 * M))
        "#,
    );
    let log = server.stop_and_tell();
    assert!(log.contains("cow-limit=2097152"), "{log}");
    run(&["qemu-img", "check", image.to_str().expect("a path")]);

    // What the last run has taken counts from the start of the next.
    let server = Setup::new().start(&limited);
    server.nbdsh_after(
        CLIENTS,
        &[],
        "assert not put(h, 3500)\nassert put(h, 2000)\nassert h.pread(1, 3000 * BLOCK) == b'\\4'",
    );
    server.stop();
}
