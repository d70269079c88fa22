//! A file in memory that writes down what is done to it, fails when it is told to,
//! and can be held in the middle.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use nbdkit_cow_filter::qcow2::file::ImageFile;

use super::content::{Change, Content, Sector};
use crate::disk::Gate;

/// At least: of the smallest cluster.
const HEADER_LEN: u64 = 16 << 10;

/// What happened, in order.
#[derive(Clone)]
pub enum Event {
    /// Done, and lost in a crash, as a whole or in part, until a sync.
    Changed(Change),
    /// Done, and safe.
    ChangedSafely(Change),
    /// All events before this one are safe.
    Synced { before: usize },
    /// A client has asked for these sectors of the disk to become this.
    Asked(Vec<(u64, Arc<Sector>)>),
    /// A flush has succeeded that was begun when so many had been asked for; they
    /// had been answered, if not all then those of this owner.
    Flushed { asked: usize, owner: Option<u64> },
}

/// What a file is asked to do that changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Write,
    Sync,
    WriteSynced,
    /// A `WriteSynced` of the mark of a run: no other lies in the header.
    Mark,
    Punch,
    ZeroRange,
    SetSize,
    Copy,
}

/// How much of a write that fails is in the file all the same.
#[derive(Debug, Clone, Copy)]
pub enum Portion {
    Nothing,
    Half,
    All,
}

#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// The number of the step, from 0.
    pub at: usize,
    pub errno: i32,
    pub portion: Portion,
    /// All later steps fail too.
    pub stays: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    Before(usize),
    After(usize),
}

#[derive(Default)]
struct State {
    content: Content,
    events: Vec<Event>,
    asked: usize,
    steps: Vec<Step>,
}

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    fault: Mutex<Option<Fault>>,
    hold: Mutex<Option<Hold>>,
    gate: Gate,
    reserve_gate: Gate,
    is_full: AtomicBool,
    sizes: AtomicUsize,
    reserves: AtomicUsize,
    tells_holes: AtomicBool,
    read: AtomicU64,
}

#[derive(Clone, Default)]
pub struct Recorder(Arc<Inner>);

impl Recorder {
    pub fn holding(content: Content) -> Self {
        let recorder = Recorder::default();
        recorder.state().content = content;
        recorder
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect("no test thread died")
    }

    pub fn content(&self) -> Content {
        self.state().content.clone()
    }

    pub fn events(&self) -> Vec<Event> {
        self.state().events.clone()
    }

    /// The steps from number `first` on.
    pub fn steps(&self, first: usize) -> Vec<Step> {
        self.state().steps[first..].to_vec()
    }

    pub fn step_count(&self) -> usize {
        self.state().steps.len()
    }

    pub fn asked(&self) -> usize {
        self.state().asked
    }

    pub fn ask(&self, sectors: Vec<(u64, Arc<Sector>)>) {
        let mut state = self.state();
        state.asked += 1;
        state.events.push(Event::Asked(sectors));
    }

    pub fn flushed(&self, asked: usize, owner: Option<u64>) {
        self.state().events.push(Event::Flushed { asked, owner });
    }

    /// How many flushes have succeeded.
    pub fn flushes(&self) -> usize {
        let state = self.state();
        let is_flush = |event: &&Event| matches!(event, Event::Flushed { .. });
        state.events.iter().filter(is_flush).count()
    }

    pub fn fail(&self, fault: Option<Fault>) {
        *self.0.fault.lock().expect("no test thread died") = fault;
    }

    /// From now on no space can be taken in advance.
    pub fn fill_up(&self) {
        self.0.is_full.store(true, Ordering::SeqCst);
    }

    /// How often its size was asked for.
    pub fn sizes(&self) -> usize {
        self.0.sizes.load(Ordering::SeqCst)
    }

    /// How often space was to be taken in advance.
    pub fn reserves(&self) -> usize {
        self.0.reserves.load(Ordering::SeqCst)
    }

    /// From now on it tells what is a hole.
    pub fn tell_holes(&self) {
        self.0.tells_holes.store(true, Ordering::SeqCst);
    }

    /// How many bytes were read since this was asked last.
    pub fn read_bytes(&self) -> u64 {
        self.0.read.swap(0, Ordering::SeqCst)
    }

    /// From now on that step has to wait at the gate.
    pub fn hold(&self, hold: Hold) {
        *self.0.hold.lock().expect("no test thread died") = Some(hold);
        self.0.gate.close();
    }

    pub fn gate(&self) -> &Gate {
        &self.0.gate
    }

    /// Passed before space is taken in advance.
    pub fn reserve_gate(&self) -> &Gate {
        &self.0.reserve_gate
    }

    fn wait_if(&self, here: Hold) {
        let hold = *self.0.hold.lock().expect("no test thread died");
        if hold == Some(here) {
            self.0.gate.pass();
        }
    }

    /// Does `change` (or only syncs), unless it is to fail.
    fn step(&self, step: Step, change: Option<Change>) -> io::Result<()> {
        let (number, before) = {
            let mut state = self.state();
            state.steps.push(step);
            // A sync is good for what was there when it began.
            (state.steps.len() - 1, state.events.len())
        };
        self.wait_if(Hold::Before(number));
        let fault = *self.0.fault.lock().expect("no test thread died");
        let fault = fault.filter(|f| f.at == number || (f.stays && f.at < number));
        let change = match &fault {
            Some(fault) => change.and_then(|change| fault.portion.of(change)),
            None => change,
        };
        {
            let mut state = self.state();
            if let Some(change) = change {
                state.content.apply(&change);
                let event = match (step, fault) {
                    (Step::WriteSynced | Step::Mark, None) => Event::ChangedSafely(change),
                    _ => Event::Changed(change),
                };
                state.events.push(event);
            } else if fault.is_none() {
                state.events.push(Event::Synced { before });
            }
        }
        self.wait_if(Hold::After(number));
        match fault {
            Some(fault) => Err(io::Error::from_raw_os_error(fault.errno)),
            None => Ok(()),
        }
    }
}

impl Portion {
    fn of(self, change: Change) -> Option<Change> {
        match (self, change) {
            (Portion::Nothing, _) => None,
            (Portion::All, change) => Some(change),
            (Portion::Half, Change::Write { offset, bytes }) => {
                // No file system stops in the middle of a number.
                let half = bytes.len() / 2 / 16 * 16;
                let bytes = bytes[..half].to_vec();
                (half > 0).then_some(Change::Write { offset, bytes })
            }
            (Portion::Half, Change::Zero(range)) => {
                let half = range.start + (range.end - range.start) / 2;
                Some(Change::Zero(range.start..half))
            }
            // A length is changed or not.
            (Portion::Half, Change::Grow(_) | Change::Cut(_)) => None,
        }
    }
}

impl ImageFile for Recorder {
    fn size(&self) -> io::Result<u64> {
        self.0.sizes.fetch_add(1, Ordering::SeqCst);
        Ok(self.state().content.size)
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        let old = self.state().content.size;
        let change = match size < old {
            true => Change::Cut(size),
            false => Change::Grow(size),
        };
        self.step(Step::SetSize, Some(change))
    }

    fn copy(&self, from: u64, to: u64, len: u64) -> io::Result<()> {
        let mut bytes = vec![0; len as usize];
        self.read_at(&mut bytes, from)?;
        assert!(from.abs_diff(to) >= len, "no copy onto itself");
        self.step(Step::Copy, Some(Change::Write { offset: to, bytes }))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read.fetch_add(buf.len() as u64, Ordering::SeqCst);
        let state = self.state();
        if offset + buf.len() as u64 > state.content.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        state.content.read(buf, offset);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let bytes = buf.to_vec();
        self.step(Step::Write, Some(Change::Write { offset, bytes }))
    }

    fn sync(&self) -> io::Result<()> {
        self.step(Step::Sync, None)
    }

    fn write_synced(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let bytes = buf.to_vec();
        let is_in_header = offset < HEADER_LEN;
        let step = match is_in_header {
            true => Step::Mark,
            false => Step::WriteSynced,
        };
        self.step(step, Some(Change::Write { offset, bytes }))
    }

    fn reserve(&self, _offset: u64, _len: u64) -> io::Result<()> {
        self.0.reserves.fetch_add(1, Ordering::SeqCst);
        self.0.reserve_gate.pass();
        match self.0.is_full.load(Ordering::SeqCst) {
            true => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            false => Ok(()),
        }
    }

    fn next_stored(&self, offset: u64) -> Option<u64> {
        let tells = self.0.tells_holes.load(Ordering::SeqCst);
        tells.then(|| {
            self.state()
                .content
                .next_present(offset)
                .unwrap_or(u64::MAX)
        })
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.step(Step::Punch, Some(Change::Zero(offset..offset + len)))?;
        Ok(true)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.step(Step::ZeroRange, Some(Change::Zero(offset..offset + len)))?;
        Ok(true)
    }
}
