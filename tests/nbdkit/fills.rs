//! What the plugin is asked for, and what it is not asked for again.

use std::path::PathBuf;

use crate::harness::log::{Request, requests};
use crate::harness::{Base, Server, Setup, noise, scratch};

/// A server with a log of what reaches the plugin.
struct Watched {
    server: Server,
    log: PathBuf,
    _base: Base,
    _files: tempfile::TempDir,
}

fn watched(parameters: &[&str]) -> Watched {
    let base = Base::new(&noise(1, 1 << 20));
    let files = scratch();
    let log = files.path().join("log");
    let logfile = format!("logfile={}", log.display());
    let plugin = ["file", base.path(), &logfile, "cow-block-size=64K"];
    let server = Setup::new()
        .below("log")
        .start(&[&plugin, parameters].concat());
    Watched {
        server,
        log,
        _base: base,
        _files: files,
    }
}

impl Watched {
    /// Runs the code, and gives what of one kind it made the filter ask for.
    fn asked(&self, kind: &str, code: &str) -> Vec<(u64, u64)> {
        let before = requests(&self.log, kind).len();
        self.server.nbdsh(code);
        requests(&self.log, kind)
            .into_iter()
            .skip(before)
            .map(|Request { offset, count, .. }| (offset, count))
            .collect()
    }

    fn reads(&self, code: &str) -> Vec<(u64, u64)> {
        self.asked("Read", code)
    }
}

const K: u64 = 1024;

/// Whatever goes wrong above it, a plugin that was opened read-only can't change its disk.
#[test]
fn the_plugin_is_opened_read_only() {
    let watched = watched(&[]);
    watched.server.nbdsh("h.pwrite(b'x', 0)");
    let log = std::fs::read_to_string(&watched.log).unwrap();
    let connect = log.lines().find(|line| line.contains(" Connect "));
    let connect = connect.unwrap_or_else(|| panic!("no connection in {log}"));
    assert!(connect.contains(" write=0 "), "{connect}");
}

#[test]
fn a_read_asks_for_the_bytes_that_the_client_wants() {
    let watched = watched(&[]);
    assert_eq!(watched.reads("h.pread(512, 1000)"), [(1000, 512)]);
    assert_eq!(
        watched.reads("h.pread(200 * K, 60 * K)"),
        [(60 * K, 200 * K)]
    );
    assert_eq!(watched.reads("h.pread(1, M - 1)"), [(1024 * K - 1, 1)]);
}

#[test]
fn a_read_around_a_block_of_the_overlay_asks_for_both_sides() {
    let watched = watched(&[]);
    watched.server.nbdsh("h.pwrite(noise(64 * K, 1), 128 * K)");
    assert_eq!(
        watched.reads("h.pread(100 * K, 120 * K)"),
        [(120 * K, 8 * K), (192 * K, 28 * K)]
    );
    assert_eq!(watched.reads("h.pread(64 * K, 128 * K)"), []);
}

#[test]
fn a_partial_write_asks_for_its_block_once() {
    let watched = watched(&[]);
    let write = "h.pwrite(b'x' * 512, 70_000)";
    assert_eq!(watched.reads(write), [(64 * K, 64 * K)]);
    assert_eq!(watched.reads(write), []);
}

#[test]
fn what_replaces_whole_blocks_asks_for_nothing() {
    let watched = watched(&[]);
    let whole = "h.pwrite(noise(128 * K, 1), 0); h.trim(128 * K, 128 * K); \
                 h.zero(128 * K, 256 * K); h.zero(64 * K, 384 * K, NO_HOLE)";
    assert_eq!(watched.reads(whole), []);
    // Parts of blocks that are zero by now: nothing of the base is in them.
    assert_eq!(
        watched.reads("h.pwrite(b'x', 130 * K); h.pread(K, 140 * K)"),
        []
    );
}

#[test]
fn with_cow_on_read_the_second_read_does_not_reach_the_plugin() {
    let watched = watched(&["cow-on-read=true"]);
    assert_eq!(watched.reads("h.pread(512, 70_000)"), [(64 * K, 64 * K)]);
    assert_eq!(watched.reads("h.pread(512, 70_000)"), []);
    // Not for another place in the block, nor another connection.
    assert_eq!(watched.reads("connect().pread(64 * K, 64 * K)"), []);
}

#[test]
fn without_cow_on_read_every_read_reaches_the_plugin() {
    for parameters in [&[][..], &["cow-on-read=false"], &["cow-on-cache=true"]] {
        let watched = watched(parameters);
        assert_eq!(
            watched.reads("h.pread(512, 0); h.pread(512, 0)"),
            [(0, 512), (0, 512)]
        );
    }
}

#[test]
fn with_a_path_reads_are_kept_only_while_the_path_exists() {
    let files = scratch();
    let switch = files.path().join("switch");
    let watched = watched(&[&format!("cow-on-read={}", switch.display())]);
    let read = "h.pread(512, 70_000)";
    assert_eq!(watched.reads(read), [(70_000, 512)]);
    assert_eq!(watched.reads(read), [(70_000, 512)]);
    std::fs::write(&switch, "").unwrap();
    assert_eq!(watched.reads(read), [(64 * K, 64 * K)]);
    assert_eq!(watched.reads(read), []);
    std::fs::remove_file(&switch).unwrap();
    assert_eq!(watched.reads(read), []);
    assert_eq!(watched.reads("h.pread(512, 0)"), [(0, 512)]);
}

#[test]
fn with_cow_on_cache_a_cached_block_does_not_reach_the_plugin_again() {
    let watched = watched(&["cow-on-cache=true"]);
    assert_eq!(watched.reads("h.cache(512, 70_000)"), [(64 * K, 64 * K)]);
    assert_eq!(
        watched.reads("h.cache(512, 70_000); h.pread(64 * K, 64 * K)"),
        []
    );
    assert_eq!(
        watched.server.nbdsh("print(len(read(h)))").trim(),
        "1048576"
    );
}

/// Without it a prefetch is the plugin's business, which knows how to do it best.
#[test]
fn without_cow_on_cache_a_cache_request_is_passed_on_and_copies_nothing() {
    let watched = watched(&[]);
    let asked = watched.asked("Cache", "h.cache(200 * K, 70_000)");
    let from = asked.iter().map(|(offset, _)| *offset).min();
    let to = asked.iter().map(|(offset, count)| offset + count).max();
    assert!(
        from.is_some_and(|from| from <= 70_000) && to >= Some(70_000 + 200 * K),
        "cached {asked:?}"
    );
    assert_eq!(watched.server.overlay_bytes(), 0);
    assert_eq!(watched.reads("h.pread(512, 70_000)"), [(70_000, 512)]);
}

#[test]
fn a_cache_request_over_the_overlay_asks_for_nothing() {
    let watched = watched(&[]);
    watched
        .server
        .nbdsh("h.pwrite(noise(128 * K, 1), 0); h.trim(64 * K, 128 * K)");
    assert_eq!(watched.asked("Cache", "h.cache(192 * K, 0)"), []);
}

#[test]
fn blocks_that_were_filled_by_reads_and_caches_hold_the_base() {
    let content = noise(2, 1_000_001);
    let base = Base::new(&content);
    let server = Server::start(&[
        "file",
        base.path(),
        "cow-block-size=64K",
        "cow-on-read=true",
        "cow-on-cache=true",
    ]);
    server.nbdsh_with(
        &[base.path()],
        r#"
        base = open(ARGS[0], "rb").read()
        h.cache(1, 1_000_000)
        h.cache(300_000, 5)
        for start in range(0, 1_000_001, 77_777):
            h.pread(100, start)
        same(read(h), base)
        same(read(connect()), base)
        Model([h, connect()], base, 1).run(150).check()
        "#,
    );
}

/// A sector of the base that can't be read fails only requests for it, not those for
/// others of its block: neither copies of the block nor writes over the bad sector.
#[test]
fn a_bad_sector_of_the_base_fails_only_what_asks_for_it() {
    let base = Base::new(&noise(6, 1 << 20));
    let bad = 300 << 10;
    let pread = format!(
        "pread=if [ $4 -lt {0} ] && [ $(($4 + $3)) -gt {bad} ]; then echo EIO bad sector >&2; exit 1; fi; \
         dd if={1} skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none",
        bad + 512,
        base.path()
    );
    for copying in ["cow-on-read=true", "cow-on-cache=true"] {
        let server = Setup::new().start(&[
            "eval",
            "thread_model=echo parallel",
            "get_size=echo 1M",
            &pread,
            "cow-block-size=64K",
            copying,
        ]);
        server.nbdsh_with(
            &[base.path()],
            r#"
            base = open(ARGS[0], "rb").read()
            bad = 300 * K
            refused("EIO", h.pread, 512, bad)
            for start in [bad - 512, bad + 512, 256 * K, 319 * K + 512]:
                same(h.pread(512, start), base[start:start + 512], start)
                h.cache(512, start)
            # Around the bad sector everything can be had, and it can be written over.
            h.pwrite(b"n" * 512, bad)
            expected = base[:bad] + b"n" * 512 + base[bad + 512:]
            same(read(h, step=64 * K), expected)
            "#,
        );
    }
}

/// A copy of a block is not what the client has asked for: it must not need the memory.
#[test]
fn a_block_that_memory_has_no_room_for_is_read_without_a_copy() {
    for copying in ["cow-on-read=true", "cow-on-cache=true"] {
        let server = Setup::new().under(&["prlimit", "--as=1500000000"]).start(&[
            "memory",
            "4G",
            "cow-block-size=2G",
            copying,
        ]);
        server.nbdsh("same(h.pread(512, 3 * G), bytes(512)); h.cache(512, 3 * G)");
    }
}
