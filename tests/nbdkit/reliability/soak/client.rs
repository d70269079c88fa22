//! The client of a region: sends requests of every kind over its connections, with many
//! in flight, and holds every reply against its model.
//!
//! Two of its requests that change the same byte are never in flight together, so the
//! model knows what comes of them. A read may be beside a change, and then finds the old
//! bytes or the new ones. In one *block* there are many changes at once, of this client and
//! of its neighbours.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::ops::Range;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::bytes::{Change, Wrong};
use super::mix::{Kind, Mix, Random};
use super::region::{Disk, Region};
use super::tally::Tally;
use super::wire::{Answer, Connection, Event, Target};

/// What is not answered until then never is.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// How many steps are remembered for whoever looks for the reason of a fault.
const REMEMBERED: usize = 50_000;

/// Why a client ends early.
pub enum Halt {
    /// The server was killed.
    Killed,
    Fault(String),
}

impl From<String> for Halt {
    fn from(fault: String) -> Halt {
        Halt::Fault(fault)
    }
}

pub type Result<T = ()> = std::result::Result<T, Halt>;

/// What a read may find.
pub struct Expectation {
    /// The part of the request that lies in the client's own region.
    pub own: Range<u64>,
    pub before: Vec<u8>,
    /// Those that were in flight beside it.
    pub changes: Vec<Change>,
}

pub enum What {
    Read(Expectation),
    /// Finds out what became of the changes of these numbers, in units of so many bytes.
    Settle(Expectation, Vec<u64>, u64),
    Status(Expectation),
    Change(Change),
    Cache,
    Flush,
}

pub struct Request {
    /// For messages.
    pub name: &'static str,
    pub flags: u16,
    pub connection: u64,
    pub range: Range<u64>,
    pub what: What,
}

impl Request {
    /// What may be there before it is answered.
    pub fn changes(&self) -> &[Change] {
        match &self.what {
            What::Change(change) => std::slice::from_ref(change),
            What::Settle(expectation, ..) => &expectation.changes,
            _ => &[],
        }
    }

    pub fn keeps_others_out_of(&self, range: &Range<u64>) -> bool {
        matches!(self.what, What::Change(_) | What::Settle(..)) && overlap(&self.range, range)
    }
}

pub fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// A connection that was torn. Until the server has done with it, the requests that were
/// in flight may or may not be carried out.
pub struct Torn {
    pub connection: Connection,
    pub since: Instant,
    /// By their numbers.
    pub requests: BTreeMap<u64, Request>,
}

/// A change that was in flight together with another one of the same bytes: which of the
/// two is there is known when both are over.
pub struct Met {
    pub number: u64,
    pub change: Change,
    pub is_over: bool,
}

/// One step, to be read by whoever looks for the reason of a fault.
pub struct Step {
    time: u64,
    connection: u64,
    name: &'static str,
    event: &'static str,
    cookie: u64,
    range: Range<u64>,
    flags: u16,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Step {
            time,
            connection,
            name,
            event,
            cookie,
            range,
            flags,
        } = self;
        let length = range.end - range.start;
        write!(
            f,
            "{time} connection {connection} request {cookie} {event}: {name} {}+{length} flags {flags:#x}",
            range.start
        )
    }
}

pub struct Client<'a> {
    pub mix: &'a Mix,
    pub disk: &'a Disk,
    pub target: &'a Target,
    pub region: &'a mut Region,
    pub random: Random,
    sender: Sender<Event>,
    events: Receiver<Event>,
    pub connections: Vec<Connection>,
    opened: u64,
    pub in_flight: BTreeMap<u64, Request>,
    pub torn: Vec<Torn>,
    pub met: Vec<Met>,
    /// Requests of torn connections, which may be answered all the same.
    pub given_up: BTreeSet<u64>,
    /// Counts what happens, and is the number of each request.
    pub clock: u64,
    /// Most requests go near this place, so that they meet, and much of the disk stays as
    /// it was for some time.
    pub focus: u64,
    pub tally: Tally,
    pub steps: VecDeque<Step>,
}

impl<'a> Client<'a> {
    pub fn new(
        mix: &'a Mix,
        disk: &'a Disk,
        target: &'a Target,
        region: &'a mut Region,
        phase: u64,
    ) -> Client<'a> {
        let (sender, events) = channel();
        let seed = mix.seed ^ (phase << 32) ^ (region.number as u64);
        Client {
            mix,
            disk,
            target,
            focus: region.range.start,
            region,
            random: Random::new(super::bytes::mix(seed, 1)),
            sender,
            events,
            connections: Vec::new(),
            opened: 0,
            in_flight: BTreeMap::new(),
            torn: Vec::new(),
            met: Vec::new(),
            given_up: BTreeSet::new(),
            // No two phases write the same bytes.
            clock: phase << 40,
            tally: Tally::default(),
            steps: VecDeque::new(),
        }
    }

    /// Until it is told to stop, the server is killed, or something is wrong.
    pub fn run(&mut self) -> Result {
        for _ in 0..self.mix.connections_each {
            self.connect()?;
        }
        self.look_at_all()?;
        while !self.target.stops() {
            if self.in_flight.len() >= self.mix.depth || !self.request()? {
                self.wait()?;
            }
            if self.random.once_in(self.mix.tears) {
                self.tear()?;
            }
        }
        self.look_at_all()
    }

    pub fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    pub fn connect(&mut self) -> Result {
        self.opened += 1;
        let number = ((self.region.number as u64) << 32) + self.opened;
        let connection = Connection::open(self.target, number, &self.sender);
        let connection = connection.map_err(|error| self.halt(format!("connecting: {error}")))?;
        if connection.size != self.disk.size {
            return Err(format!("a disk of {} bytes", connection.size).into());
        }
        self.connections.push(connection);
        self.tally.happened("connections", 1);
        if self.mix.kind == Kind::PerConnection {
            self.region.now = self.disk.part(&self.region.range);
        }
        Ok(())
    }

    /// Everything fails when the server is killed.
    pub fn halt(&self, fault: String) -> Halt {
        match self.target.is_killed() {
            true => Halt::Killed,
            false => Halt::Fault(fault),
        }
    }

    /// Whether nothing may be sent that changes bytes of this range.
    pub fn is_busy(&self, range: &Range<u64>) -> bool {
        let torn = self.torn.iter().flat_map(|torn| torn.requests.values());
        let mut all = self.in_flight.values().chain(torn);
        all.any(|request| request.keeps_others_out_of(range))
            || self.met.iter().any(|met| overlap(&met.change.range, range))
    }

    /// What a read of this range may find that is sent now.
    pub fn expectation(&self, range: &Range<u64>) -> Expectation {
        let region = &self.region.range;
        let start = range.start.clamp(region.start, region.end);
        let own = start..range.end.clamp(start, region.end);
        let torn = self.torn.iter().flat_map(|torn| torn.requests.values());
        let all = self.in_flight.values().chain(torn);
        let mut changes: Vec<Change> = self.met.iter().map(|met| met.change.clone()).collect();
        for request in all {
            // Where the rest of a change was looked at already, there may be newer ones.
            changes.extend(request.changes().iter().map(|change| {
                let start = change
                    .range
                    .start
                    .clamp(request.range.start, request.range.end);
                let end = change.range.end.clamp(start, request.range.end);
                Change {
                    range: start..end,
                    ..change.clone()
                }
            }));
        }
        changes.retain(|change| overlap(&change.range, &own));
        Expectation {
            before: self.region.now.get(&own),
            changes,
            own,
        }
    }

    /// Sends a request over any connection. The command is NBD's.
    pub fn send(
        &mut self,
        command: u16,
        (name, flags): (&'static str, u16),
        range: Range<u64>,
        payload: &[u8],
        what: impl FnOnce(u64) -> What,
    ) -> Result {
        let cookie = self.tick();
        let at = self.random.below(self.connections.len() as u64) as usize;
        let connection = self.connections[at].number;
        let request = Request {
            name,
            flags,
            connection,
            range: range.clone(),
            what: what(cookie),
        };
        if let What::Change(change) = &request.what {
            self.region.issued(cookie, change);
            self.note_who_meets(cookie, change);
            for other in self.in_flight.values_mut() {
                if let What::Read(expectation) | What::Status(expectation) = &mut other.what {
                    if overlap(&expectation.own, &range) {
                        expectation.changes.push(change.clone());
                    }
                }
            }
        }
        self.remember(cookie, &request, "sent");
        self.in_flight.insert(cookie, request);
        let length = (range.end - range.start) as u32;
        self.connections[at]
            .send((command, flags), cookie, range.start, length, payload)
            .map_err(|error| self.halt(format!("sending a {name}: {error}")))
    }

    pub fn remember(&mut self, cookie: u64, request: &Request, event: &'static str) {
        if self.steps.len() == REMEMBERED {
            self.steps.pop_front();
        }
        self.steps.push_back(Step {
            time: self.clock,
            connection: request.connection,
            name: request.name,
            event,
            cookie,
            range: request.range.clone(),
            flags: request.flags,
        });
    }

    /// Takes one reply.
    pub fn wait(&mut self) -> Result {
        let start = Instant::now();
        loop {
            self.look_at_torn()?;
            if self.in_flight.is_empty() && self.torn.is_empty() {
                return Ok(());
            }
            let pause = match self.torn.is_empty() {
                true => PATIENCE,
                false => Duration::from_millis(5),
            };
            match self.events.recv_timeout(pause) {
                Ok(Event::Answered { cookie, answer }) => {
                    return self.take(cookie, answer);
                }
                Ok(Event::Gone { connection, why }) => {
                    if self
                        .connections
                        .iter()
                        .any(|ours| ours.number == connection)
                    {
                        return Err(self.halt(format!("connection {connection} has ended: {why}")));
                    }
                }
                Err(RecvTimeoutError::Timeout) if start.elapsed() < PATIENCE => {}
                Err(error) => {
                    let names: Vec<_> = self
                        .in_flight
                        .values()
                        .map(|request| request.name)
                        .collect();
                    return Err(self.halt(format!("no reply to {names:?}: {error}")));
                }
            }
        }
    }

    fn take(&mut self, cookie: u64, answer: Answer) -> Result {
        self.tick();
        let Some(request) = self.in_flight.remove(&cookie) else {
            return match self.given_up.remove(&cookie) {
                true => Ok(()),
                false => Err(format!("a reply to a request {cookie} that was not sent").into()),
            };
        };
        let event = match answer {
            Answer::Failed(_) => "failed",
            _ => "answered",
        };
        self.remember(cookie, &request, event);
        self.answered(cookie, request, answer)
    }

    /// Waits for all requests, and looks at all of the region.
    fn look_at_all(&mut self) -> Result {
        self.drain()?;
        let mut pieces = self.region.pieces();
        pieces.extend((0..8).map(|_| self.elsewhere()));
        for piece in pieces {
            while self.in_flight.len() >= self.mix.depth {
                self.wait()?;
            }
            self.read("look", piece)?;
        }
        self.drain()
    }

    fn drain(&mut self) -> Result {
        while !self.in_flight.is_empty() || !self.torn.is_empty() {
            self.wait()?;
        }
        Ok(())
    }

    /// For messages: where something was wrong.
    pub fn wrong(&self, request: &Request, wrong: &Wrong) -> Halt {
        Halt::Fault(format!(
            "region {} ({:?}), {} of {:?}, block {} of {}: {wrong}",
            self.region.number,
            self.region.range,
            request.name,
            request.range,
            wrong.offset / self.mix.block,
            self.mix.block,
        ))
    }
}
