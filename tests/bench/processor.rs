//! What a request costs the processor: the time that the kernel charges the server's
//! process for, user and system, all threads, divided by the requests.
//!
//! Two rates on two cores say which of two servers the scheduler was kinder to. This
//! time does not wait for anybody, so small differences can be seen in it. What is
//! left of noise (a cache that a neighbour has emptied) lasts for a while, so the servers
//! of all systems run at the same time and do a few milliseconds of work in turn. Each
//! turn is a round.
//!
//! One thing has to be kept out. The first write to memory that a virtual machine has not
//! had from its host yet, or has given back to it (free page reporting), costs ten times
//! as much, and is charged to the server that happens to get it. Large writes take theirs
//! from larger free chunks than small ones, so this does not strike all systems alike.
//! So memory is used in the same way, and freed, just before: [`Lab::use_memory`].
//!
//! The load is the client of [`super::nbd`], which does exactly so many requests, and
//! is connected before the clock is read and after: neither the threads that a
//! connection needs nor the flush at its end is in the time.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use super::fio::Job;
use super::lab::{Lab, Load};
use super::nbd::{Client, Request};
use super::runner::{self, Cell, Failure, Kind, Measured, Row};
use super::server::Server;
use super::systems::System;

/// Most of what is done in one turn: so many bytes, and so many requests.
const BYTES: u64 = 16 << 20;
const REQUESTS: u64 = 1024;
/// Over a base in which each read takes 5 ms.
const SLOW_REQUESTS: u64 = 48;

/// After so many turns a row starts servers anew: how one lies in memory is luck too.
const TURNS: u64 = 10;

/// How long a thread may need to go to sleep after the last reply.
const SETTLE: Duration = Duration::from_millis(1);

/// The processor time of all `loads`.
pub fn rows(lab: &Lab, loads: &[Load]) -> Result<Vec<Row>, String> {
    loads.iter().map(|load| row(lab, load)).collect()
}

fn row(lab: &Lab, load: &Load) -> Result<Row, String> {
    lab.use_memory()?;
    let setup = lab.setup(load);
    let data = vec![0x5a; load.job.block as usize];
    let mut running: BTreeMap<System, Running> = BTreeMap::new();
    let measure = |system| -> Measured {
        if running
            .get(&system)
            .is_none_or(|running| running.turn == TURNS)
        {
            // The old one gives back its memory first.
            running.remove(&system);
            let mut server = setup.start(system, lab.place())?;
            lab.prepare(load, &mut server)?;
            let clients =
                connect(load, &server).map_err(|error| Failure::from(server.explain(error)))?;
            let turn = 0;
            let started = Running {
                clients,
                server,
                turn,
            };
            running.insert(system, started);
        }
        let done = running
            .get_mut(&system)
            .expect("started above")
            .take_turn(load, &data);
        if done.is_err() {
            running.remove(&system);
        }
        done
    };
    let (id, title) = lab.named(&format!("cpu-{}", load.id), &load.title);
    let cell = Cell {
        id,
        title,
        kind: Kind::Processor,
        rounds: if load.slow { lab.rounds } else { lab.turns },
        systems: load.charged(),
        measure: Box::new(measure),
    };
    Ok(runner::run_one(cell))
}

/// The clients of a load, each with one reply, so that its connection is as far as it goes.
fn connect(load: &Load, server: &Server) -> Result<Vec<Client>, String> {
    let client = |_| {
        let mut client = server.client()?;
        let (offset, length) = (0, 4096);
        let read = client.all([Request::Read { offset, length }], 1);
        read.map_err(|error| error.to_string())?;
        Ok(client)
    };
    (0..load.job.connections).map(client).collect()
}

/// A server with its clients, which go first.
struct Running {
    clients: Vec<Client>,
    server: Server,
    turn: u64,
}

impl Running {
    /// Seconds of processor time for each request.
    fn take_turn(&mut self, load: &Load, data: &[u8]) -> Measured {
        let connections = u64::from(load.job.connections);
        let most = if load.slow { SLOW_REQUESTS } else { REQUESTS };
        let each = (BYTES / load.job.block).min(most) / connections;
        let turn = self.turn;
        self.turn += 1;
        let before = self.server.processor_time()?;
        let done = thread::scope(|scope| {
            let mut others = Vec::new();
            let (first, rest) = self.clients.split_first_mut().expect("a connection");
            for (index, client) in (1..).zip(rest) {
                let requests = requests(&load.job, data, index, turn * each, each);
                let depth = load.job.depth as usize;
                others.push(scope.spawn(move || client.all(requests, depth)));
            }
            let requests = requests(&load.job, data, 0, turn * each, each);
            let mut done = first.all(requests, load.job.depth as usize);
            for other in others {
                done = done.and(other.join().expect("a client does not panic"));
            }
            done
        });
        done.map_err(|error| Failure::from(self.server.explain(error.to_string())))?;
        thread::sleep(SETTLE);
        let took = self.server.processor_time()? - before;
        Ok(took.as_secs_f64() / (connections * each) as f64)
    }
}

/// The requests of a job on one of its connections, from its `first` on. No block comes
/// twice, as with fio.
fn requests<'a>(
    job: &Job,
    data: &'a [u8],
    connection: u64,
    first: u64,
    count: u64,
) -> impl Iterator<Item = Request<'a>> + use<'a> {
    let job = *job;
    let share = job.size / u64::from(job.connections);
    let blocks = share / job.block;
    let requests = (first..first + count).flat_map(move |index| {
        let block = if job.is_random() {
            scattered(index, blocks)
        } else {
            index % blocks
        };
        let offset = connection * share + block * job.block;
        let write = match job.pattern {
            "randrw" => index % 10 >= 7,
            _ => !job.reads_only(),
        };
        let request = if write {
            Request::Write { offset, data }
        } else {
            Request::Read {
                offset,
                length: data.len() as u32,
            }
        };
        let every = u64::from(job.flush_every);
        let flush = every > 0 && (index + 1) % every == 0;
        [Some(request), flush.then_some(Request::Flush)]
    });
    requests.flatten()
}

/// All numbers below `count`, a power of two, each once, and neighbours far apart.
pub fn scattered(index: u64, count: u64) -> u64 {
    // A step that has no factor in common with a power of two comes everywhere.
    let step = (count as f64 * 0.618) as u64 | 1;
    index.wrapping_mul(step) % count
}
