//! Clients that vanish, and a server that is told to stop.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::process::Child;

use tempfile::TempDir;

use crate::harness::command::{LIMIT, eventually, kill_group, signal, spawn};
use crate::harness::{Base, Server, Setup, noise, scratch};

/// A client in the background; it ends with the value, without a word of farewell.
struct Client(Child);

impl Drop for Client {
    fn drop(&mut self) {
        kill_group(&mut self.0);
        let _ = self.0.wait();
    }
}

/// Each connection has one thread and, below, one request in flight: when the
/// threads of a connection are still at work while its client vanishes, nbdkit
/// 1.32 can abort in its own code, with any filter and with none.
fn one_thread_per_connection() -> Setup {
    Setup::new().option("-t1")
}

/// A server with a base that does not answer, and a log of what has reached it.
struct Stuck {
    server: Server,
    files: TempDir,
}

const CONNECTIONS: usize = 16;

impl Stuck {
    fn new(base: &Base, parameters: &[&str]) -> Stuck {
        let files = scratch();
        let log = format!("logfile={}", files.path().join("log").display());
        let rate = format!("rate-file={}", files.path().join("rate").display());
        let plugin = ["file", base.path(), &log, &rate];
        // A bit in a second: whoever reads waits for days, or until it is interrupted.
        let slow = ["rate=1", "cow-block-size=64K"];
        let server = one_thread_per_connection()
            .below("log")
            .below("rate")
            .start(&[&plugin, &slow[..], parameters].concat());
        Stuck { server, files }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// Starts a client with a request on each of many connections: reads, fills and
    /// partial writes. It is there until the first one is answered.
    fn client(&self) -> Client {
        let before = self.waiting();
        let code = r#"
            connections = [connect() for _ in range(16)]
            for number, c in enumerate(connections):
                start = number * 64 * K
                buffer = nbd.Buffer.from_bytearray(bytearray(noise(512, number)))
                [lambda: c.aio_pread(nbd.Buffer(4096), start),
                 lambda: c.aio_pwrite(buffer, start + 1000),
                 lambda: c.aio_zero(512, start + 2000),
                 lambda: c.aio_cache(512, start)][number % 4]()
            connections[0].poll(-1)
            os._exit(0)
        "#;
        let client = Client(spawn(&mut self.server.script(code)));
        let in_flight = || self.waiting() == before + CONNECTIONS;
        assert!(
            eventually(LIMIT, in_flight),
            "the base was asked on {} connections, not {CONNECTIONS}",
            self.waiting() - before
        );
        client
    }

    /// On how many connections the base was asked for something.
    fn waiting(&self) -> usize {
        let log = fs::read_to_string(self.file("log")).expect("the log filter's file");
        log.lines()
            .filter(|line| line.contains(" Read ") || line.contains(" Cache "))
            .flat_map(|line| line.split(' '))
            .filter(|word| word.starts_with("connection="))
            .collect::<HashSet<_>>()
            .len()
    }

    /// That the base was waited for when it happened; otherwise the test shows nothing.
    fn assert_interrupted(&self) {
        let interrupted = || self.server.stderr().contains("aborting sleep");
        assert!(eventually(LIMIT, interrupted), "no request was in flight");
    }

    /// From now on the base answers.
    fn release(&self) {
        // 0 is no limit. Renamed, because the filter may look at any moment.
        fs::write(self.file("rate.new"), "0\n").expect("a new rate");
        fs::rename(self.file("rate.new"), self.file("rate")).expect("the new rate");
    }
}

#[test]
fn clients_that_vanish_with_requests_in_flight_leave_the_server_well() {
    let base = Base::new(&noise(1, 1 << 20));
    for parameters in [
        &["cow-on-read=true", "cow-on-cache=true"][..],
        &["cow-scope=connection"],
    ] {
        let stuck = Stuck::new(&base, parameters);
        for _ in 0..3 {
            drop(stuck.client());
        }
        stuck.assert_interrupted();
        stuck.release();
        stuck.server.nbdsh_with(
            &[base.path()],
            r#"
            # Of a write that was in flight either all has come or nothing.
            base = open(ARGS[0], "rb").read()
            found = read(h)
            for number in range(16):
                start = number * 64 * K
                old = base[start:start + 64 * K]
                new = bytearray(old)
                if number % 4 == 1:
                    new[1000:1512] = noise(512, number)
                if number % 4 == 2:
                    new[2000:2512] = bytes(512)
                assert found[start:start + 64 * K] in (old, new), number
            h.pwrite(noise(M, 1), 0)
            same(read(h), noise(M, 1))
            "#,
        );
    }
}

#[test]
fn a_server_that_is_stopped_with_requests_in_flight_ends_well() {
    let base = Base::new(&noise(2, 1 << 20));
    for parameters in [
        &["cow-on-read=true", "cow-on-cache=true"][..],
        &["cow-scope=connection"],
    ] {
        let stuck = Stuck::new(&base, parameters);
        // nbdkit waits for its clients to go, so this one goes when it is answered.
        let client = stuck.client();
        signal(stuck.server.pid(), libc::SIGTERM);
        stuck.assert_interrupted();
        // The harness sees to the rest: status 0, no panic, nothing left in TMPDIR.
        stuck.server.stop();
        drop(client);
    }
}

/// Not even a server that is killed leaves an overlay behind: it never had a name.
#[test]
fn a_server_that_is_killed_leaves_no_overlay() {
    let base = Base::new(&noise(3, 1 << 20));
    let directory = scratch();
    let server = Setup::new()
        .tmpdir(directory.path())
        .start(&["file", base.path()]);
    server.nbdsh("h.pwrite(noise(M, 1), 0)");
    server.kill();
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn connections_come_and_go_while_others_write() {
    let base = Base::new(&noise(4, 1 << 20));
    let server = one_thread_per_connection().start(&["file", base.path()]);
    server.nbdsh(
        r#"
        model = Model([h], read(h), 1)
        for turn in range(60):
            model.run(3)
            passing = connect()
            passing.aio_pread(nbd.Buffer(65536), turn * 1000)
            if turn % 2:
                passing.shutdown()
            del passing
        model.connections.append(connect())
        model.check()
        "#,
    );
}
