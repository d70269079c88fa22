//! A client that need not keep to the rules: it sends any command with any flags, half a
//! request, or nothing more, and takes replies of both forms. What a server may not send
//! is a failed test.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::nbd::{
    self, CHUNK_BLOCK_STATUS, CHUNK_DONE, CHUNK_ERROR, CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE,
    CMD_DISC, CMD_READ, SILENCE, SIMPLE_REPLY, STRUCTURED_REPLY, be16, be32, be64,
};

pub use super::nbd::{
    CMD_BLOCK_STATUS, CMD_FLUSH, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, FLAG_NO_HOLE,
};
pub const CMD_CACHE: u16 = 5;

pub const FLAG_FUA: u16 = 1 << 0;
pub const FLAG_DF: u16 = 1 << 2;
pub const FLAG_REQ_ONE: u16 = 1 << 3;
pub const FLAG_FAST_ZERO: u16 = 1 << 4;

const CHUNK_NONE: u16 = 0;

/// A request as it is sent, with its payload apart.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    pub command: u16,
    pub flags: u16,
    pub handle: u64,
    pub offset: u64,
    pub length: u32,
}

impl Ask {
    pub fn new(command: u16, offset: u64, length: u32) -> Ask {
        Ask {
            command,
            flags: 0,
            handle: offset,
            offset,
            length,
        }
    }

    pub fn with(self, flags: u16) -> Ask {
        Ask { flags, ..self }
    }

    pub fn header(&self) -> [u8; 28] {
        nbd::header(
            self.command,
            self.flags,
            self.handle,
            self.offset,
            self.length,
        )
    }
}

#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Success, with the bytes that were read.
    Done(Vec<u8>),
    /// Success of a block status: (length, flags) of each extent.
    Extents(Vec<(u32, u32)>),
    /// An NBD error.
    Error(u32),
    /// The server has closed the connection.
    Closed,
}

pub struct Raw {
    stream: UnixStream,
    structured: bool,
}

impl Raw {
    /// The default export; structured replies and base:allocation, or simple replies.
    pub fn connect(socket: &Path, structured: bool) -> Raw {
        let mut stream = UnixStream::connect(socket).expect("connect to nbdkit");
        stream.set_read_timeout(Some(SILENCE)).expect("a timeout");
        stream.set_write_timeout(Some(SILENCE)).expect("a timeout");
        nbd::greeting(&mut stream).expect("a greeting");
        nbd::negotiate(&mut stream, structured).expect("negotiate");
        Raw { stream, structured }
    }

    /// A server that has closed the connection is found out by the next [`Raw::answer`].
    pub fn send(&mut self, bytes: &[u8]) {
        if let Err(error) = self.stream.write_all(bytes) {
            let is_closed = matches!(
                error.kind(),
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
            );
            assert!(is_closed, "the server takes nothing: {error}");
        }
    }

    /// Sends a request and waits for its answer.
    pub fn ask(&mut self, ask: Ask, payload: &[u8]) -> Answer {
        self.send(&[&ask.header(), payload].concat());
        self.answer(&[ask]).1
    }

    /// A request that must succeed.
    pub fn done(&mut self, ask: Ask, payload: &[u8]) -> Vec<u8> {
        match self.ask(ask, payload) {
            Answer::Done(data) => data,
            answer => panic!("{ask:?}: {answer:?}"),
        }
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        self.done(Ask::new(CMD_READ, offset, length), &[])
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.done(Ask::new(CMD_WRITE, offset, data.len() as u32), data);
    }

    pub fn flush(&mut self) {
        self.done(Ask::new(CMD_FLUSH, 0, 0), &[]);
    }

    /// The next answer, to one of the requests in flight, and the index of that one (of no
    /// meaning when the connection is closed).
    pub fn answer(&mut self, in_flight: &[Ask]) -> (usize, Answer) {
        let mut head = [0; 16];
        let (mut data, mut extents, mut error) = (Vec::new(), Vec::new(), None);
        let (mut chunks, mut bytes) = (0, 0);
        loop {
            if !self.take(&mut head) {
                return (0, Answer::Closed);
            }
            let (magic, handle) = (be32(&head), be64(&head[8..]));
            let found = in_flight.iter().position(|ask| ask.handle == handle);
            let index = found.unwrap_or_else(|| panic!("a reply to {handle:#x}: {in_flight:?}"));
            let ask = &in_flight[index];
            if magic == SIMPLE_REPLY {
                let is_for_chunks = [CMD_READ, CMD_BLOCK_STATUS].contains(&ask.command);
                assert!(
                    !(self.structured && is_for_chunks),
                    "a simple reply: {ask:?}"
                );
                let errno = be32(&head[4..]);
                if errno != 0 {
                    return (index, Answer::Error(errno));
                }
                if ask.command == CMD_READ {
                    data.resize(ask.length as usize, 0);
                    if !self.take(&mut data) {
                        return (index, Answer::Closed);
                    }
                }
                return (index, Answer::Done(data));
            }
            assert_eq!(magic, STRUCTURED_REPLY, "a reply that is none: {ask:?}");
            assert!(self.structured, "a structured reply: {ask:?}");
            let (flags, kind) = (be16(&head[4..]), be16(&head[6..]));
            let mut length = [0; 4];
            if !self.take(&mut length) {
                return (index, Answer::Closed);
            }
            let mut payload = vec![0; be32(&length) as usize];
            if !self.take(&mut payload) {
                return (index, Answer::Closed);
            }
            match kind {
                CHUNK_NONE => {}
                CHUNK_OFFSET_DATA | CHUNK_OFFSET_HOLE => {
                    data.resize(ask.length as usize, 0);
                    let at = (be64(&payload) - ask.offset) as usize;
                    chunks += 1;
                    // A hole's bytes are zeroes already.
                    if kind == CHUNK_OFFSET_DATA {
                        data[at..at + payload.len() - 8].copy_from_slice(&payload[8..]);
                        bytes += payload.len() - 8;
                    } else {
                        bytes += be32(&payload[8..]) as usize;
                    }
                }
                CHUNK_BLOCK_STATUS => extents.extend(
                    payload[4..]
                        .chunks_exact(8)
                        .map(|pair| (be32(pair), be32(&pair[4..]))),
                ),
                kind if kind & CHUNK_ERROR != 0 => error = Some(be32(&payload)),
                kind => panic!("a chunk of type {kind}: {ask:?}"),
            }
            if flags & CHUNK_DONE != 0 {
                let answer = match error {
                    Some(errno) => Answer::Error(errno),
                    None if ask.command == CMD_BLOCK_STATUS => Answer::Extents(extents),
                    None => {
                        assert_eq!(bytes, data.len(), "not all of {ask:?}");
                        assert!(chunks <= 1 || ask.flags & FLAG_DF == 0, "{ask:?}");
                        Answer::Done(data)
                    }
                };
                return (index, answer);
            }
        }
    }

    /// Waits until an answer has begun to come, and takes nothing of it: a connection that
    /// is closed like this is reset.
    pub fn wait_for_answer(&mut self) {
        let mut polled = libc::pollfd {
            fd: self.stream.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one entry, on a descriptor that `stream` keeps open.
        let ready = unsafe { libc::poll(&mut polled, 1, SILENCE.as_millis() as i32) };
        assert_eq!(ready, 1, "the server says nothing");
    }

    /// Whether the server has read all that was sent.
    pub fn all_is_taken(&self) -> bool {
        let mut left: libc::c_int = 0;
        // SAFETY: TIOCOUTQ stores one int, on a descriptor that `stream` keeps open.
        let told = unsafe { libc::ioctl(self.stream.as_raw_fd(), libc::TIOCOUTQ, &mut left) };
        told == 0 && left == 0
    }

    /// Says that nothing more will come, and waits until the server has closed the
    /// connection too. What it may still send is passed over.
    pub fn end(&mut self) {
        // The server may have closed it first.
        let _ = self.stream.shutdown(Shutdown::Write);
        let mut rest = vec![0; 1 << 16];
        loop {
            match self.stream.read(&mut rest) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                Err(error) => panic!("the server does not close the connection: {error}"),
            }
        }
    }

    /// Ends the connection as the protocol wants it, and waits for the server to do so too.
    pub fn disconnect(mut self) {
        self.send(&Ask::new(CMD_DISC, 0, 0).header());
        self.end();
    }

    /// False: the connection is closed.
    fn take(&mut self, buf: &mut [u8]) -> bool {
        match self.stream.read_exact(buf) {
            Ok(()) => true,
            Err(error) => {
                let is_closed = matches!(
                    error.kind(),
                    ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
                );
                assert!(is_closed, "the server says nothing: {error}");
                false
            }
        }
    }
}
