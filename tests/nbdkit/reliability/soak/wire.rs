//! A connection with requests in flight. A thread of its own takes the replies, so that
//! the server can always send, however long a request is being sent to it.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::harness::command::eventually;
use crate::harness::nbd::{
    CHUNK_BLOCK_STATUS, CHUNK_DONE, CHUNK_ERROR, CMD_DISC, SIMPLE_REPLY, STRUCTURED_REPLY, be16,
    be32, be64, greeting, header, negotiate,
};
use crate::harness::run;

pub const CMD_CACHE: u16 = 5;
pub const FLAG_FUA: u16 = 1 << 0;
pub const FLAG_REQ_ONE: u16 = 1 << 3;
pub const FLAG_FAST_ZERO: u16 = 1 << 4;

const CHUNK_NONE: u16 = 0;
const CHUNK_OFFSET_DATA: u16 = 1;

/// The server, as all who speak to it see it.
pub struct Target {
    pub pid: u32,
    pub socket: PathBuf,
    /// The clients are to end when their requests are answered.
    pub stop: AtomicBool,
    /// Something was wrong.
    pub fault: AtomicBool,
    /// The server is being killed.
    pub killed: AtomicBool,
    /// nbdkit 1.32.4 and 1.32.5 may end with a failed assertion when a reply can't be sent;
    /// also with one thread, one request in flight, and no filter.
    pub may_fail_to_reply: bool,
    /// One connects at a time, to see which socket of the server is its own.
    door: Mutex<()>,
}

impl Target {
    pub fn new(pid: u32, socket: PathBuf) -> Target {
        Target {
            pid,
            socket,
            stop: AtomicBool::new(false),
            fault: AtomicBool::new(false),
            killed: AtomicBool::new(false),
            may_fail_to_reply: !run(&["nbdkit", "--version"]).contains(" 1.32."),
            door: Mutex::new(()),
        }
    }

    pub fn is_killed(&self) -> bool {
        self.killed.load(Ordering::Acquire)
    }

    pub fn stops(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// The sockets that the server has open, by what /proc calls them.
    fn sockets(&self) -> HashSet<PathBuf> {
        let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", self.pid)) else {
            return HashSet::new();
        };
        let links = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        links
            .filter(|link| link.to_string_lossy().starts_with("socket:"))
            .collect()
    }
}

#[derive(Debug)]
pub enum Answer {
    Done,
    /// Of a read.
    Bytes(Vec<u8>),
    /// Of block status: length and flags of each extent.
    Extents(Vec<(u32, u32)>),
    /// An errno of NBD.
    Failed(u32),
}

/// What a connection has to tell.
pub enum Event {
    Answered {
        cookie: u64,
        answer: Answer,
    },
    /// There will be no more replies: the connection has ended, or what came is no reply.
    Gone {
        connection: u64,
        why: String,
    },
}

pub struct Connection {
    pub number: u64,
    /// Of the disk, in bytes.
    pub size: u64,
    stream: UnixStream,
    /// The server's socket.
    peer: PathBuf,
    reader: Option<JoinHandle<()>>,
}

impl Connection {
    pub fn open(target: &Target, number: u64, events: &Sender<Event>) -> io::Result<Connection> {
        let _door = target.door.lock().unwrap_or_else(PoisonError::into_inner);
        let before = target.sockets();
        let mut stream = UnixStream::connect(&target.socket)?;
        // What is stuck is found by whoever waits for the reply.
        stream.set_write_timeout(Some(Duration::from_secs(60)))?;
        greeting(&mut stream)?;
        let (size, _) = negotiate(&mut stream, true)?;
        let mut new = target.sockets();
        new.retain(|socket| !before.contains(socket));
        let peer = new.into_iter().next();
        let peer = peer.ok_or_else(|| io::Error::other("the server has no socket for us"))?;
        let mut from = BufReader::with_capacity(1 << 16, stream.try_clone()?);
        let events = events.clone();
        let reader = std::thread::spawn(move || {
            let Err(why) = take_replies(&mut from, &events);
            // Who is told may be gone already.
            let _ = events.send(Event::Gone {
                connection: number,
                why: why.to_string(),
            });
        });
        Ok(Connection {
            number,
            size,
            stream,
            peer,
            reader: Some(reader),
        })
    }

    pub fn send(
        &mut self,
        (command, flags): (u16, u16),
        cookie: u64,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> io::Result<()> {
        let mut message = header(command, flags, cookie, offset, length).to_vec();
        message.extend(payload);
        self.stream.write_all(&message)
    }

    /// Sends bytes as they are: a request, perhaps, of which the rest never comes.
    pub fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Goes away without a word. With `Shutdown::Write` the server can still reply.
    pub fn tear(&mut self, how: Shutdown) {
        // It fails if the server has gone, which is as good.
        let _ = self.stream.shutdown(how);
    }

    /// Whether the server has done with this connection, after [`Connection::tear`]: it
    /// closes its socket after the last request.
    pub fn is_over(&self, target: &Target) -> bool {
        !target.sockets().contains(&self.peer)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // After a tear this fails, and nbdkit has logged it already.
        let _ = self.stream.write_all(&header(CMD_DISC, 0, 0, 0, 0));
        let _ = self.stream.shutdown(Shutdown::Write);
        let Some(reader) = self.reader.take() else {
            return;
        };
        // Replies that nobody takes would be errors in nbdkit's log.
        if !eventually(Duration::from_secs(10), || reader.is_finished()) {
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        let _ = reader.join();
    }
}

fn unexpected(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Until the connection ends, or something comes that is no reply.
fn take_replies(
    from: &mut impl Read,
    events: &Sender<Event>,
) -> io::Result<std::convert::Infallible> {
    let mut begun: HashMap<u64, Answer> = HashMap::new();
    loop {
        let mut head = [0; 16];
        from.read_exact(&mut head)?;
        let cookie = be64(&head[8..]);
        let answer = match be32(&head) {
            SIMPLE_REPLY => match be32(&head[4..]) {
                0 => Answer::Done,
                errno => Answer::Failed(errno),
            },
            STRUCTURED_REPLY => {
                let (flags, kind) = (be16(&head[4..]), be16(&head[6..]));
                let mut length = [0; 4];
                from.read_exact(&mut length)?;
                let mut payload = vec![0; be32(&length) as usize];
                from.read_exact(&mut payload)?;
                let chunk = chunk(kind, payload)?;
                match (begun.remove(&cookie), chunk) {
                    (None, Some(chunk)) => begun.insert(cookie, chunk),
                    (Some(before), None) => begun.insert(cookie, before),
                    (None, None) => None,
                    (Some(_), Some(_)) => {
                        return Err(unexpected(format!("two chunks of request {cookie}")));
                    }
                };
                if flags & CHUNK_DONE == 0 {
                    continue;
                }
                begun.remove(&cookie).unwrap_or(Answer::Done)
            }
            magic => return Err(unexpected(format!("a reply that starts {magic:#x}"))),
        };
        if events.send(Event::Answered { cookie, answer }).is_err() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
    }
}

/// nbdkit sends all of a read in one chunk.
fn chunk(kind: u16, mut payload: Vec<u8>) -> io::Result<Option<Answer>> {
    Ok(match kind {
        CHUNK_NONE => None,
        CHUNK_OFFSET_DATA => Some(Answer::Bytes(payload.split_off(8))),
        CHUNK_BLOCK_STATUS => {
            let pairs = payload[4..].chunks_exact(8);
            let extents = pairs.map(|pair| (be32(pair), be32(&pair[4..])));
            Some(Answer::Extents(extents.collect()))
        }
        kind if kind & CHUNK_ERROR != 0 => Some(Answer::Failed(be32(&payload))),
        kind => return Err(unexpected(format!("a chunk of type {kind}"))),
    })
}
