//! Signals while 16 requests are in flight: each is answered or fails, and nbdkit ends as it
//! should. A kept overlay has what was acknowledged, and goes on without a complaint.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::place::{Kind, Place};
use crate::harness::command::{LIMIT, eventually, run, signal};
use crate::harness::mount::Mount;
use crate::harness::nbd::CMD_READ;
use crate::harness::raw::{
    Answer, Ask, CMD_CACHE, CMD_FLUSH, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, FLAG_FUA,
    FLAG_NO_HOLE, Raw,
};
use crate::harness::{Base, Server, Setup, log, noise, scratch};

const KINDS: [Kind; 3] = [Kind::Temporary, Kind::Connection, Kind::Kept];

const M: u64 = 1 << 20;
const SIZE: u64 = 16 * M;
const IN_FLIGHT: usize = 16;

/// What is sent. nbdkit takes no notice of a SIGPIPE.
const SIGNALS: [&[libc::c_int]; 5] = [
    &[libc::SIGTERM],
    &[libc::SIGINT],
    &[libc::SIGHUP],
    &[libc::SIGTERM, libc::SIGTERM],
    &[libc::SIGPIPE],
];

/// A request with its payload, and what it makes of the disk.
struct Request {
    ask: Ask,
    payload: Vec<u8>,
}

impl Request {
    fn new(command: u16, flags: u16, offset: u64, length: u32, seed: u64) -> Request {
        let payload = match command {
            CMD_WRITE => noise(seed, length as usize),
            _ => Vec::new(),
        };
        let ask = Ask::new(command, offset, length).with(flags);
        Request { ask, payload }
    }

    fn send(&self, client: &mut Raw) {
        client.send(&[&self.ask.header(), &self.payload[..]].concat());
    }

    fn change(&self, disk: &mut [u8]) {
        let start = self.ask.offset as usize;
        let range = start..start + self.ask.length as usize;
        match self.ask.command {
            CMD_WRITE => disk[range].copy_from_slice(&self.payload),
            CMD_TRIM | CMD_WRITE_ZEROES => disk[range].fill(0),
            _ => {}
        }
    }
}

/// The disk as its clients know it.
struct Model {
    disk: Vec<u8>,
    /// As it would be with all requests that failed, which may have changed something.
    other: Vec<u8>,
}

impl Model {
    fn new() -> Model {
        let disk = noise(1, SIZE as usize);
        Model {
            other: disk.clone(),
            disk,
        }
    }

    fn note(&mut self, request: &Request, answer: &Answer) {
        request.change(&mut self.other);
        if let Answer::Done(data) = answer {
            if request.ask.command == CMD_READ {
                let start = request.ask.offset as usize;
                assert!(
                    *data == self.disk[start..start + data.len()],
                    "{:?}",
                    request.ask
                );
            }
            request.change(&mut self.disk);
        }
    }

    /// Each byte is as it was, or as one of the requests has it. From now on it is known.
    fn look(&mut self, client: &mut Raw) {
        let seen = client.read(0, SIZE as u32);
        let known = self.disk.iter().zip(&self.other).zip(&seen);
        let wrong = known
            .into_iter()
            .position(|((disk, other), seen)| seen != disk && seen != other);
        assert!(wrong.is_none(), "byte {wrong:?} is none of what it may be");
        self.disk.clone_from(&seen);
        self.other = seen;
    }
}

fn send_signals(server: &Server, numbers: &[libc::c_int]) {
    for &number in numbers {
        signal(server.pid(), number);
        let status = format!("/proc/{}/status", server.pid());
        let has_come = || {
            let status = fs::read_to_string(&status).unwrap_or_default();
            !status.lines().any(|line| {
                line.starts_with("ShdPnd:")
                    && line.bytes().any(|byte| (b'1'..=b'9').contains(&byte))
            })
        };
        assert!(eventually(LIMIT, has_come), "signal {number} stays pending");
    }
}

/// Waits for the end of an nbdkit that was told to end, and goes on with its image.
fn expect_clean_end(server: Server, place: &Place, base: &Base, model: Option<&mut Model>) {
    let said = server.end_by_itself();
    assert!(!said.contains("internal error"), "{said}");
    place.assert_sound();
    if let Some(model) = model {
        let server = place.serve(Setup::new(), &["file", base.path()]);
        model.look(&mut Raw::connect(&server.socket(), true));
        assert_eq!(server.stop_and_tell(), "", "that was a clean end");
    }
}

/// A base that answers as long as it is asked to.
struct SlowBase {
    base: Base,
    files: TempDir,
}

impl SlowBase {
    fn new() -> SlowBase {
        SlowBase {
            base: Base::new(&noise(1, SIZE as usize)),
            files: scratch(),
        }
    }

    fn log(&self) -> PathBuf {
        self.files.path().join("log")
    }

    /// One thread for each connection: see `lifecycle`.
    fn serve(&self, place: &Place) -> Server {
        // 0 is no limit.
        fs::write(self.rate(), "0\n").expect("a rate");
        let log = format!("logfile={}", self.log().display());
        let rate = format!("rate-file={}", self.rate().display());
        let plugin = ["file", self.base.path(), &log, &rate];
        let copies = ["cow-on-read=true", "cow-on-cache=true"];
        let setup = Setup::new().option("-t1").below("log").below("rate");
        place.serve(setup, &[&plugin, &copies[..]].concat())
    }

    fn rate(&self) -> PathBuf {
        self.files.path().join("rate")
    }

    /// From now on whoever reads it waits for days, or until nbdkit is to end.
    fn hold_up(&self) {
        // A bit in a second.
        fs::write(self.rate(), "1\n").expect("a rate");
    }
}

/// Each has to read the base.
fn reading_requests(seed: u64) -> Vec<Request> {
    let of = |index: u64| {
        let (command, flags, offset, length) = match index {
            0..4 => (CMD_WRITE, 0, 1000, 512),
            4..6 => (CMD_WRITE, FLAG_FUA, 3000, 10_000),
            6..8 => (CMD_WRITE_ZEROES, FLAG_NO_HOLE, 1000, 512),
            8 => (CMD_WRITE_ZEROES, FLAG_FUA, 1000, 10_000),
            9..13 => (CMD_READ, 0, 100, 512),
            _ => (CMD_CACHE, 0, 0, 512),
        };
        Request::new(
            command,
            flags,
            index * (64 << 10) + offset,
            length,
            seed + index,
        )
    };
    (0..IN_FLIGHT as u64).map(of).collect()
}

/// The requests wait for the base, beside a client that takes nothing of what it has asked for.
#[test]
fn signals_while_the_base_is_waited_for() {
    for kind in KINDS {
        for numbers in SIGNALS {
            let base = SlowBase::new();
            let place = Place::new(kind);
            let server = base.serve(&place);
            let mut model = Model::new();

            let mut stalled = Raw::connect(&server.socket(), false);
            let mut write = |flags, offset, length| {
                let request = Request::new(CMD_WRITE, flags, offset, length, offset);
                let answer = stalled.ask(request.ask, &request.payload);
                model.note(&request, &answer);
            };
            write(0, 2 * M, 64 << 10);
            write(FLAG_FUA, 3 * M + 9, 4 << 20);
            write(0, 8 * M, 4 << 20);
            let large = Ask::new(CMD_READ, 8 * M, 4 << 20);
            stalled.send(&[large.header(), large.header()].concat());
            // The rest of it is more than the socket holds.
            stalled.wait_for_answer();

            base.hold_up();
            let connect = |_| Raw::connect(&server.socket(), true);
            let mut clients: Vec<_> = (0..IN_FLIGHT).map(connect).collect();
            let requests = reading_requests(7);
            for (client, request) in clients.iter_mut().zip(&requests) {
                request.send(client);
            }
            let all = || log::in_flight(&base.log()) == IN_FLIGHT;
            assert!(eventually(LIMIT, all), "{}", log::in_flight(&base.log()));

            send_signals(&server, numbers);
            if numbers == [libc::SIGPIPE] {
                assert!(all(), "a request was given up");
                send_signals(&server, &[libc::SIGTERM]);
            }
            for (client, request) in clients.iter_mut().zip(&requests) {
                let (_, answer) = client.answer(&[request.ask]);
                model.note(request, &answer);
            }
            // nbdkit waits for its clients to go.
            drop((clients, stalled));
            let model = (kind == Kind::Kept).then_some(&mut model);
            expect_clean_end(server, &place, &base.base, model);
        }
    }
}

/// A file system that stores nothing until the value goes. It must go before the server does,
/// which the system can't end until then.
struct Frozen<'a>(&'a Path);

impl Frozen<'_> {
    fn new(path: &Path) -> Frozen<'_> {
        run(&[
            "fsfreeze",
            "--freeze",
            path.to_str().expect("a path of ours"),
        ]);
        Frozen(path)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        run(&[
            "fsfreeze",
            "--unfreeze",
            self.0.to_str().expect("a path of ours"),
        ]);
    }
}

/// How many threads wait for a file system or a disk.
fn waiting(server: &Server) -> usize {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).expect("nbdkit's threads");
    let stats = tasks.map(|task| fs::read_to_string(task.expect("a thread").path().join("stat")));
    // A thread may have ended since it was listed.
    stats
        .filter(|stat| stat.as_ref().is_ok_and(|stat| stat.contains(") D ")))
        .count()
}

/// What is stored before, so that the requests find data.
fn data(seed: u64) -> Vec<Request> {
    let write = |area: u64| Request::new(CMD_WRITE, 0, area * M, 64 << 10, seed + area);
    (4..9).map(write).collect()
}

/// Each has to store something, or has it done behind its back.
fn storing_requests(seed: u64) -> Vec<Request> {
    let half = M / 2;
    let mut requests: Vec<_> = [
        (CMD_WRITE, 0, 0, 64 << 10),
        (CMD_WRITE, 0, M, 64 << 10),
        (CMD_WRITE, 0, 2 * M, 64 << 10),
        (CMD_WRITE, 0, 4 * M, 4096),
        // Parts of blocks that are the base's.
        (CMD_WRITE, 0, half + 100, 1000),
        (CMD_WRITE, 0, M + half + 100, 1000),
        (CMD_WRITE, FLAG_FUA, 2 * M + half + 100, 1000),
        (CMD_WRITE, FLAG_FUA, 3 * M, 4096),
        (CMD_WRITE_ZEROES, FLAG_NO_HOLE, 5 * M, 64 << 10),
        (CMD_WRITE_ZEROES, FLAG_NO_HOLE, 6 * M + 10, 1000),
        (CMD_WRITE_ZEROES, FLAG_FUA, 7 * M, 64 << 10),
        // Data, which is punched out then, and the base's.
        (CMD_TRIM, 0, 8 * M, 64 << 10),
        (CMD_TRIM, FLAG_FUA, 9 * M, 64 << 10),
        (CMD_WRITE, 0, 10 * M + half - 1, 1 << 20),
        (CMD_FLUSH, 0, 0, 0),
        (CMD_FLUSH, 0, 0, 0),
    ]
    .into_iter()
    .map(|(command, flags, offset, length)| {
        Request::new(command, flags, offset, length, seed + offset)
    })
    .collect();
    for (handle, request) in (0..).zip(&mut requests) {
        request.ask.handle = handle;
    }
    assert_eq!(requests.len(), IN_FLIGHT);
    requests
}

/// The file system of the overlay takes nothing while the signal comes: writes, flushes,
/// read-modify-writes and the punching of holes are under way then.
#[test]
fn signals_while_the_overlay_is_waited_for() {
    let base = Base::new(&noise(1, SIZE as usize));
    for kind in KINDS {
        let mount = Mount::formatted("ext4");
        let place = Place::on(&mount, kind);
        let mut model = Model::new();
        for (number, numbers) in SIGNALS.iter().enumerate() {
            let seed = 100 * number as u64;
            if kind != Kind::Kept {
                model = Model::new();
            }
            let server = place.serve(Setup::new(), &["file", base.path()]);
            let mut client = Raw::connect(&server.socket(), true);
            for request in data(seed) {
                model.note(&request, &client.ask(request.ask, &request.payload));
            }
            client.flush();

            let frozen = Frozen::new(mount.path());
            let requests = storing_requests(seed);
            requests
                .iter()
                .for_each(|request| request.send(&mut client));
            let all = || client.all_is_taken() && waiting(&server) > 1;
            assert!(eventually(LIMIT, all), "{} threads wait", waiting(&server));
            send_signals(&server, numbers);
            drop(frozen);

            let mut asks: Vec<_> = requests.iter().map(|request| request.ask).collect();
            let mut left = requests;
            while !left.is_empty() {
                let (index, answer) = client.answer(&asks);
                let request = left.swap_remove(index);
                asks.swap_remove(index);
                model.note(&request, &answer);
                if *numbers == [libc::SIGPIPE] {
                    assert!(
                        matches!(answer, Answer::Done(_)),
                        "{:?}: {answer:?}",
                        request.ask
                    );
                }
            }
            if *numbers == [libc::SIGPIPE] {
                model.look(&mut client);
                send_signals(&server, &[libc::SIGTERM]);
            }
            drop(client);
            let model = (kind == Kind::Kept).then_some(&mut model);
            expect_clean_end(server, &place, &base, model);
        }
    }
}
