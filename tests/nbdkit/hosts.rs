//! Eight hosts and one base: each has an nbdkit with an overlay of its own, and they all
//! read from one server, which is killed while it is asked, and comes back.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use tempfile::TempDir;

use crate::harness::command::{LIMIT, eventually, spawn, wait};
use crate::harness::{Base, Server, Setup, Storage, log, noise, scratch};

const HOSTS: usize = 8;
const SIZE: usize = 6 << 20;
/// What the hosts copy before the server is killed.
const COPIED: u64 = 1 << 20;

/// An nbdkit of a host, and what its plugin was asked for.
struct Host {
    server: Server,
    log: PathBuf,
    _directory: TempDir,
}

impl Host {
    /// Over the storage, with these filters between ours and the plugin.
    fn start(storage: &Storage, below: &[&str], parameters: &[&str]) -> Host {
        let directory = scratch();
        let log = directory.path().join("log");
        let mut setup = Setup::new();
        for filter in below {
            setup = setup.below(filter);
        }
        let mut words = storage.plugin();
        words.push(format!("logfile={}", log.display()));
        words.push("cow-on-read=true".into());
        words.extend(parameters.iter().map(ToString::to_string));
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        Host {
            server: setup.below("log").start(&words),
            log,
            _directory: directory,
        }
    }
}

/// Python code that stops at some points to have something done here.
struct Script {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Script {
    fn start(mut python: Command) -> Script {
        let mut child = spawn(python.stdin(Stdio::piped()).stdout(Stdio::piped()));
        Script {
            input: child.stdin.take().expect("a pipe"),
            output: BufReader::new(child.stdout.take().expect("a pipe")),
            child,
        }
    }

    /// Waits until the code calls `reached` with this word.
    fn until(&mut self, word: &str) {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("what Python says");
        assert_eq!(line.trim_end(), word, "Python's own error is above");
    }

    /// Lets it go on.
    fn go_on(&mut self) {
        self.input.write_all(b"\n").expect("tell Python");
    }

    fn end(mut self) {
        self.until("");
        let status = wait(&mut self.child, LIMIT).expect("Python ends");
        assert!(status.success(), "{status}: Python's own error is above");
    }
}

/// What every code here begins with.
const REACHED: &str = r#"
def reached(word):
    print(word, flush=True)
    sys.stdin.readline()
"#;

/// ARGS: the base, and the hosts' sockets.
const WORK: &str = r#"
    content = open(ARGS[0], "rb").read()
    sockets = ARGS[1:]
    # Nothing but the probes is read from the last megabyte while the hosts work.
    end = len(content) - M
    probe = end + 512 * K
    hosts = [[connect(socket=s), connect(socket=s)] for s in sockets]
    probes = [connect(socket=s) for s in sockets]

    r = random.Random(1)
    everyone = Flight(probes + [c for host in hosts for c in host], 1000)
    for host in hosts:
        for start in range(0, M, 64 * K):
            about = (content[start:start + 64 * K], start)
            everyone.read(r.choice(host), 64 * K, start,
                          lambda found, about=about: same(found, *about))
    everyone.finish()
    reached("copied")

    # Three readers and writers at each host, and at no two hosts the same writes.
    disks = [neighbours(host, content[:end], 3, number) for number, host in enumerate(hosts)]
    models = [model for disk in disks for model in disk]
    for model in models:
        model.fly(everyone, 25)
    everyone.finish()
    for model in models:
        model.fly(everyone, 25)
    for _ in range(10):
        everyone.step()
    reached("under way")

    expected = content[probe:probe + 4096]
    for connection in probes:
        everyone.read(connection, 4096, probe, lambda found: same(found, expected, probe))
    reached("asked")

    everyone.finish()
    for disk, host in zip(disks, hosts):
        for model in disk:
            model.check()
        for connection in host:
            same(read(connection, end, M), content[end:], end)
    reached("all copied")

    for disk, socket in zip(disks, sockets):
        expected = b"".join(model.content for model in disk) + content[end:]
        same(read(connect(socket=socket)), expected)
"#;

/// `below` are filters between ours and the plugin that make up for an outage.
fn an_outage_is_not_seen(mut storage: Storage, base: &Base, below: &[&str], parameters: &[&str]) {
    let hosts: Vec<_> = (0..HOSTS)
        .map(|_| Host::start(&storage, below, parameters))
        .collect();
    let sockets: Vec<_> = hosts
        .iter()
        .map(|host| host.server.socket().display().to_string())
        .collect();
    let mut words = vec![base.path()];
    words.extend(sockets.iter().map(String::as_str));
    let mut work = Script::start(hosts[0].server.script_after(REACHED, WORK, &words));

    work.until("copied");
    let first = storage.reads().len();
    work.go_on();

    work.until("under way");
    storage.hold_up();
    work.go_on();
    work.until("asked");
    each(&hosts, "has a request in flight", |log| {
        log::in_flight(log) > 0
    });
    each(&hosts, "had no failure before", |log| log::failed(log) == 0);
    storage.kill();
    each(&hosts, "had a failure", |log| log::failed(log) > 0);
    storage.start();
    work.go_on();

    work.until("all copied");
    let reads = storage.reads();
    let again = reads[first..].iter().filter(|at| **at < COPIED).count();
    assert_eq!(again, 0, "reads of what was copied before");
    assert!(reads.len() > first, "nothing was read after the outage");
    work.go_on();

    work.end();
    let again = storage.reads().len() - reads.len();
    assert_eq!(again, 0, "reads when all was copied");
    base.assert_unchanged();
}

fn each(hosts: &[Host], what: &str, so: impl Fn(&Path) -> bool) {
    for (number, host) in hosts.iter().enumerate() {
        assert!(
            eventually(LIMIT, || so(&host.log)),
            "not so: host {number} {what}"
        );
    }
}

const RETRY: [&str; 3] = ["retries=60", "retry-delay=1", "retry-exponential=no"];

#[test]
fn eight_hosts_don_t_see_a_web_server_come_back() {
    let base = Base::new(&noise(1, SIZE));
    an_outage_is_not_seen(Storage::web(&base), &base, &["retry"], &RETRY);
}

#[test]
fn eight_hosts_don_t_see_an_nbd_server_come_back() {
    let base = Base::new(&noise(2, SIZE));
    an_outage_is_not_seen(Storage::nbd(&base), &base, &["retry"], &RETRY);
}

/// It does not open the plugin again, which curl does not need.
#[test]
fn eight_hosts_that_retry_requests_don_t_see_a_web_server_come_back() {
    let base = Base::new(&noise(3, SIZE));
    let parameters = ["retry-request-retries=60", "retry-request-delay=1"];
    an_outage_is_not_seen(Storage::web(&base), &base, &["retry-request"], &parameters);
}

/// ARGS: the base, and the error of what is asked after the first failure.
const WITHOUT: &str = r#"
    expected = bytearray(open(ARGS[0], "rb").read())
    h = connect()
    same(read(h, 0, M), expected[:M])
    write = noise(4096, 1)
    h.pwrite(write, 2 * M)
    expected[2 * M:2 * M + 4096] = write
    reached("copied")

    buffer = nbd.Buffer(4096)
    cookie = h.aio_pread(buffer, 3 * M)
    reached("asked")

    def wait():
        while not h.aio_command_completed(cookie):
            assert h.poll(60_000) == 1, "no answer"

    refused("EIO", wait)
    # A part of a block needs the rest of it from the base.
    refused(ARGS[1], h.pwrite, b"lost", 4 * M + 100)
    refused(ARGS[1], h.pread, 4096, 5 * M)
    # What the overlay has, and whole blocks, need no base.
    same(h.pread(M, 0), expected[:M])
    same(h.pread(4096, 2 * M), write, 2 * M)
    h.pwrite(write, 5 * M)
    expected[5 * M:5 * M + 4096] = write
    h.flush()
    reached("refused")

    h = connect()
    same(read(h), expected)
    h.pwrite(b"kept", 4 * M + 100)
    expected[4 * M + 100:4 * M + 104] = b"kept"
    same(read(connect()), expected)
"#;

fn an_outage_is_an_error(mut storage: Storage, base: &Base, later: &str) {
    let host = Host::start(&storage, &[], &[]);
    let words = [base.path(), later];
    let mut work = Script::start(host.server.script_after(REACHED, WITHOUT, &words));
    work.until("copied");
    storage.hold_up();
    work.go_on();
    work.until("asked");
    let waiting = || log::in_flight(&host.log) > 0;
    assert!(eventually(LIMIT, waiting), "no request is in flight");
    storage.kill();
    work.go_on();
    work.until("refused");
    storage.start();
    work.go_on();
    work.end();
}

#[test]
fn without_retry_the_outage_of_a_web_server_is_an_error_and_no_more() {
    let base = Base::new(&noise(4, SIZE));
    an_outage_is_an_error(Storage::web(&base), &base, "EIO");
}

#[test]
fn without_retry_the_outage_of_an_nbd_server_is_an_error_and_no_more() {
    let base = Base::new(&noise(5, SIZE));
    // What libnbd says of a connection that is no more.
    an_outage_is_an_error(Storage::nbd(&base), &base, "EINVAL");
}
