//! Which errno a client gets, whatever the layer below or the overlay's file system
//! says. nbdkit ends itself over one that a callback must not answer, and makes EINVAL
//! of those that NBD has no code for.

use std::fs::{self, File};
use std::path::Path;
use std::process::Child;

use crate::harness::command::{LIMIT, command, eventually, signal, spawn, wait};
use crate::harness::{Base, Server, Setup, noise, scratch};

/// A plugin in C, which can answer any errno: the one whose number is in the file `fail`.
const PLUGIN: &str = r#"
#define NBDKIT_API_VERSION 2
#include <stdio.h>
#include <string.h>
#include <nbdkit-plugin.h>
#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

static int answer (void)
{
    FILE *file = fopen (FAIL, "r");
    int number = 0;
    if (file) {
        if (fscanf (file, "%d", &number) != 1)
            number = 0;
        fclose (file);
    }
    if (!number)
        return 0;
    nbdkit_error ("the plugin fails");
    nbdkit_set_error (number);
    return -1;
}

static void *any_open (int readonly) { return NBDKIT_HANDLE_NOT_NEEDED; }
static int64_t any_get_size (void *handle) { return 1 << 20; }
static int any_pread (void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
    memset (buf, 7, count);
    return answer ();
}
static int any_cache (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
    return answer ();
}
static int any_extents (void *handle, uint32_t count, uint64_t offset, uint32_t flags,
                        struct nbdkit_extents *extents)
{
    if (answer () == -1)
        return -1;
    return nbdkit_add_extent (extents, offset, count, 0);
}

static struct nbdkit_plugin plugin = {
    .name = "any",
    .open = any_open,
    .get_size = any_get_size,
    .pread = any_pread,
    .cache = any_cache,
    .extents = any_extents,
};
NBDKIT_REGISTER_PLUGIN (plugin)
"#;

/// What a client is told: NBD has one code for several errnos.
const TOLD: &str = r#"
import re

READS = {"EPERM": "EPERM", "EIO": "EIO", "ENOMEM": "ENOMEM", "EINVAL": "EINVAL",
         "ESHUTDOWN": "ESHUTDOWN"}
CHANGES = {**READS, "EROFS": "EPERM", "ENOSPC": "ENOSPC", "EDQUOT": "ENOSPC",
           "EFBIG": "ENOSPC"}


def told(answers, name):
    return answers.get(name, "EIO")
"#;

#[test]
fn every_errno_of_the_layer_below_is_one_that_the_client_may_get() {
    let files = scratch();
    let (source, fail) = (files.path().join("any.c"), files.path().join("fail"));
    let text = |path: &Path| path.to_str().expect("a path of our own").to_string();
    let plugin = PLUGIN.replace("FAIL", &format!("\"{}\"", text(&fail)));
    fs::write(&source, plugin).unwrap();
    let server = Server::start(&["cc", &text(&source), "cow-block-size=64K"]);
    server.nbdsh_after(
        TOLD,
        &[&text(&fail)],
        r#"
        number_of = {name: getattr(errno, name) for name in dir(errno) if name[0] == "E"}
        # Two names of one number, and numbers without a name.
        assert number_of["ENOTSUP"] == number_of["EOPNOTSUPP"]
        name_of = {number: name for name, number in number_of.items()}
        h.set_strict_mode(0)
        reading = [
            lambda code: refused(code, h.pread, 512, 100),
            lambda code: refused(code, h.cache, 512, 100),
            lambda code: refused(code, h.block_status, 512, 100, lambda *_: 0),
        ]
        changing = [
            lambda code: refused(code, h.pwrite, b"x" * 512, 100),
            lambda code: refused(code, h.pwrite, b"x" * 512, 100, FUA),
            lambda code: refused(code, h.zero, 512, 100),
            lambda code: refused(code, h.zero, 512, 100, NO_HOLE),
            lambda code: refused(code, h.zero, 512, 100, FAST),
            lambda code: refused(code, h.zero, 512, 100, FAST | FUA),
        ]
        for number in [*range(1, 140), 524, 9999]:
            name = name_of.get(number, "no errno")
            with open(ARGS[0], "w") as file:
                file.write(str(number))
            for request in reading:
                request(told(READS, name))
            for request in changing:
                request(told(CHANGES, name))
        os.unlink(ARGS[0])
        same(read(h), b"\x07" * M)
        "#,
    );
}

/// strace on a running nbdkit: from its start to its end these system calls fail.
struct Failing(Child);

impl Failing {
    fn start(server: &Server, calls: &str, errno: &str, log: &Path) -> Failing {
        let said = log.with_extension("stderr");
        let mut strace = command("strace");
        strace
            .args(["-f", "-p", &server.pid().to_string(), "-o"])
            .arg(log)
            .args(["-e", &format!("inject={calls}:error={errno}")]);
        strace.stderr(File::create(&said).expect("a file for its stderr"));
        let failing = Failing(spawn(&mut strace));
        let is_there = || fs::read_to_string(&said).is_ok_and(|said| said.contains("attached"));
        assert!(eventually(LIMIT, is_there), "strace is not attached");
        failing
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        // Not SIGKILL: strace takes its hands off nbdkit first.
        signal(self.0.id(), libc::SIGINT);
        let ended = wait(&mut self.0, LIMIT);
        assert!(
            ended.is_some() || std::thread::panicking(),
            "strace goes on"
        );
    }
}

#[test]
fn every_errno_of_the_overlay_is_one_that_the_client_may_get() {
    let base = Base::new(&noise(1, 1 << 20));
    let files = scratch();
    let server = Server::start(&["file", base.path(), "cow-block-size=64K"]);
    server.nbdsh("h.pwrite(noise(64 * K, 1), 128 * K)");
    for errno in [
        "EOPNOTSUPP",
        "ENOSPC",
        "EDQUOT",
        "EFBIG",
        "EROFS",
        "EPERM",
        "EACCES",
        "EOVERFLOW",
        "EINVAL",
    ] {
        let _failing = Failing::start(&server, "pwrite64", errno, &files.path().join(errno));
        server.nbdsh_after(
            TOLD,
            &[errno],
            r#"
            code = told(CHANGES, ARGS[0])
            refused(code, h.pwrite, noise(64 * K, 2), 0)
            refused(code, h.pwrite, b"x" * 512, 100)
            refused(code, h.pwrite, b"x" * 512, 128 * K + 100)
            for flags in [0, FAST, NO_HOLE, FUA]:
                refused(code, h.zero, 512, 128 * K + 100, flags)
            try:
                # With no space for it, a trim may do nothing.
                h.trim(512, 128 * K + 100)
            except nbd.Error as error:
                assert error.errno == code, error
            "#,
        );
    }
    server.nbdsh_with(
        &[base.path()],
        r#"
        expected = bytearray(open(ARGS[0], "rb").read())
        expected[128 * K:192 * K] = noise(64 * K, 1)
        same(read(h), expected)
        "#,
    );
}

/// A flush that fails with the FUA flag makes the zero fail, which was done already.
#[test]
fn a_failed_flush_is_no_refusal_of_a_fast_zero() {
    let base = Base::new(&noise(1, 1 << 20));
    let files = scratch();
    let overlay = format!("cow-overlay={}/diff.qcow2", files.path().display());
    for flags in ["FUA | FAST", "FUA"] {
        let server = Server::start(&["file", base.path(), &overlay]);
        server.nbdsh("h.pwrite(noise(64 * K, 1), 0)");
        let log = files.path().join("log");
        let failing = Failing::start(&server, "pwrite64", "EOPNOTSUPP", &log);
        server.nbdsh(&format!("refused('EIO', h.zero, 4096, 512 * K, {flags})"));
        drop(failing);
        server.nbdsh(&format!("h.zero(4096, 512 * K, {flags})"));
        server.stop();
        fs::remove_file(files.path().join("diff.qcow2")).unwrap();
    }
}

/// The one ENOTSUP that a client may get: before anything has changed, and only if it
/// has asked for it.
#[test]
fn only_a_fast_zero_is_not_supported() {
    let base = Base::new(&noise(2, 8 << 20));
    let server = Setup::new().start(&["file", base.path(), "cow-block-size=4M"]);
    server.nbdsh(
        r#"
        expected = read(h)
        refused("ENOTSUP", h.zero, 2 * M, M, FAST)
        same(read(h), expected)
        h.zero(2 * M, M)
        expected[M:3 * M] = bytes(2 * M)
        same(read(h), expected)
        "#,
    );
}

/// A file system may tell of a write that it has lost only once, with that write or a
/// later one: repeating the call and forgetting the error would lose it.
#[test]
fn an_error_that_the_overlay_tells_of_once_reaches_the_client() {
    let base = Base::new(&noise(1, 4 << 20));
    let files = scratch();
    let kept = format!("cow-overlay={}/diff.qcow2", files.path().display());
    for overlay in ["cow-scope=export", &kept] {
        for (errno, code) in [("ENOSPC:when=1", "ENOSPC"), ("EIO:when=1", "EIO")] {
            let server = Server::start(&["file", base.path(), overlay]);
            // An image is made for the first client.
            server.nbdsh("h.pwrite(b'x' * 512, 3 * M)");
            for write in [
                "h.pwrite, noise(4 * K, 2), 64 * K",
                "h.pwrite, noise(M, 2), M",
                "h.pwrite, b'x' * 512, 2 * M + 100",
                "h.pwrite, b'x' * 512, 64 * K + 100",
            ] {
                let failing = Failing::start(&server, "pwrite64", errno, &files.path().join("log"));
                server.nbdsh(&format!("refused('{code}', {write})"));
                drop(failing);
                server.nbdsh(&format!("({write})[0](*({write})[1:])"));
            }
            server.nbdsh(
                r#"
                same(h.pread(M, M), noise(M, 2))
                same(h.pread(512, 64 * K + 100), b"x" * 512)
                same(h.pread(512, 2 * M + 100), b"x" * 512)
                "#,
            );
            server.stop();
        }
    }
}
