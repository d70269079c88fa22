//! Which requests a client sends, and what their replies must be.

use std::ops::Range;

use super::bytes::{Change, Content, judge, tag_of};
use super::client::{Client, Expectation, Halt, Request, Result, What};
use super::wire::{Answer, CMD_CACHE, FLAG_FAST_ZERO, FLAG_FUA, FLAG_REQ_ONE};
use crate::harness::nbd::{
    CMD_BLOCK_STATUS, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, FLAG_NO_HOLE,
};

const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;
const STATE_ZERO: u32 = 1 << 1;

/// What is sent, with how many of about a hundred.
const KINDS: [(&str, u64); 10] = [
    ("read", 26),
    ("read of others", 8),
    ("write", 34),
    ("write of zeroes", 4),
    ("zero", 9),
    ("trim", 6),
    ("large", 1),
    ("cache", 4),
    ("block status", 5),
    ("flush", 3),
];

impl Client<'_> {
    /// Sends any request. False if there is none that could be sent now.
    pub fn request(&mut self) -> Result<bool> {
        let sum = KINDS.iter().map(|(_, share)| share).sum();
        let mut number = self.random.below(sum);
        let chosen = KINDS.iter().find(|(_, share)| {
            let is_it = number < *share;
            number = number.wrapping_sub(*share);
            is_it
        });
        let (kind, _) = chosen.expect("they cover all numbers");
        if self.random.once_in(100) {
            self.focus = self.somewhere();
        }
        let range = match *kind {
            "large" => self.large(),
            "read of others" => self.of_others(),
            _ => self.place(),
        };
        let is_change = matches!(
            *kind,
            "write" | "write of zeroes" | "zero" | "trim" | "large"
        );
        let meets = is_change && self.is_busy(&range);
        if range.is_empty() || meets && (*kind == "large" || !self.may_meet(&range)) {
            return Ok(false);
        }
        let fua = self.random.of(&[0, 0, 0, 0, 0, 0, 0, 0, 0, FLAG_FUA]);
        match *kind {
            "read" => self.read("read", range)?,
            "read of others" => self.read("read of others", range)?,
            "write" => {
                let content = Content::Pattern {
                    tag: tag_of(self.region.number),
                    generation: self.clock,
                };
                self.change(CMD_WRITE, ("write", fua), range, content)?;
            }
            "write of zeroes" => {
                self.change(CMD_WRITE, ("write of zeroes", fua), range, Content::Zeroes)?;
            }
            "zero" => {
                let how = self.random.of(&[
                    0,
                    FLAG_NO_HOLE,
                    FLAG_FAST_ZERO,
                    FLAG_NO_HOLE | FLAG_FAST_ZERO,
                ]);
                self.change(
                    CMD_WRITE_ZEROES,
                    ("zero", how | fua),
                    range,
                    Content::Zeroes,
                )?;
            }
            "large" if self.random.once_in(2) => {
                self.change(
                    CMD_WRITE_ZEROES,
                    ("large zero", fua),
                    range,
                    Content::Zeroes,
                )?;
            }
            "large" => self.change(CMD_TRIM, ("large trim", fua), range, Content::Zeroes)?,
            "trim" => self.change(CMD_TRIM, ("trim", fua), range, Content::Zeroes)?,
            "cache" => self.send(CMD_CACHE, ("cache", 0), range, &[], |_| What::Cache)?,
            "block status" => {
                let flags = self.random.of(&[0, FLAG_REQ_ONE]);
                let expectation = self.expectation(&range);
                let what = |_| What::Status(expectation);
                self.send(CMD_BLOCK_STATUS, ("block status", flags), range, &[], what)?;
            }
            _ => self.send(CMD_FLUSH, ("flush", 0), 0..0, &[], |_| What::Flush)?,
        }
        Ok(true)
    }

    pub fn read(&mut self, name: &'static str, range: Range<u64>) -> Result {
        let expectation = self.expectation(&range);
        self.send(CMD_READ, (name, 0), range, &[], |_| What::Read(expectation))
    }

    fn change(
        &mut self,
        command: u16,
        name_and_flags: (&'static str, u16),
        range: Range<u64>,
        content: Content,
    ) -> Result {
        let mut payload = Vec::new();
        if command == CMD_WRITE {
            payload.resize((range.end - range.start) as usize, 0);
            content.fill(range.start, &mut payload);
        }
        let change = Change {
            range: range.clone(),
            content,
            certain: false,
            happened: false,
        };
        self.send(command, name_and_flags, range, &payload, |_| {
            What::Change(change)
        })
    }

    /// Holds an answer against what it may be.
    pub fn answered(&mut self, cookie: u64, request: Request, answer: Answer) -> Result {
        let length = request.range.end - request.range.start;
        if let Answer::Failed(errno) = answer {
            return self.failed(cookie, request, errno);
        }
        match (&request.what, &answer) {
            (What::Read(expectation), Answer::Bytes(bytes)) if bytes.len() as u64 == length => {
                self.look_at(&request, expectation, bytes)?;
            }
            (What::Settle(expectation, numbers, unit), Answer::Bytes(bytes))
                if bytes.len() as u64 == length =>
            {
                let Expectation {
                    own,
                    before,
                    changes,
                } = expectation;
                judge(bytes, own.start, before, changes, *unit)
                    .map_err(|wrong| self.wrong(&request, &wrong))?;
                self.region
                    .found(numbers[0], self.clock, own, bytes.clone());
                numbers
                    .iter()
                    .for_each(|number| self.look_if_settled(*number));
            }
            (What::Status(expectation), Answer::Extents(extents)) => {
                self.look_at_extents(&request, expectation, extents)?;
            }
            (What::Change(change), Answer::Done) => self.done(cookie, &request, change.clone())?,
            (What::Cache, Answer::Done) => {}
            (What::Flush, Answer::Done) => self.region.flushed(cookie),
            _ => return Err(self.unexpected(&request, &format!("{answer:?}"))),
        }
        self.tally.answered(request.name, length);
        Ok(())
    }

    fn unexpected(&self, request: &Request, what: &str) -> Halt {
        let what: String = what.chars().take(200).collect();
        let Request {
            name, range, flags, ..
        } = request;
        Halt::Fault(format!("{name} of {range:?} with flags {flags:#x}: {what}"))
    }

    fn failed(&mut self, cookie: u64, request: Request, errno: u32) -> Result {
        let What::Change(change) = &request.what else {
            return Err(self.unexpected(&request, &format!("errno {errno}")));
        };
        // A trim hears of a limit only: it may do nothing where a file system is full.
        let is_trim = request.name.contains("trim");
        let may_be_full = self.mix.may_be_full() && (!is_trim || self.mix.limit.is_some());
        let is_full = errno == ENOSPC && may_be_full;
        let is_slow = errno == ENOTSUP && request.flags & FLAG_FAST_ZERO != 0;
        if is_slow {
            // Nothing has changed, and reads will look for that.
            self.region.refused(cookie);
            let number = self.met.iter().position(|met| met.number == cookie);
            if let Some(at) = number {
                // The others are as if it had not been.
                self.met[at].change.range.end = self.met[at].change.range.start;
                self.over(cookie, change.clone(), 1)?;
            }
        } else if is_full {
            self.over(cookie, change.clone(), self.mix.old_or_new())?;
        } else {
            return Err(self.unexpected(&request, &format!("errno {errno}")));
        }
        self.tally.failed(request.name, errno);
        Ok(())
    }

    fn done(&mut self, cookie: u64, request: &Request, change: Change) -> Result {
        if let Some(met) = self.met.iter_mut().find(|met| met.number == cookie) {
            // A trim may leave parts of blocks as they are.
            met.change.happened = !request.name.contains("trim");
            return self.over(cookie, change, 1);
        }
        let range = change.range.clone();
        let is_safe = request.flags & FLAG_FUA != 0;
        if !request.name.contains("trim") {
            self.region.now.write(&range, &change.content);
            self.region.done(cookie, self.clock, range, is_safe);
            self.look_if_settled(cookie);
            return Ok(());
        }
        let block = self.mix.block;
        let start = range.start.next_multiple_of(block).min(range.end);
        let end = match range.end == self.disk.size {
            true => range.end,
            false => (range.end / block * block).max(start),
        };
        let whole = match self.mix.is_kept() && self.mix.may_be_full() {
            // There was no space to take note of it, perhaps.
            true => range.end..range.end,
            false => start..end,
        };
        self.region.now.write(&whole, &change.content);
        self.region.done(cookie, self.clock, whole.clone(), is_safe);
        // Parts of blocks may keep their bytes.
        for part in [range.start..whole.start, whole.end..range.end] {
            let change = Change {
                range: part,
                ..change.clone()
            };
            let range = change.range.clone();
            self.settle(vec![cookie], range, &[change], block)?;
        }
        self.look_if_settled(cookie);
        Ok(())
    }

    fn look_at(&mut self, request: &Request, expectation: &Expectation, bytes: &[u8]) -> Result {
        let Expectation {
            own,
            before,
            changes,
        } = expectation;
        let range = &request.range;
        let part = |part: Range<u64>| {
            let from = (part.start - range.start) as usize;
            &bytes[from..from + (part.end - part.start) as usize]
        };
        let judged = if own.is_empty() {
            self.disk.judge_others(bytes, range.start, self.mix.kind)
        } else {
            let others = [range.start..own.start, own.end..range.end];
            judge(part(own.clone()), own.start, before, changes, 1).and_then(|()| {
                others.into_iter().try_for_each(|other| {
                    self.disk
                        .judge_others(part(other.clone()), other.start, self.mix.kind)
                })
            })
        };
        judged.map_err(|wrong| self.wrong(request, &wrong))
    }

    /// What is said to be zeroes must be zeroes.
    fn look_at_extents(
        &mut self,
        request: &Request,
        expectation: &Expectation,
        extents: &[(u32, u32)],
    ) -> Result {
        let Expectation {
            own,
            before,
            changes,
        } = expectation;
        let is_one = request.flags & FLAG_REQ_ONE != 0;
        let mut at = request.range.start;
        for (length, state) in extents {
            let extent = at..at + u64::from(*length);
            at = extent.end;
            let start = extent.start.clamp(own.start, own.end);
            let end = extent.end.clamp(start, own.end);
            if state & STATE_ZERO != 0 {
                let before = &before[(start - own.start) as usize..(end - own.start) as usize];
                judge(&vec![0; before.len()], start, before, changes, 1)
                    .map_err(|wrong| self.wrong(request, &wrong))?;
            }
        }
        let is_sound = extents.iter().all(|(length, _)| *length > 0)
            && !extents.is_empty()
            && at <= self.disk.size
            && (!is_one || extents.len() == 1 && at <= request.range.end);
        match is_sound {
            true => Ok(()),
            false => Err(self.unexpected(request, &format!("{extents:?}"))),
        }
    }
}
