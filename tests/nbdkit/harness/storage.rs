//! Storage in the network that many hosts share: a server of a base, which can be held
//! up, killed and started again, and tells what it was asked for.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};

use tempfile::TempDir;

use super::command::{LIMIT, command, eventually, kill_group, signal, spawn};
use super::{Base, log, nginx};

#[derive(Clone, Copy)]
enum Kind {
    /// nginx, below nbdkit's curl plugin.
    Web,
    /// Another nbdkit, below its nbd plugin.
    Nbd,
}

/// Listens on a socket in a directory of its own, under the same name every time.
pub struct Storage {
    kind: Kind,
    disk: String,
    child: Option<Child>,
    scratch: TempDir,
}

impl Storage {
    /// nginx with a configuration of its own, which serves the base's directory.
    pub fn web(base: &Base) -> Storage {
        Storage::new(Kind::Web, base)
    }

    /// nbdkit with the file plugin.
    pub fn nbd(base: &Base) -> Storage {
        Storage::new(Kind::Nbd, base)
    }

    fn new(kind: Kind, base: &Base) -> Storage {
        let mut storage = Storage {
            kind,
            disk: base.path().into(),
            child: None,
            scratch: super::scratch(),
        };
        storage.start();
        storage
    }

    /// The plugin of a host that has this for its base, and its parameters.
    pub fn plugin(&self) -> Vec<String> {
        let socket = self.file("socket");
        match self.kind {
            Kind::Web => vec![
                "curl".into(),
                "http://localhost/disk.img".into(),
                format!("unix-socket-path={socket}"),
            ],
            Kind::Nbd => vec!["nbd".into(), format!("socket={socket}")],
        }
    }

    /// Starts the server, again if it was killed, and waits until it can be reached.
    pub fn start(&mut self) {
        // What was killed has left it.
        let _ = fs::remove_file(self.file("socket"));
        let mut server = match self.kind {
            Kind::Web => self.nginx(),
            Kind::Nbd => self.nbdkit(),
        };
        let stderr = self.file("stderr");
        server.stderr(fs::File::create(&stderr).expect("a file for stderr"));
        let mut child = spawn(&mut server);
        let mut reached = false;
        eventually(LIMIT, || {
            reached = UnixStream::connect(self.file("socket")).is_ok();
            // What is not installed will never be reached.
            reached || child.try_wait().expect("look at the server").is_some()
        });
        self.child = Some(child);
        let said = fs::read_to_string(stderr).expect("the server's stderr");
        assert!(
            reached,
            "{server:?} does not serve: {said} (`make deps` installs what the tests need)"
        );
    }

    fn nginx(&self) -> Command {
        let directory = self.disk.strip_suffix("/disk.img").expect("a base");
        let configuration = nginx::configuration(
            self.scratch.path(),
            directory.as_ref(),
            "$request_method $request_uri $http_range",
            "",
        );
        let file = self.file("nginx.conf");
        fs::write(&file, configuration).expect("nginx's configuration");
        let mut nginx = ends_with_us(&nginx::program());
        // Before it reads its configuration it would complain to a file of the system's.
        nginx.args(["-e", &self.file("error.log"), "-c", &file]);
        nginx
    }

    fn nbdkit(&self) -> Command {
        let mut nbdkit = ends_with_us("nbdkit");
        nbdkit.args(["-f", "-U", &self.file("socket"), "--filter=log"]);
        nbdkit.args(["file", &self.disk, "logappend=true"]);
        nbdkit.arg(format!("logfile={}", self.file("log")));
        nbdkit
    }

    /// Holds the server up: from now on it answers nobody.
    pub fn hold_up(&self) {
        let pid = self.child.as_ref().expect("a running server").id();
        signal(pid, libc::SIGSTOP);
        let stopped = || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the server's state");
            stat.contains(") T ")
        };
        assert!(eventually(LIMIT, stopped), "the server does not stop");
    }

    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("a running server");
        kill_group(&mut child);
        child.wait().expect("wait for the server");
    }

    /// The offsets at which the base was read, in the order of the requests.
    pub fn reads(&self) -> Vec<u64> {
        let file = self.file("log");
        match self.kind {
            // It writes this down before it reads.
            Kind::Nbd => log::requests(file.as_ref(), "Read")
                .iter()
                .map(|read| read.offset)
                .collect(),
            Kind::Web => {
                self.ask_for_nothing();
                let text = fs::read_to_string(file).expect("nginx's log");
                text.lines().filter_map(range_in).collect()
            }
        }
    }

    /// nginx writes down what it has answered after the client has the answer, but before
    /// it looks at what comes next.
    fn ask_for_nothing(&self) {
        let mut stream = UnixStream::connect(self.file("socket")).expect("connect to nginx");
        let request = b"HEAD /nothing HTTP/1.0\r\n\r\n";
        stream.write_all(request).expect("ask nginx");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("nginx's answer");
        assert!(answer.contains(" 404 "), "{answer}");
    }

    fn file(&self, name: &str) -> String {
        let path = self.scratch.path().join(name);
        path.into_os_string().into_string().expect("a path of ours")
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
    }
}

/// `GET /disk.img bytes=4096-8191`
fn range_in(line: &str) -> Option<u64> {
    let (first, _) = line
        .strip_prefix("GET /disk.img bytes=")?
        .split_once('-')
        .expect("a range");
    Some(first.parse().expect("an offset"))
}

/// A command that the kernel ends with the thread that starts it: nginx has no option
/// for that, and of a test that is interrupted nothing may stay.
fn ends_with_us(program: &str) -> Command {
    let mut command = command("setpriv");
    command.args(["--pdeathsig", "KILL", program]);
    command
}
