//! What the tests of the core have in common: a base and a store that can be
//! held at a gate, made to fail, and asked what was done to them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread::{self, Scope, ScopedJoinHandle, ThreadId};
use std::time::Duration;

use nbdkit_cow_filter::base::{Allocation, Base, Extent};
use nbdkit_cow_filter::block::{BlockSize, ByteRange};
use nbdkit_cow_filter::error::{Error, Result};
use nbdkit_cow_filter::overlay::{Overlay, Reclaim, State, Store, Zeroing};
use nbdkit_cow_filter::temporary::{Directory, TemporaryStore};

/// Longer than any step of a test takes on the slowest machine; only a test that
/// is about to fail waits that long.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How long a thread that must not go on is given to do so all the same. A lock
/// that works makes no test fail by this, however slow the machine.
pub const TEMPTATION: Duration = Duration::from_millis(100);

/// Makes a request, which must wait for something, on a thread of its own. When this
/// returns it has begun, and has had the time to end if it does not wait.
pub fn tempt<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    request: impl FnOnce() -> T + Send + 'scope,
) -> ScopedJoinHandle<'scope, T> {
    let (sender, receiver) = mpsc::channel();
    let thread = scope.spawn(move || {
        sender.send(()).expect("received");
        request()
    });
    // The machine may take its time to start a thread.
    receiver.recv().expect("sent");
    thread::sleep(TEMPTATION);
    thread
}

/// A place where threads can be made to wait. Open at first.
#[derive(Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    closed: bool,
    lets_pass: bool,
    waiting: usize,
}

impl Gate {
    /// From now on whoever passes has to wait.
    pub fn close(&self) {
        let mut state = self.state.lock().expect("no test thread died");
        state.closed = true;
        state.lets_pass = false;
    }

    pub fn open(&self) {
        self.state.lock().expect("no test thread died").closed = false;
        self.changed.notify_all();
    }

    /// Who waits goes on waiting; others pass.
    pub fn hold_no_more(&self) {
        self.state.lock().expect("no test thread died").lets_pass = true;
    }

    /// Called by the code under test.
    pub fn pass(&self) {
        let mut state = self.state.lock().expect("no test thread died");
        if state.lets_pass {
            return;
        }
        state.waiting += 1;
        self.changed.notify_all();
        let (mut state, timeout) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| state.closed)
            .expect("no test thread died");
        state.waiting -= 1;
        assert!(!timeout.timed_out(), "nobody opened the gate");
    }

    /// Nobody but `count` threads is at the gate.
    pub fn assert_waiting(&self, count: usize) {
        let state = self.state.lock().expect("no test thread died");
        assert_eq!(state.waiting, count, "threads at the gate");
    }

    /// Returns once `count` threads wait at the gate: the interleaving that a
    /// test is about has happened then.
    pub fn wait_for(&self, count: usize) {
        let state = self.state.lock().expect("no test thread died");
        let (state, _) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| state.waiting < count)
            .expect("no test thread died");
        assert_eq!(state.waiting, count, "threads at the gate");
    }
}

/// The byte of the base at `offset`: never zero, and different in neighbouring
/// blocks of any size.
pub fn base_byte(offset: u64) -> u8 {
    (offset ^ (offset >> 8) ^ (offset >> 16)).wrapping_mul(31) as u8 | 1
}

/// A base in memory (or rather in a formula, so that it may be large).
pub struct TestBase {
    pub size: u64,
    /// Passed after the bytes of a read are there, before the read returns.
    pub gate: Gate,
    /// Reads that touch these bytes fail.
    pub bad: Mutex<Option<ByteRange>>,
    /// Each read and cache call, in order.
    pub reads: Mutex<Vec<ByteRange>>,
    pub caches: Mutex<Vec<ByteRange>>,
    pub extent_calls: AtomicUsize,
    /// Holes of the base, in ascending order; they read as zeroes.
    pub holes: Vec<ByteRange>,
    /// How many extents a call gives at most.
    pub extents_per_call: usize,
}

impl TestBase {
    pub fn new(size: u64) -> Self {
        TestBase {
            size,
            gate: Gate::default(),
            bad: Mutex::new(None),
            reads: Mutex::new(Vec::new()),
            caches: Mutex::new(Vec::new()),
            extent_calls: AtomicUsize::new(0),
            holes: Vec::new(),
            extents_per_call: usize::MAX,
        }
    }

    pub fn with_holes(size: u64, holes: &[(u64, u64)]) -> Self {
        let holes = holes
            .iter()
            .map(|&(start, end)| ByteRange { start, end })
            .collect();
        TestBase {
            holes,
            ..TestBase::new(size)
        }
    }

    /// From now on reads that touch bytes from `start` to `end` fail.
    pub fn spoil(&self, start: u64, end: u64) {
        *self.bad.lock().expect("no test thread died") = Some(ByteRange { start, end });
    }

    pub fn repair(&self) {
        *self.bad.lock().expect("no test thread died") = None;
    }

    pub fn byte(&self, offset: u64) -> u8 {
        let in_hole = |hole: &ByteRange| (hole.start..hole.end).contains(&offset);
        if self.holes.iter().any(in_hole) {
            0
        } else {
            base_byte(offset)
        }
    }

    pub fn bytes(&self, range: ByteRange) -> Vec<u8> {
        (range.start..range.end).map(|at| self.byte(at)).collect()
    }

    pub fn read_calls(&self) -> Vec<(u64, u64)> {
        let reads = self.reads.lock().expect("no test thread died");
        reads.iter().map(|read| (read.start, read.end)).collect()
    }
}

impl Base for TestBase {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = ByteRange::checked(offset, buf.len() as u64, self.size)
            .expect("the base is never asked past its end");
        assert!(!range.is_empty(), "the base is never asked for nothing");
        self.reads.lock().expect("no test thread died").push(range);
        let bad = *self.bad.lock().expect("no test thread died");
        if bad.is_some_and(|bad| !range.clamp_to(bad).is_empty()) {
            return Err(Error::from_below(libc::EIO, "reading a bad sector"));
        }
        buf.copy_from_slice(&self.bytes(range));
        self.gate.pass();
        Ok(())
    }

    fn cache(&self, range: ByteRange) -> Result<()> {
        self.caches.lock().expect("no test thread died").push(range);
        Ok(())
    }

    fn extents(&self, range: ByteRange, only_first: bool, list: &mut Vec<Extent>) -> Result<()> {
        self.extent_calls.fetch_add(1, Ordering::SeqCst);
        let mut at = range.start;
        let most = if only_first { 1 } else { self.extents_per_call };
        let before = list.len();
        while at < range.end && list.len() - before < most {
            let hole = self.holes.iter().find(|hole| at < hole.end);
            let (end, allocation) = match hole {
                Some(hole) if hole.start <= at => (hole.end, Allocation::HOLE),
                Some(hole) => (hole.start, Allocation::DATA),
                None => (self.size, Allocation::DATA),
            };
            let bytes = ByteRange {
                start: at,
                end: end.min(range.end),
            };
            list.push(Extent { bytes, allocation });
            at = bytes.end;
        }
        Ok(())
    }
}

/// What a store was asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Read(u64, u64),
    Write(u64, u64),
    Punch(u64, u64),
    ZeroRange(u64, u64),
}

pub type BeforePunch = Box<dyn FnMut(ByteRange) -> Result<()> + Send>;

/// A store in memory. Pages that were never written hold garbage, not zeroes, so
/// that a read of something that was never stored does not go unnoticed.
pub struct TestStore {
    /// Those that were punched out are `None`. A page is as long as what was written of it.
    pages: Mutex<BTreeMap<u64, Option<Vec<u8>>>>,
    /// How many pages there is space for.
    capacity: usize,
    calls: Mutex<Vec<Call>>,
    /// Passed before a write, or zeroes that take space, do anything.
    pub write_gate: Gate,
    /// Passed before a hole is punched.
    pub punch_gate: Gate,
    /// Called then, with what is to be punched; what it fails with is what comes of it.
    pub before_punch: Mutex<Option<BeforePunch>>,
    /// Who has punched a hole last.
    pub puncher: Mutex<Option<ThreadId>>,
    /// The call with this number (from 0, reads not counted) fails with this errno.
    pub fail: Mutex<Option<(usize, i32)>>,
    changes: AtomicUsize,
    can_punch: bool,
    can_zero_range: bool,
}

const PAGE: u64 = 512;
const GARBAGE: u8 = 0xee;

impl Default for TestStore {
    fn default() -> Self {
        TestStore {
            pages: Mutex::default(),
            capacity: usize::MAX,
            calls: Mutex::default(),
            write_gate: Gate::default(),
            punch_gate: Gate::default(),
            before_punch: Mutex::default(),
            puncher: Mutex::default(),
            fail: Mutex::default(),
            changes: AtomicUsize::new(0),
            can_punch: true,
            can_zero_range: true,
        }
    }
}

impl TestStore {
    pub fn with(can_punch: bool, can_zero_range: bool) -> Self {
        TestStore {
            can_punch,
            can_zero_range,
            ..TestStore::default()
        }
    }

    /// A store with space for so many bytes.
    pub fn with_capacity(bytes: u64) -> Self {
        TestStore {
            capacity: (bytes / PAGE) as usize,
            ..TestStore::default()
        }
    }

    /// The next change fails with `errno`.
    pub fn fail_next(&self, errno: i32) {
        *self.fail.lock().expect("no test thread died") = Some((self.changes(), errno));
    }

    /// The bytes that take space, in pages, the first of which begins at their start.
    pub fn stored(&self) -> Vec<u64> {
        let pages = self.pages.lock().expect("no test thread died");
        let stored = pages.iter().filter(|(_, page)| page.is_some());
        stored.map(|(number, _)| number * PAGE).collect()
    }

    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().expect("no test thread died").clone()
    }

    /// As [`TestStore::calls`], but holes that adjoin are one: how small the pieces are
    /// in which they were punched is left to the overlay, and to how long one takes.
    pub fn calls_with_whole_holes(&self) -> Vec<Call> {
        let mut merged: Vec<Call> = Vec::new();
        for call in self.calls() {
            match (merged.last_mut(), call) {
                (Some(Call::Punch(_, end)), Call::Punch(start, next)) if *end == start => {
                    *end = next;
                }
                _ => merged.push(call),
            }
        }
        merged
    }

    pub fn forget_calls(&self) {
        self.calls.lock().expect("no test thread died").clear();
    }

    /// How many calls that change something there were.
    pub fn changes(&self) -> usize {
        self.changes.load(Ordering::SeqCst)
    }

    /// Notes a call that changes something; fails if that is asked for.
    fn change(&self, call: Call) -> Result<()> {
        self.calls.lock().expect("no test thread died").push(call);
        let number = self.changes.fetch_add(1, Ordering::SeqCst);
        match *self.fail.lock().expect("no test thread died") {
            Some((at, errno)) if at == number => Err(Error::new(errno, "a fault on purpose")),
            _ => Ok(()),
        }
    }

    /// ENOSPC, when there is no space for a page.
    fn put(&self, range: ByteRange, byte: impl Fn(u64) -> u8) -> Result<()> {
        let mut pages = self.pages.lock().expect("no test thread died");
        let mut stored = match self.capacity {
            usize::MAX => 0,
            _ => pages.values().filter(|page| page.is_some()).count(),
        };
        let mut at = range.start;
        while at < range.end {
            let page = pages.entry(at / PAGE).or_insert(None);
            if page.is_none() && stored >= self.capacity {
                return Err(Error::new(libc::ENOSPC, "the store is full"));
            }
            stored += usize::from(page.is_none());
            let end = range.end.min((at / PAGE + 1) * PAGE);
            let page = page.get_or_insert_default();
            let len = page.len().max((end - at / PAGE * PAGE) as usize);
            page.resize(len, GARBAGE);
            for offset in at..end {
                page[(offset % PAGE) as usize] = byte(offset);
            }
            at = end;
        }
        Ok(())
    }

    /// Takes out pages of which all that was written is in `range`.
    fn take_out(&self, range: ByteRange) {
        let mut pages = self.pages.lock().expect("no test thread died");
        for (number, page) in pages.range_mut(range.start / PAGE..range.end.div_ceil(PAGE)) {
            let start = number * PAGE;
            let Some(bytes) = page else { continue };
            if range.start <= start && start + bytes.len() as u64 <= range.end {
                *page = None;
                continue;
            }
            for (at, byte) in (start..).zip(bytes) {
                if (range.start..range.end).contains(&at) {
                    *byte = 0;
                }
            }
        }
    }
}

impl Store for TestStore {
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset + buf.len() as u64;
        let mut calls = self.calls.lock().expect("no test thread died");
        calls.push(Call::Read(offset, end));
        let pages = self.pages.lock().expect("no test thread died");
        for (at, byte) in (offset..).zip(buf) {
            *byte = match pages.get(&(at / PAGE)) {
                Some(Some(page)) => *page.get((at % PAGE) as usize).unwrap_or(&GARBAGE),
                Some(None) => 0,
                None => GARBAGE,
            };
        }
        Ok(())
    }

    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write_gate.pass();
        let end = offset + buf.len() as u64;
        let failed = self.change(Call::Write(offset, end));
        // A failed write has written something: the worst half of it.
        let written = if failed.is_ok() {
            buf.len()
        } else {
            buf.len() / 2
        };
        let range = ByteRange {
            start: offset,
            end: offset + written as u64,
        };
        let put = self.put(range, |at| buf[(at - offset) as usize]);
        failed.and(put)
    }

    fn punch(&self, range: ByteRange) -> Result<bool> {
        if !self.can_punch {
            return Ok(false);
        }
        self.punch_gate.pass();
        if let Some(hook) = &mut *self.before_punch.lock().expect("no test thread died") {
            hook(range)?;
        }
        *self.puncher.lock().expect("no test thread died") = Some(thread::current().id());
        self.change(Call::Punch(range.start, range.end))?;
        self.take_out(range);
        Ok(true)
    }

    fn zero_range(&self, range: ByteRange) -> Result<bool> {
        if !self.can_zero_range {
            return Ok(false);
        }
        self.write_gate.pass();
        if let Err(e) = self.change(Call::ZeroRange(range.start, range.end)) {
            // As on ext4, where what was not on the disk yet is dropped.
            self.put(range, |_| GARBAGE)?;
            return Err(e);
        }
        self.put(range, |_| 0)?;
        Ok(true)
    }

    fn can_zero_range(&self) -> bool {
        self.can_zero_range
    }
}

/// All pages of *data* blocks take space, and no others: so it is when no request is
/// under way and nothing is pending.
pub fn assert_only_data_is_stored(overlay: &Overlay<TestStore>) {
    let stored = overlay.store().stored();
    for at in &stored {
        let state = overlay.state_at(*at).expect("in range");
        assert_eq!(state, State::Data, "stored at {at}");
    }
    let block = overlay.block_size().bytes();
    let pages: u64 = (0..overlay.size())
        .step_by(block as usize)
        .filter(|at| overlay.state_at(*at).expect("in range") == State::Data)
        .map(|at| (overlay.size() - at).min(block).div_ceil(PAGE))
        .sum();
    assert_eq!(stored.len() as u64, pages, "all of what is data is stored");
}

/// A filter's thread that gives space back, for as long as `work` takes.
pub fn with_thread<R>(reclaim: &Arc<Reclaim>, work: impl FnOnce() -> R) -> R {
    struct Stop<'a>(&'a Reclaim);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.stop();
        }
    }
    thread::scope(|scope| {
        let _stop = Stop(reclaim);
        scope.spawn(|| reclaim.run());
        wait_for_thread(reclaim);
        work()
    })
}

/// Returns when it is the thread that gives back what a trim leaves.
pub fn wait_for_thread(reclaim: &Arc<Reclaim>) {
    let (base, overlay) = test_disk(BLOCK);
    let overlay = overlay.join(reclaim);
    let puncher = &overlay.store().puncher;
    loop {
        overlay
            .write(&base, &[1; BLOCK as usize], 0)
            .expect("a good write");
        *puncher.lock().expect("no test thread died") = None;
        overlay
            .zero(&base, 0, BLOCK, Zeroing::Trim)
            .expect("a good trim");
        let puncher = *puncher.lock().expect("no test thread died");
        if puncher != Some(thread::current().id()) {
            return overlay.give_back();
        }
        thread::yield_now();
    }
}

pub fn block_size(bytes: u64) -> BlockSize {
    BlockSize::new(bytes).expect("a block size")
}

/// A disk for tests that look at the store or hold it: 64K blocks.
pub fn test_disk(size: u64) -> (TestBase, Overlay<TestStore>) {
    (
        TestBase::new(size),
        Overlay::new(size, block_size(BLOCK), TestStore::default()),
    )
}

/// The block size of [`test_disk`].
pub const BLOCK: u64 = 65536;

/// An overlay in real files.
pub fn file_overlay(size: u64, block: u64) -> Overlay<TemporaryStore> {
    // Whatever TMPDIR says: on a tmpfs or a ramfs the overlay works in other ways.
    let directory = Directory::open("/var/tmp".as_ref()).expect("a directory for overlays");
    let store = TemporaryStore::new(Arc::new(directory), size);
    Overlay::new(size, block_size(block), store)
}

/// All bytes of a disk.
pub fn read_all<S: Store>(base: &TestBase, overlay: &Overlay<S>) -> Vec<u8> {
    let mut bytes = vec![0; overlay.size() as usize];
    overlay
        .read(base, &mut bytes, 0, false)
        .expect("the disk is readable");
    bytes
}
