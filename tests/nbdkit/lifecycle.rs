//! Clients that vanish, and a server that is told to stop.

use std::fs;
use std::process::{Child, Command, Stdio};

use crate::harness::command::{LIMIT, eventually, kill_group, signal, spawn, wait};
use crate::harness::{Base, Server, Setup, noise};

/// A client in the background; it ends with the value.
struct Client(Child);

impl Client {
    /// Starts it, and waits until it has printed a line.
    fn that_has_said_so(mut script: Command) -> Client {
        let said = tempfile::NamedTempFile::new().expect("a file for its stdout");
        let client = Client(spawn(script.stdout(said.reopen().expect("that file"))));
        let ready = eventually(LIMIT, || {
            fs::read(said.path()).is_ok_and(|line| line == b"in flight\n")
        });
        assert!(ready, "the client has sent nothing");
        client
    }
}

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

/// A slow base, so that requests are under way for as long as the test needs.
fn slow(base: &Base, parameters: &[&str]) -> Server {
    let plugin = ["file", base.path(), "cow-block-size=64K", "rdelay=2"];
    one_thread_per_connection()
        .below("delay")
        .start(&[&plugin, parameters].concat())
}

/// Reads, fills and partial writes that wait for the slow base.
const IN_FLIGHT: &str = r#"
    connections = [connect() for _ in range(16)]
    for number, c in enumerate(connections):
        start = number * 64 * K
        buffer = nbd.Buffer.from_bytearray(bytearray(noise(512, number)))
        [lambda: c.aio_pread(nbd.Buffer(4096), start),
         lambda: c.aio_pwrite(buffer, start + 1000),
         lambda: c.aio_trim(512, start + 2000),
         lambda: c.aio_cache(512, start)][number % 4]()
    # Time to get from the socket to the base.
    time.sleep(0.3)
    print("in flight", flush=True)
"#;

/// That the base was waited for when it happened; otherwise the test shows nothing.
fn assert_interrupted(server: &Server) {
    let interrupted = || server.stderr().contains("aborting sleep");
    assert!(eventually(LIMIT, interrupted), "no request was in flight");
}

#[test]
fn clients_that_vanish_with_requests_in_flight_leave_the_server_well() {
    let base = Base::new(&noise(1, 1 << 20));
    for parameters in [
        &["cow-on-read=true", "cow-on-cache=true"][..],
        &["cow-scope=connection"],
    ] {
        let server = slow(&base, parameters);
        for _ in 0..3 {
            // Without a word of farewell.
            let code = format!("{IN_FLIGHT}\n    os._exit(0)\n");
            let mut gone = spawn(server.script(&code).stdout(Stdio::null()));
            assert!(wait(&mut gone, LIMIT).is_some_and(|status| status.success()));
        }
        assert_interrupted(&server);
        server.nbdsh_with(
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
        let server = slow(&base, parameters);
        // nbdkit waits for its clients to go, so this one goes when it is answered.
        let code = format!("{IN_FLIGHT}\n    Flight(connections, 1).wait()\n    os._exit(0)\n");
        let client = Client::that_has_said_so(server.script(&code));
        signal(server.pid(), libc::SIGTERM);
        assert_interrupted(&server);
        // The harness sees to the rest: status 0, no panic, nothing left in TMPDIR.
        server.stop();
        drop(client);
    }
}

/// Not even a server that is killed leaves an overlay behind: it never had a name.
#[test]
fn a_server_that_is_killed_leaves_no_overlay() {
    let base = Base::new(&noise(3, 1 << 20));
    let directory = crate::harness::scratch();
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
