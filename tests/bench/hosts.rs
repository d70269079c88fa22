//! What many hosts ask of the server that has their base.
//!
//! Eight nbdkit with the curl plugin, each with an overlay of its own, read all of a disk
//! from one nginx, all at once, and then all of it again: a boot, and what is done after
//! it. nginx counts the bytes that it sends.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

#[path = "../nbdkit/harness/nginx.rs"]
mod nginx;

use super::command::{self, LIMIT, command};
use super::lab::{self, DISK, MEMORY, scratch};
use super::nbd::{Client, Request};
use super::runner::{self, Cell, Effort, Failure, Kind, Measured, ONCE, Row};
use super::server::Server;
use super::systems::{Setup, System};

const HOSTS: u64 = 8;
const MIB: u64 = 1 << 20;
const GIB: f64 = (1u64 << 30) as f64;

/// One request of a host.
const STEP: u64 = 256 << 10;
const IN_FLIGHT: usize = 4;

pub fn all(effort: &Effort) -> Result<Vec<Row>, String> {
    let size = if effort.quick {
        effort.disk / 4
    } else {
        effort.disk
    };
    let scratch = scratch(with_room(size * (HOSTS + 1))?)?;
    let place = scratch.path();
    lab::random_file(&place.join("disk.img"), size)
        .map_err(|error| format!("the disk of the hosts: {error}"))?;
    let what = format!(
        "sent to {HOSTS} hosts that read the same {}M twice",
        size / MIB
    );
    let mut cells = Vec::new();
    cells.extend(pair(
        "hosts-copied",
        &format!("{what}, with cow-on-read"),
        &["cow-on-read=true"],
        &[System::Ours, System::CDefault],
        place,
    ));
    cells.extend(pair(
        "hosts-plain",
        &format!("{what}, without"),
        &[],
        &[System::Ours, System::NoFilter],
        place,
    ));
    Ok(runner::run(cells))
}

/// Where so many bytes can be written: the overlays have as many as the hosts read.
fn with_room(bytes: u64) -> Result<&'static str, String> {
    let enough = |place: &&str| lab::room(place).is_ok_and(|room| room > bytes * 9 / 8);
    let place = [MEMORY, DISK].into_iter().find(enough);
    let needed = bytes as f64 / GIB;
    place.ok_or(format!("{needed:.1} GiB are needed in {MEMORY} or {DISK}"))
}

/// The bytes, and the time that it took, which is found beside them.
fn pair<'a>(
    id: &str,
    title: &str,
    parameters: &'a [&str],
    systems: &[System],
    place: &'a Path,
) -> [Cell<'a>; 2] {
    let times: Rc<RefCell<BTreeMap<System, f64>>> = Rc::default();
    let keep = Rc::clone(&times);
    let cell = |id: String, title: &str, unit, measure| Cell {
        id,
        title: title.into(),
        kind: Kind::Amount(unit),
        rounds: 1,
        systems: systems.to_vec(),
        measure,
    };
    let bytes = move |system| -> Measured {
        let (bytes, took) = read_twice(system, parameters, place)?;
        keep.borrow_mut().insert(system, took.as_secs_f64());
        Ok(bytes as f64 / GIB)
    };
    let time = move |system| -> Measured {
        let took = times.borrow_mut().remove(&system);
        took.ok_or(Failure::NotAsked(ONCE.into()))
    };
    [
        cell(id.into(), title, "GiB", Box::new(bytes) as _),
        cell(
            format!("{id}-time"),
            "until they have read it twice",
            "s",
            Box::new(time),
        ),
    ]
}

/// The bytes that the server sent, and the time from the first request to the last reply.
fn read_twice(
    system: System,
    parameters: &[&str],
    place: &Path,
) -> Result<(u64, Duration), String> {
    let web = Web::start(place)?;
    let socket = format!("unix-socket-path={}", web.socket().display());
    let words = ["curl", "http://localhost/disk.img", &socket];
    let setup = Setup::plugin(&[&words, parameters].concat());
    let hosts: Vec<Server> = (0..HOSTS)
        .map(|_| setup.start(system, place))
        .collect::<Result<_, _>>()?;
    let mut clients: Vec<Client> = hosts.iter().map(Server::client).collect::<Result<_, _>>()?;
    let start = Instant::now();
    thread::scope(|scope| {
        let clients = clients.iter_mut();
        let threads: Vec<_> = clients
            .map(|client| scope.spawn(|| read_all(client).and_then(|()| read_all(client))))
            .collect();
        let mut ended = threads
            .into_iter()
            .map(|thread| thread.join().expect("a client does not panic"));
        ended.try_for_each(|read| read.map_err(|error| error.to_string()))
    })?;
    let took = start.elapsed();
    drop((clients, hosts));
    Ok((web.stop()?, took))
}

fn read_all(client: &mut Client) -> io::Result<()> {
    let reads = (0..client.size.div_ceil(STEP)).map(|index| Request::Read {
        offset: index * STEP,
        length: STEP as u32,
    });
    client.all(reads, IN_FLIGHT)
}

/// An nginx that serves the files of a directory.
struct Web {
    child: Child,
    own: tempfile::TempDir,
}

impl Web {
    fn start(directory: &Path) -> Result<Web, String> {
        let own = tempfile::Builder::new()
            .prefix("web.")
            .tempdir_in(directory)
            .map_err(|error| format!("no directory for nginx: {error}"))?;
        let configuration = nginx::configuration(
            own.path(),
            directory,
            "$body_bytes_sent",
            "keepalive_requests 1000000;",
        );
        let file = own.path().join("nginx.conf");
        fs::write(&file, configuration)
            .map_err(|error| format!("nginx's configuration: {error}"))?;
        let mut nginx = command(&nginx::program());
        nginx.arg("-e").arg(own.path().join("error.log"));
        let child = nginx.arg("-c").arg(file).spawn();
        let child = child.map_err(|error| format!("nginx could not be started: {error}"))?;
        let mut web = Web { child, own };
        let start = Instant::now();
        while UnixStream::connect(web.socket()).is_err() {
            if start.elapsed() > LIMIT || matches!(web.child.try_wait(), Ok(Some(_))) {
                let said = fs::read_to_string(web.own.path().join("error.log"));
                let said = command::last_line(&said.unwrap_or_default());
                return Err(format!("nginx does not serve: {said}"));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(web)
    }

    fn socket(&self) -> PathBuf {
        self.own.path().join("socket")
    }

    /// Ends it, and gives the bytes that it has sent.
    fn stop(mut self) -> Result<u64, String> {
        command::end(&mut self.child, LIMIT);
        let lines = fs::read_to_string(self.own.path().join("log"));
        let lines = lines.map_err(|error| format!("nginx's log: {error}"))?;
        lines
            .lines()
            .map(|line| line.parse::<u64>().map_err(|error| error.to_string()))
            .sum()
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        command::end(&mut self.child, Duration::ZERO);
    }
}
