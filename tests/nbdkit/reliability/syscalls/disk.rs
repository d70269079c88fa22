//! A client at work, and what the disk must then have.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::script::{
    BLOCK, EXTENTS, FAST, FLUSH, FUA, M, READ, SCRIPT, SIZE, Step, TRIM, WRITE, ZERO, step,
};
use crate::harness::nbd::{Answer, Client, Single};

const EIO: u32 = 5;
pub const ENOMEM: u32 = 12;
pub const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;

/// What a fault may make of requests.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Errnos of NBD that a request may fail with. None: no request fails.
    pub errnos: Vec<u32>,
    /// After it all flushes may fail.
    pub ends_flushes: bool,
    /// It is one of a sync: if a flush has failed, all later ones must.
    pub is_of_sync: bool,
}

impl Expected {
    /// Nothing fails.
    pub fn nothing() -> Expected {
        Expected {
            errnos: Vec::new(),
            ends_flushes: false,
            is_of_sync: false,
        }
    }
}

/// The disk as it must be.
#[derive(Clone)]
pub struct Model {
    bytes: Vec<u8>,
    /// By block: it may be *data*, so that a failed write may leave a part of it new.
    may_be_data: Vec<bool>,
    /// As it was when the last flush was asked for that was good.
    flushed: Vec<u8>,
    /// What was written since.
    later: Vec<(usize, Vec<u8>)>,
}

impl Model {
    pub fn new(bytes: Vec<u8>, may_be_data: bool) -> Model {
        Model {
            may_be_data: vec![may_be_data; bytes.len().div_ceil(BLOCK)],
            flushed: bytes.clone(),
            later: Vec::new(),
            bytes,
        }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What the disk has after a run whose last flush has failed: what was flushed, or
    /// something that was written since.
    pub fn assert_keeps_what_was_flushed(&self, found: &[u8]) {
        let mut unknown: Vec<bool> = (found.iter().zip(&self.flushed))
            .map(|(found, flushed)| found != flushed)
            .collect();
        for (at, bytes) in &self.later {
            for (place, byte) in (*at..).zip(bytes) {
                unknown[place] &= found[place] != *byte;
            }
        }
        let lost = unknown.iter().position(|unknown| *unknown);
        assert_eq!(lost, None, "a byte that was flushed is lost");
    }
}

/// A client at work.
pub struct Session<'a> {
    client: Client,
    model: &'a mut Model,
    expected: &'a Expected,
    /// While this file exists, reads are copied.
    copy_switch: PathBuf,
    /// A request has failed: another must not.
    has_failed: bool,
    /// One with a flush has, after which others may.
    flush_has_failed: bool,
}

impl<'a> Session<'a> {
    pub fn new(
        client: Client,
        model: &'a mut Model,
        expected: &'a Expected,
        copy_switch: &Path,
    ) -> Session<'a> {
        assert_eq!(client.size, model.bytes.len() as u64, "the disk's size");
        Session {
            client,
            model,
            expected,
            copy_switch: copy_switch.to_owned(),
            has_failed: false,
            flush_has_failed: false,
        }
    }

    /// Does all of the script, and looks at the whole disk.
    pub fn run(&mut self) {
        for step in SCRIPT {
            self.step(step);
        }
        self.assert_disk();
    }

    /// Looks at the whole disk.
    pub fn assert_disk(&mut self) {
        for at in (0..SIZE).step_by(M) {
            self.step(&step(READ, 0, at, M.min(SIZE - at)));
        }
    }

    /// That a flush is good still, or refused as it was before.
    pub fn flush(&mut self) {
        self.step(&step(FLUSH, 0, 0, 0));
    }

    /// A request, and if it fails, what was promised for that: each byte is old or new,
    /// and the next request works.
    fn step(&mut self, step: &Step) {
        if step.copies {
            File::create(&self.copy_switch).expect("a file of our own");
        }
        let answered = self.ask(step);
        if step.copies {
            fs::remove_file(&self.copy_switch).expect("our own file");
        }
        match answered {
            Ok(answer) => self.done(step, &answer),
            Err(errno) => {
                self.judge(step, errno);
                self.settle(step);
                if step.command == FLUSH {
                    return;
                }
                // With these it might be refused again, for good reason.
                let again = Step {
                    flags: step.flags & !(FUA | FAST),
                    ..*step
                };
                match self.ask(&again) {
                    Ok(answer) => self.done(&again, &answer),
                    Err(errno) => panic!("{again:?} fails once more: errno {errno}"),
                }
            }
        }
        if step.may_store() {
            self.model.may_be_data[step.at / BLOCK..step.end().div_ceil(BLOCK)].fill(true);
        }
    }

    fn ask(&mut self, step: &Step) -> Result<Answer, u32> {
        let payload = match step.command {
            WRITE => step.content(),
            _ => Vec::new(),
        };
        let request = Single {
            command: step.command,
            flags: step.flags,
            offset: step.at as u64,
            length: step.len as u32,
            payload: &payload,
        };
        let answered = self.client.single(&request);
        answered.unwrap_or_else(|error| panic!("{step:?}: the connection is gone: {error}"))
    }

    /// A request has failed: whether it may.
    fn judge(&mut self, step: &Step, errno: u32) {
        if step.command == ZERO && step.flags & FAST != 0 && errno == ENOTSUP {
            // The file system can't do it, or has just said so.
            return;
        }
        let Expected {
            errnos,
            ends_flushes,
            ..
        } = self.expected;
        assert!(errnos.contains(&errno), "{step:?} fails: errno {errno}");
        assert!(
            errno != ENOSPC || step.changes() || step.flushes(),
            "{step:?} takes no space, but fails for want of it"
        );
        if step.flushes() && *ends_flushes {
            self.flush_has_failed = true;
            return;
        }
        assert!(!self.has_failed, "{step:?} fails, after the fault");
        self.has_failed = true;
    }

    fn done(&mut self, step: &Step, answer: &Answer) {
        match step.command {
            READ => {
                let expected = &self.model.bytes[step.at..step.end()];
                assert_same(step, step.at, &answer.data, expected);
            }
            EXTENTS => self.assert_extents(step, answer),
            FLUSH => {
                assert!(
                    !(self.flush_has_failed && self.expected.is_of_sync),
                    "a flush is good after another that was not"
                );
                self.model.flushed.clone_from(&self.model.bytes);
                self.model.later.clear();
            }
            WRITE | ZERO => {
                let content = step.content();
                self.model.bytes[step.at..step.end()].copy_from_slice(&content);
                if step.flags & FUA != 0 {
                    self.model.flushed[step.at..step.end()].copy_from_slice(&content);
                }
                self.model.later.push((step.at, content));
            }
            // Parts of blocks need not be trimmed.
            TRIM => {
                self.settle(step);
                let whole = step.at.next_multiple_of(BLOCK)..step.end() / BLOCK * BLOCK;
                let bytes = &self.model.bytes[whole.clone()];
                assert_same(step, whole.start, bytes, &vec![0; whole.len()]);
            }
            _ => {}
        }
    }

    /// Reads what a request has made of its bytes, where that may be one or the other.
    fn settle(&mut self, step: &Step) {
        if !step.changes() {
            return;
        }
        let blocks = step.at / BLOCK..step.end().div_ceil(BLOCK);
        let start = blocks.start * BLOCK;
        let end = SIZE.min(blocks.end * BLOCK);
        let read = self::step(READ, 0, start, end - start);
        let found = self.ask(&read).or_else(|errno| {
            self.judge(&read, errno);
            self.ask(&read)
        });
        let found = match found {
            Ok(answer) => answer.data,
            Err(errno) => panic!("{read:?} fails once more: errno {errno}"),
        };
        let content = step.content();
        for block in blocks {
            let part = (block * BLOCK).max(step.at)..((block + 1) * BLOCK).min(step.end());
            let (old, new) = (
                &self.model.bytes[part.clone()],
                &content[part.start - step.at..part.end - step.at],
            );
            let found = &found[part.start - start..part.end - start];
            let is_mixture = (found.iter().zip(old).zip(new))
                .all(|((found, old), new)| found == old || found == new);
            let is_right = match self.model.may_be_data[block] {
                true => is_mixture,
                false => found == old || found == new,
            };
            assert!(is_right, "{step:?}: block {block} is neither old nor new");
            self.model.bytes[part].copy_from_slice(found);
        }
        // Around it nothing has changed.
        assert_same(step, start, &found, &self.model.bytes[start..end]);
        let new = self.model.bytes[step.at..step.end()].to_vec();
        self.model.later.push((step.at, content));
        self.model.later.push((step.at, new));
    }

    fn assert_extents(&self, step: &Step, answer: &Answer) {
        const ZEROES: u32 = 2;
        let mut at = step.at;
        for &(len, flags) in &answer.extents {
            let end = at + len as usize;
            assert!(end <= SIZE, "an extent up to {end}");
            let is_zero = || self.model.bytes[at..end].iter().all(|byte| *byte == 0);
            assert!(
                flags & ZEROES == 0 || is_zero(),
                "{at}..{end} are no zeroes"
            );
            at = end;
        }
        assert_eq!(at, step.end(), "what the extents cover");
    }
}

fn assert_same(step: &Step, start: usize, found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len(), "{step:?}");
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    if let Some(place) = differs {
        panic!("{step:?}: the byte at {} is wrong", start + place);
    }
}

/// EIO in any case: an errno that NBD has no code for.
pub fn errnos(also: Option<u32>) -> Vec<u32> {
    [EIO].into_iter().chain(also).collect()
}
