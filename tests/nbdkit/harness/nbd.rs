//! A small NBD client, for what must not be measured through a large one:
//! nbdinfo and a libnbd in Python take longer over a map of millions of extents
//! than the server does, and so would hide what the server costs.
//!
//! The protocol's names are those of the specification (doc/proto.md in
//! NetworkBlockDevice/nbd). It speaks to servers that the benchmark or the test
//! started itself, so what is not as expected is an error, never a guess.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

const IHAVEOPT: &[u8; 8] = b"IHAVEOPT";
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
pub const REQUEST: u32 = 0x2560_9513;
pub const SIMPLE_REPLY: u32 = 0x6744_6698;
pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;
pub const CHUNK_DONE: u16 = 1;
pub const CHUNK_OFFSET_DATA: u16 = 1;
pub const CHUNK_OFFSET_HOLE: u16 = 2;
pub const CHUNK_BLOCK_STATUS: u16 = 5;
pub const CHUNK_ERROR: u16 = 1 << 15;

pub const CMD_READ: u16 = 0;
pub const CMD_WRITE: u16 = 1;
pub const CMD_DISC: u16 = 2;
pub const CMD_FLUSH: u16 = 3;
pub const CMD_TRIM: u16 = 4;
pub const CMD_WRITE_ZEROES: u16 = 6;
pub const CMD_BLOCK_STATUS: u16 = 7;

pub const FLAG_NO_HOLE: u16 = 1 << 1;

/// How long a server may say nothing at all.
pub const SILENCE: Duration = Duration::from_secs(20);

/// What is asked with one request of up to 4 GiB.
#[derive(Clone, Copy)]
pub enum Request<'a> {
    Read {
        offset: u64,
        length: u32,
    },
    Write {
        offset: u64,
        data: &'a [u8],
    },
    Trim {
        offset: u64,
        length: u32,
    },
    /// The space may be given back.
    Zero {
        offset: u64,
        length: u32,
    },
    /// The space must stay.
    ZeroNoHole {
        offset: u64,
        length: u32,
    },
    Flush,
}

/// A request with any flags, of which the server's errno is an answer like another.
#[derive(Clone, Copy)]
pub struct Single<'a> {
    /// NBD_CMD_...
    pub command: u16,
    pub flags: u16,
    pub offset: u64,
    pub length: u32,
    pub payload: &'a [u8],
}

/// What a server has answered to a [`Single`].
#[derive(Default)]
pub struct Answer {
    /// What was read, in the order of the bytes.
    pub data: Vec<u8>,
    /// (length, flags)
    pub extents: Vec<(u32, u32)>,
}

pub struct Client {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    /// Of the disk, in bytes.
    pub size: u64,
    flags: u16,
    deadline: Option<Instant>,
    payload: Vec<u8>,
    /// Requests that go out together, before the next wait for a reply: millions
    /// of small ones are made here, and each would be a system call or two.
    outgoing: Vec<u8>,
}

fn unexpected(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("NBD: {what}"))
}

/// Takes what the server says first.
pub fn greeting(stream: &mut impl Read) -> io::Result<()> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if &greeting[..8] != b"NBDMAGIC" || &greeting[8..16] != IHAVEOPT {
        return Err(unexpected("not a fixed newstyle server"));
    }
    Ok(())
}

/// Answers the [`greeting`] and chooses the default export: its size in bytes, and its transmission flags. With
/// structured replies and base:allocation, or with neither.
pub fn negotiate(stream: &mut (impl Read + Write), structured: bool) -> io::Result<(u64, u16)> {
    // FIXED_NEWSTYLE and NO_ZEROES.
    stream.write_all(&3u32.to_be_bytes())?;
    if structured {
        option(stream, OPT_STRUCTURED_REPLY, &[])?;
        // No export name, one query.
        let query = b"base:allocation";
        let mut wanted = vec![0, 0, 0, 0, 0, 0, 0, 1];
        wanted.extend((query.len() as u32).to_be_bytes());
        wanted.extend(query);
        option(stream, OPT_SET_META_CONTEXT, &wanted)?;
    }
    // No export name, no information asked for.
    let export = option(stream, OPT_GO, &[0; 6])?;
    export.ok_or_else(|| unexpected("a server that does not describe its export"))
}

/// Sends an option and takes the replies up to the ACK. Gives NBD_INFO_EXPORT (size,
/// flags) if it was among them.
fn option(
    stream: &mut (impl Read + Write),
    option: u32,
    data: &[u8],
) -> io::Result<Option<(u64, u16)>> {
    let mut message = IHAVEOPT.to_vec();
    message.extend(option.to_be_bytes());
    message.extend((data.len() as u32).to_be_bytes());
    message.extend(data);
    stream.write_all(&message)?;
    let mut export = None;
    loop {
        let mut head = [0; 20];
        stream.read_exact(&mut head)?;
        let mut payload = vec![0; be32(&head[16..]) as usize];
        stream.read_exact(&mut payload)?;
        match be32(&head[12..]) {
            REP_ACK => return Ok(export),
            REP_META_CONTEXT => {}
            // NBD_INFO_EXPORT: type, size, flags.
            REP_INFO if payload.len() >= 12 && payload[..2] == [0, 0] => {
                export = Some((be64(&payload[2..]), be16(&payload[10..])));
            }
            REP_INFO => {}
            reply => return Err(unexpected(format!("option {option}: reply {reply:#x}"))),
        }
    }
}

impl Client {
    /// The default export, with structured replies and base:allocation.
    pub fn connect(socket: &Path) -> io::Result<Client> {
        let mut client = Client::greet(socket)?;
        client.negotiate()?;
        Ok(client)
    }

    /// A connection of which only the server has spoken yet; [`Client::negotiate`] is to
    /// follow.
    pub fn greet(socket: &Path) -> io::Result<Client> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        greeting(&mut stream)?;
        Ok(Client {
            reader: BufReader::with_capacity(1 << 18, stream.try_clone()?),
            stream,
            size: 0,
            flags: 0,
            deadline: None,
            payload: Vec::new(),
            outgoing: Vec::new(),
        })
    }

    /// NBD_FLAG_SEND_TRIM
    pub fn can_trim(&self) -> bool {
        self.flags & (1 << 5) != 0
    }

    /// NBD_FLAG_SEND_WRITE_ZEROES
    pub fn can_zero(&self) -> bool {
        self.flags & (1 << 6) != 0
    }

    /// From now on requests fail with `TimedOut` after this time.
    pub fn limit(&mut self, limit: Duration) {
        self.deadline = Some(Instant::now() + limit);
        // If that fails, it waits as long as before.
        let _ = self.stream.set_read_timeout(Some(limit.max(SILENCE)));
    }

    /// Chooses the default export, with structured replies and base:allocation.
    pub fn negotiate(&mut self) -> io::Result<()> {
        (self.size, self.flags) = negotiate(&mut self.stream, true)?;
        Ok(())
    }

    /// Sends the requests with up to `depth` in flight, and waits for them all.
    pub fn all<'a>(
        &mut self,
        requests: impl IntoIterator<Item = Request<'a>>,
        depth: usize,
    ) -> io::Result<()> {
        let mut in_flight = 0;
        for request in requests {
            if in_flight == depth {
                self.reply(None)?;
                in_flight -= 1;
            }
            self.send(request);
            in_flight += 1;
        }
        for _ in 0..in_flight {
            self.reply(None)?;
        }
        Ok(())
    }

    /// Sends a request and waits for its answer. `Err` of the inner result: the errno that
    /// the server gives.
    pub fn single(&mut self, request: &Single<'_>) -> io::Result<Result<Answer, u32>> {
        let mut message = header(
            request.command,
            request.flags,
            0,
            request.offset,
            request.length,
        )
        .to_vec();
        message.extend(request.payload);
        self.stream.write_all(&message)?;
        let mut answer = Answer::default();
        let mut error = None;
        loop {
            let mut head = [0; 16];
            self.reader.read_exact(&mut head)?;
            if be32(&head) == SIMPLE_REPLY {
                // A server that speaks of errors only in this way.
                let errno = be32(&head[4..]);
                return Ok(if errno == 0 { Ok(answer) } else { Err(errno) });
            }
            if be32(&head) != STRUCTURED_REPLY {
                return Err(unexpected("no reply"));
            }
            let (flags, kind) = (be16(&head[4..]), be16(&head[6..]));
            let mut length = [0; 4];
            self.reader.read_exact(&mut length)?;
            self.read_payload(be32(&length) as usize)?;
            match kind {
                CHUNK_OFFSET_DATA | CHUNK_OFFSET_HOLE => {
                    let offset = be64(&self.payload);
                    // Chunks may come in any order; nbdkit sends one.
                    if offset != request.offset + answer.data.len() as u64 {
                        return Err(unexpected("chunks that do not follow each other"));
                    }
                    match kind {
                        CHUNK_OFFSET_DATA => answer.data.extend(&self.payload[8..]),
                        _ => {
                            let end = answer.data.len() + be32(&self.payload[8..]) as usize;
                            answer.data.resize(end, 0);
                        }
                    }
                }
                CHUNK_BLOCK_STATUS => {
                    let pairs = self.payload[4..].chunks_exact(8);
                    let pairs = pairs.map(|pair| (be32(pair), be32(&pair[4..])));
                    answer.extents.extend(pairs);
                }
                _ if kind & CHUNK_ERROR != 0 => error = Some(be32(&self.payload)),
                _ => {}
            }
            if flags & CHUNK_DONE != 0 {
                return Ok(error.map_or(Ok(answer), Err));
            }
        }
    }

    fn send(&mut self, request: Request<'_>) {
        let mut flags = 0;
        let mut payload: &[u8] = &[];
        let (command, offset, length) = match request {
            Request::Read { offset, length } => (CMD_READ, offset, length),
            Request::Write { offset, data } => {
                payload = data;
                (CMD_WRITE, offset, data.len() as u32)
            }
            Request::Trim { offset, length } => (CMD_TRIM, offset, length),
            Request::Zero { offset, length } => (CMD_WRITE_ZEROES, offset, length),
            Request::ZeroNoHole { offset, length } => {
                flags = FLAG_NO_HOLE;
                (CMD_WRITE_ZEROES, offset, length)
            }
            Request::Flush => (CMD_FLUSH, 0, 0),
        };
        // Replies may come in any order; which is which does not matter here.
        let handle = offset;
        self.outgoing
            .extend(header(command, flags, handle, offset, length));
        self.outgoing.extend(payload);
    }

    fn send_outgoing(&mut self) -> io::Result<()> {
        let sent = self.stream.write_all(&self.outgoing);
        self.outgoing.clear();
        sent
    }

    /// How many extents the whole disk has, equal neighbours merged.
    pub fn map(&mut self) -> io::Result<u64> {
        // As nbdinfo asks: as much as fits into 32 bits, in whole blocks.
        const MOST: u64 = (4 << 30) - (64 << 10);
        let (mut offset, mut count, mut last) = (0, 0, u32::MAX);
        let mut extents = Vec::new();
        while offset < self.size {
            let length = MOST.min(self.size - offset) as u32;
            self.outgoing
                .extend(header(CMD_BLOCK_STATUS, 0, offset, offset, length));
            extents.clear();
            self.reply(Some(&mut extents))?;
            if extents.is_empty() {
                return Err(unexpected("block status without extents"));
            }
            for &(length, kind) in &extents {
                offset += u64::from(length);
                count += u64::from(kind != last);
                last = kind;
            }
        }
        Ok(count)
    }

    /// Makes one request and gives its answer, which may be an error's number.
    pub fn ask(&mut self, request: Request<'_>) -> io::Result<Result<(), u32>> {
        self.send(request);
        self.answer(|_, _| {})
    }

    /// As [`Client::ask`], for a read of these bytes.
    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<Result<(), u32>> {
        // What a reply does not send is a hole.
        bytes.fill(0);
        let length = bytes.len() as u32;
        self.send(Request::Read { offset, length });
        self.answer(|kind, payload| {
            if kind == CHUNK_OFFSET_DATA {
                let at = (be64(payload) - offset) as usize;
                let data = &payload[8..];
                bytes[at..at + data.len()].copy_from_slice(data);
            }
        })
    }

    /// Takes one whole reply to a request that must not fail.
    fn reply(&mut self, extents: Option<&mut Vec<(u32, u32)>>) -> io::Result<()> {
        let answer = match extents {
            Some(extents) => self.answer(|kind, payload| {
                if kind == CHUNK_BLOCK_STATUS {
                    let pairs = payload[4..].chunks_exact(8);
                    extents.extend(pairs.map(|pair| (be32(pair), be32(&pair[4..]))));
                }
            }),
            None => self.answer(|_, _| {}),
        };
        answer?.map_err(|errno| unexpected(format!("error {errno}")))
    }

    /// Takes one whole reply, of whatever form: its chunks, by type and payload.
    fn answer(&mut self, mut chunk: impl FnMut(u16, &[u8])) -> io::Result<Result<(), u32>> {
        if self
            .deadline
            .is_some_and(|deadline| Instant::now() > deadline)
        {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if self.reader.buffer().is_empty() {
            self.send_outgoing()?;
        }
        let mut answer = Ok(());
        loop {
            let mut head = [0; 16];
            self.reader.read_exact(&mut head)?;
            match be32(&head) {
                SIMPLE_REPLY => {
                    let errno = be32(&head[4..]);
                    return Ok(if errno == 0 { Ok(()) } else { Err(errno) });
                }
                STRUCTURED_REPLY => {}
                magic => return Err(unexpected(format!("a reply that starts {magic:#x}"))),
            }
            let (flags, kind) = (be16(&head[4..]), be16(&head[6..]));
            let mut length = [0; 4];
            self.reader.read_exact(&mut length)?;
            self.read_payload(be32(&length) as usize)?;
            if kind & CHUNK_ERROR != 0 {
                answer = Err(be32(&self.payload));
            }
            chunk(kind, &self.payload);
            if flags & CHUNK_DONE != 0 {
                return Ok(answer);
            }
        }
    }

    fn read_payload(&mut self, length: usize) -> io::Result<()> {
        self.payload.resize(length, 0);
        self.reader.read_exact(&mut self.payload)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // nbdkit logs a connection that just goes away.
        let _ = self.stream.write_all(&header(CMD_DISC, 0, 0, 0, 0));
    }
}

pub fn header(command: u16, flags: u16, handle: u64, offset: u64, length: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&REQUEST.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&handle.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

pub fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

pub fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

pub fn be64(bytes: &[u8]) -> u64 {
    (u64::from(be32(bytes)) << 32) | u64::from(be32(&bytes[4..]))
}
