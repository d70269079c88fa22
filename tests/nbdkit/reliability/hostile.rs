//! A client that breaks the rules of the protocol: requests of every kind at every edge of
//! the disk, and requests that end too early. What nbdkit refuses by itself must not change
//! the disk either, so all of it is compared with a model.

use std::fmt::Debug;
use std::ops::Range;

use super::place::{BLOCK, Figures, Kind, Place};
use crate::harness::mount::Mount;
use crate::harness::nbd::{CMD_DISC, CMD_READ};
use crate::harness::raw::{
    Answer, Ask, CMD_BLOCK_STATUS, CMD_CACHE, CMD_FLUSH, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES,
    FLAG_DF, FLAG_FAST_ZERO, FLAG_FUA, FLAG_NO_HOLE, FLAG_REQ_ONE, Raw,
};
use crate::harness::{Server, Setup};

const M: u64 = 1 << 20;

/// What nbdkit lets a client read or write at once.
const LARGEST: u32 = 64 << 20;

const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;
/// What the protocol has a number for.
const ERRORS: [u32; 8] = [1, 5, 12, 22, ENOSPC, 75, ENOTSUP, 108];

/// Of the disk over the `pattern` plugin, whose bytes are the offsets of their words.
struct Model {
    size: u64,
    /// In the order in which they were made.
    changes: Vec<(Range<u64>, Change)>,
}

#[derive(Clone, Copy)]
enum Change {
    Written {
        seed: u64,
    },
    Zeroed,
    /// Whole blocks are zeroes; other bytes are as they were, or zeroes.
    Trimmed,
}

fn written(seed: u64, offset: u64) -> u8 {
    // Never zero, and different from its neighbours and from another seed.
    (seed.wrapping_mul(31).wrapping_add(offset.wrapping_mul(7)) >> (offset % 5)) as u8 | 1
}

fn payload(seed: u64, ask: Ask) -> Vec<u8> {
    let at = |index: u32| written(seed, ask.offset.wrapping_add(index.into()));
    (0..ask.length).map(at).collect()
}

impl Model {
    fn new(size: u64) -> Model {
        let changes = Vec::new();
        Model { size, changes }
    }

    fn change(&mut self, range: Range<u64>, change: Change) {
        let covered = match change {
            Change::Trimmed => self.whole_blocks(&range),
            Change::Written { .. } | Change::Zeroed => range.clone(),
        };
        self.changes
            .retain(|(older, _)| older.start < covered.start || older.end > covered.end);
        self.changes.push((range, change));
    }

    /// The last block of the disk need not have the size of a block.
    fn whole_blocks(&self, range: &Range<u64>) -> Range<u64> {
        let start = range.start.next_multiple_of(BLOCK);
        let is_last = range.end == self.size;
        let end = if is_last {
            range.end
        } else {
            range.end / BLOCK * BLOCK
        };
        start..end.max(start)
    }

    fn may_be(&self, offset: u64, byte: u8) -> bool {
        for (range, change) in self.changes.iter().rev() {
            if !range.contains(&offset) {
                continue;
            }
            match change {
                Change::Written { seed } => return byte == written(*seed, offset),
                Change::Zeroed => return byte == 0,
                Change::Trimmed if self.whole_blocks(range).contains(&offset) => return byte == 0,
                Change::Trimmed if byte == 0 => return true,
                Change::Trimmed => {}
            }
        }
        byte == (offset & !7).to_be_bytes()[(offset % 8) as usize]
    }

    fn expect(&self, offset: u64, bytes: &[u8], context: &dyn Debug) {
        let wrong = (offset..)
            .zip(bytes)
            .find(|(at, byte)| !self.may_be(*at, **byte));
        assert!(
            wrong.is_none(),
            "(offset, byte) {wrong:?} after {context:?}"
        );
    }

    /// That extents cover the request, and that zeroes may be read where they say so.
    fn expect_extents(&self, ask: Ask, extents: &[(u32, u32)]) {
        let end = ask.offset + u64::from(ask.length);
        let mut at = ask.offset;
        for &(length, kind) in extents {
            assert!(length > 0 && kind <= 3 && at < end, "{ask:?}: {extents:?}");
            let next = at + u64::from(length);
            assert!(next <= self.size, "{ask:?}: {extents:?}");
            let is_right = kind & 2 == 0 || [at, next - 1].iter().all(|&at| self.may_be(at, 0));
            assert!(is_right, "{ask:?}: {extents:?}");
            at = next;
        }
        let one = ask.flags & FLAG_REQ_ONE != 0;
        assert!(
            !extents.is_empty() && (!one || extents.len() == 1 && at <= end),
            "{ask:?}"
        );
    }
}

/// All that there are, writes between those that take away what was written, and some that
/// there are not.
const COMMANDS: [u16; 14] = [
    CMD_FLUSH,
    CMD_WRITE,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    CMD_WRITE,
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_READ,
    CMD_DISC,
    8,
    9,
    0xff,
    0xffff,
];

/// What may come back.
enum Rule {
    /// The request is right. It succeeds, or fails for one of these reasons.
    Right(&'static [u32]),
    /// The protocol leaves it to the server, and nothing changes.
    Either,
    /// An error.
    Wrong,
}

fn rule(ask: Ask, structured: bool, size: u64) -> Rule {
    let df = if structured { FLAG_DF } else { 0 };
    let allowed = match ask.command {
        CMD_READ => df,
        CMD_WRITE | CMD_TRIM => FLAG_FUA,
        CMD_WRITE_ZEROES => FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST_ZERO,
        CMD_BLOCK_STATUS if structured => FLAG_REQ_ONE,
        CMD_CACHE | CMD_FLUSH => 0,
        _ => return Rule::Wrong,
    };
    let end = ask.offset.checked_add(ask.length.into());
    let is_within = match ask.command {
        CMD_FLUSH => ask.offset == 0 && ask.length == 0,
        CMD_READ | CMD_WRITE if ask.length > LARGEST => false,
        _ => end.is_some_and(|end| end <= size),
    };
    if !is_within || ask.flags & !(allowed | FLAG_FUA) != 0 {
        return Rule::Wrong;
    }
    let is_empty = ask.length == 0 && ask.command != CMD_FLUSH;
    if is_empty || ask.flags & !allowed != 0 {
        return Rule::Either;
    }
    let is_large = u64::from(ask.length) > M;
    match ask.command {
        CMD_WRITE_ZEROES if ask.flags & FLAG_FAST_ZERO != 0 => Rule::Right(&[ENOTSUP]),
        // Space for 4 GiB of zeroes need not be there.
        CMD_WRITE_ZEROES if ask.flags & FLAG_NO_HOLE != 0 && is_large => Rule::Right(&[ENOSPC]),
        _ => Rule::Right(&[]),
    }
}

/// Where requests go: (offset, length).
fn places(size: u64) -> Vec<(u64, u32)> {
    const MOST: u32 = u32::MAX;
    let mut places = vec![
        (0, 0),
        (0, 1),
        (1, 1),
        (0, size.min(BLOCK) as u32),
        (1, size.min(2 * BLOCK) as u32),
        (size - 1, 0),
        (size - 1, 1),
        (size - 1, 2),
        (size, 0),
        (size, 1),
        (size + 1, 1),
        (0, MOST),
        (1, MOST),
        (size - 1, MOST),
        (1 << 63, 512),
        (u64::MAX, 1),
        (u64::MAX - 10, MOST),
    ];
    if size > u64::from(MOST) {
        places.extend([
            (size - u64::from(MOST), MOST),
            // Over the border of 4 GiB, and of an area of the lock.
            (u64::from(MOST) - 3 * BLOCK, 6 * BLOCK as u32 + 77),
            (size / 2 - M - 3, 2 * M as u32),
        ]);
    }
    places
}

/// A server, the model of its overlay, and the connection that breaks the rules.
struct Hostile<'a> {
    server: &'a Server,
    kind: Kind,
    client: Raw,
    structured: bool,
    model: Model,
    seed: u64,
}

impl<'a> Hostile<'a> {
    fn new(server: &'a Server, kind: Kind, size: u64) -> Hostile<'a> {
        Hostile {
            server,
            kind,
            client: Raw::connect(&server.socket(), true),
            structured: true,
            model: Model::new(size),
            seed: size,
        }
    }

    fn connect(&mut self, structured: bool) {
        self.structured = structured;
        self.client = Raw::connect(&self.server.socket(), structured);
        if self.kind == Kind::Connection {
            self.model.changes.clear();
        }
    }

    fn ask_with_all_flags(&mut self, ask: Ask) {
        // After these the client has to connect again, whatever the flags are.
        let closes = ask.command == CMD_DISC || ask.command == CMD_WRITE && ask.length > LARGEST;
        let defined = if closes { 0..2 } else { 0..64 };
        for flags in defined.chain([1 << 6, 1 << 10, 1 << 15, u16::MAX]) {
            self.ask(ask.with(flags));
        }
    }

    /// Sends one request, and looks at its answer.
    fn ask(&mut self, ask: Ask) {
        if ask.command == CMD_DISC {
            return self.disconnect(ask);
        }
        self.seed += 1;
        let rule = rule(ask, self.structured, self.model.size);
        let is_too_long = ask.command == CMD_WRITE && ask.length > LARGEST;
        let payload = match ask.command {
            // nbdkit does not wait for the bytes of a write that is far too long.
            CMD_WRITE if !is_too_long => payload(self.seed, ask),
            _ => Vec::new(),
        };
        match self.client.ask(ask, &payload) {
            Answer::Closed => {
                assert!(is_too_long, "{ask:?} closed the connection");
                self.connect(self.structured);
            }
            Answer::Error(errno) => {
                assert!(ERRORS.contains(&errno), "{ask:?}: {errno}");
                if let Rule::Right(reasons) = rule {
                    assert!(reasons.contains(&errno), "{ask:?}: {errno}");
                    if errno == ENOSPC {
                        self.take_back(ask);
                    }
                }
            }
            Answer::Done(data) => {
                assert!(!matches!(rule, Rule::Wrong), "{ask:?} succeeds");
                self.model.expect(ask.offset, &data, &ask);
                self.note(ask);
            }
            Answer::Extents(extents) => {
                assert!(!matches!(rule, Rule::Wrong), "{ask:?} succeeds");
                self.model.expect_extents(ask, &extents);
            }
        }
    }

    /// It has no answer, and nbdkit 1.48 may wait until the client closes the connection too.
    fn disconnect(&mut self, ask: Ask) {
        self.client.send(&ask.header());
        self.client.end();
        self.connect(self.structured);
    }

    /// Of zeroes for which there was no space any may be there. After a trim it is known
    /// which, and the next request has space.
    fn take_back(&mut self, ask: Ask) {
        let trim = Ask {
            command: CMD_TRIM,
            flags: 0,
            ..ask
        };
        self.client.done(trim, &[]);
        self.note(trim);
    }

    /// A change that was acknowledged.
    fn note(&mut self, ask: Ask) {
        let change = match ask.command {
            CMD_WRITE => Change::Written { seed: self.seed },
            CMD_WRITE_ZEROES => Change::Zeroed,
            CMD_TRIM => Change::Trimmed,
            _ => return,
        };
        let range = ask.offset..ask.offset + u64::from(ask.length);
        self.model.change(range, change);
    }

    /// Reads about all places, by this client and by another one.
    fn look(&mut self, context: &dyn Debug, other: &mut Raw) {
        let size = self.model.size;
        let untouched = Model::new(size);
        for (offset, length) in places(size) {
            for edge in [offset, offset.saturating_add(length.into())] {
                let from = edge.saturating_sub(BLOCK + 3);
                let length = (2 * BLOCK).min(size.saturating_sub(from)) as u32;
                if length == 0 {
                    continue;
                }
                let seen = self.client.read(from, length);
                self.model.expect(from, &seen, context);
                let model = match self.kind {
                    Kind::Connection => &untouched,
                    Kind::Temporary | Kind::Kept => &self.model,
                };
                model.expect(from, &other.read(from, length), context);
            }
        }
    }
}

/// Every command, also ones that there are not, with all flags and others, everywhere.
fn every_request(kind: Kind) {
    for size in [1, BLOCK + 1, 3 << 40] {
        // Gigabytes of zeroes are asked for too, and must take no space of others.
        let mount = Mount::tmpfs("24M");
        let place = Place::on(&mount, kind);
        let server = place.serve(Setup::new(), &["pattern", &size.to_string()]);
        let mut other = Raw::connect(&server.socket(), true);
        let mut hostile = Hostile::new(&server, kind, size);
        for structured in [true, false] {
            hostile.connect(structured);
            for command in COMMANDS {
                for (offset, length) in places(size) {
                    hostile.ask_with_all_flags(Ask::new(command, offset, length));
                    hostile.look(&(command, offset, length), &mut other);
                }
            }
            for length in [LARGEST, LARGEST + 1] {
                hostile.ask(Ask::new(CMD_READ, 1, length));
            }
        }
        drop((hostile, other));
        server.stop();
        place.assert_sound();
    }
}

#[test]
fn every_request_is_answered_by_the_rules() {
    every_request(Kind::Temporary);
}

#[test]
fn every_request_is_answered_by_the_rules_over_an_overlay_of_the_connection() {
    every_request(Kind::Connection);
}

#[test]
fn every_request_is_answered_by_the_rules_over_an_image() {
    every_request(Kind::Kept);
}

/// Ends a connection: politely and when the server has seen to it, or at once.
fn leave(mut client: Raw, politely: bool) {
    if politely {
        client.end();
    }
}

/// A request of which a part did not come changes nothing, whichever part that is.
fn cut_off(kind: Kind) {
    const SIZE: u64 = 1 << 20;
    let place = Place::new(kind);
    let server = place.serve(Setup::new(), &["pattern", &SIZE.to_string()]);
    let mut model = Model::new(SIZE);
    let first = Ask::new(CMD_WRITE, BLOCK - 9, 3 * BLOCK as u32);
    Raw::connect(&server.socket(), true).write(first.offset, &payload(1, first));
    if kind != Kind::Connection {
        model.change(BLOCK - 9..4 * BLOCK - 9, Change::Written { seed: 1 });
    }
    let figures = Figures::when_idle(&server);
    for (command, flags) in [
        (CMD_READ, 0),
        (CMD_WRITE, 0),
        (CMD_WRITE, FLAG_FUA),
        (CMD_DISC, 0),
        (CMD_FLUSH, 0),
        (CMD_TRIM, FLAG_FUA),
        (CMD_CACHE, 0),
        (CMD_WRITE_ZEROES, 0),
        (CMD_WRITE_ZEROES, FLAG_NO_HOLE),
        (CMD_BLOCK_STATUS, 0),
    ] {
        // Parts of blocks and a whole one, some of which are stored already.
        let ask = match command {
            CMD_DISC | CMD_FLUSH => Ask::new(command, 0, 0),
            _ => Ask::new(command, 100, 2 * BLOCK as u32).with(flags),
        };
        let mut whole = ask.header().to_vec();
        let mut cuts: Vec<_> = (0..whole.len()).collect();
        if command == CMD_WRITE {
            let first = whole.len();
            whole.extend(payload(7, ask));
            let last = whole.len() - 1;
            cuts.extend([first, first + 1, first + 4095, last - 4096, last]);
        }
        for cut in cuts {
            let mut client = Raw::connect(&server.socket(), cut % 3 > 0);
            if kind == Kind::Connection {
                client.write(0, &[8; BLOCK as usize]);
            }
            client.send(&whole[..cut]);
            leave(client, cut % 2 > 0);
        }
        // Also those that left at once are seen to.
        figures.expect_again(&server);
        let disk = Raw::connect(&server.socket(), true).read(0, SIZE as u32);
        model.expect(0, &disk, &ask);
    }
    server.stop();
    place.assert_sound();
}

#[test]
fn a_request_that_is_cut_off_anywhere_changes_nothing() {
    for kind in [Kind::Temporary, Kind::Connection, Kind::Kept] {
        cut_off(kind);
    }
}
