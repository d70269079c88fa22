//! What was asked of an overlay and what it came to.
//!
//! Requests count in parallel, so each number is a sum of parts, the *shards*, which lie on
//! different cache lines: threads that count do not take a cache line from each other, as
//! long as they use different shards.
//!
//! Which shard a thread uses makes no difference to a sum, because all its parts are
//! changed by atomic additions only. So this need not be known exactly, and is told by
//! where the stack of the thread lies: a variable of the thread would cost a function call
//! in a library that is loaded, as this one is.
//!
//! # What a sum is
//!
//! Each of its parts is read at another time, so two numbers that change together may
//! differ by the requests that are under way. What was counted before somebody began to
//! sum up is in the sum, if he knows that it was: by a lock, or by the answer of a client
//! whose request it was. One number never becomes smaller from sum to sum, since no part of
//! it does. That needs no order between the additions (`Relaxed`).

use std::collections::BTreeMap;
use std::ops::AddAssign;
// Not those of `crate::sync`: what is counted decides nothing, so the model checker has no
// orders to try.
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use crate::error::Error;

/// What is counted. In the order of a shard: what one request counts lies together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counter {
    Reads,
    ReadBytes,
    BaseReads,
    BaseReadBytes,
    Writes,
    WriteBytes,
    /// Writes to a part of a block that was not *data*, for which the rest was read or made.
    ReadModifyWrites,
    /// Of write, zero and trim requests.
    Fua,
    Zeroes,
    ZeroBytes,
    Trims,
    TrimBytes,
    Flushes,
    Extents,
    ExtentBytes,
    Caches,
    CacheBytes,
    /// Blocks that cow-on-read has saved.
    CopiedOnRead,
    /// Blocks that cow-on-cache has saved.
    CopiedOnCache,
    /// Of blocks that were stored, and whose space was given back.
    GivenBackBytes,
    Connections,
}

const COUNTERS: usize = Counter::Connections as usize + 1;

/// What can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    Read,
    Write,
    Trim,
    Zero,
    Flush,
    Cache,
    Extents,
    /// Saving what a read has got from the base.
    CowOnRead,
    /// Saving what is prefetched.
    CowOnCache,
    /// Giving space back.
    GiveBack,
}

impl Operation {
    /// Those that clients ask for.
    pub const REQUESTS: [Operation; 7] = [
        Operation::Read,
        Operation::Write,
        Operation::Trim,
        Operation::Zero,
        Operation::Flush,
        Operation::Cache,
        Operation::Extents,
    ];

    /// In the document of cow-stats, and in the log.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Trim => "trim",
            Operation::Zero => "zero",
            Operation::Flush => "flush",
            Operation::Cache => "cache",
            Operation::Extents => "extents",
            Operation::CowOnRead => "cow-on-read",
            Operation::CowOnCache => "cow-on-cache",
            Operation::GiveBack => "give-back",
        }
    }

    /// Of a request: where it is counted, and where its bytes are, if it has any.
    pub fn counters(self) -> Option<(Counter, Option<Counter>)> {
        Some(match self {
            Operation::Read => (Counter::Reads, Some(Counter::ReadBytes)),
            Operation::Write => (Counter::Writes, Some(Counter::WriteBytes)),
            Operation::Trim => (Counter::Trims, Some(Counter::TrimBytes)),
            Operation::Zero => (Counter::Zeroes, Some(Counter::ZeroBytes)),
            Operation::Flush => (Counter::Flushes, None),
            Operation::Cache => (Counter::Caches, Some(Counter::CacheBytes)),
            Operation::Extents => (Counter::Extents, Some(Counter::ExtentBytes)),
            Operation::CowOnRead | Operation::CowOnCache | Operation::GiveBack => return None,
        })
    }
}

/// What failed, and with which errno.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ErrorKind {
    pub operation: Operation,
    /// One that the system knows, or 0: there are not many, whatever a layer below says.
    pub errno: i32,
}

impl ErrorKind {
    fn new(operation: Operation, error: &Error) -> Self {
        ErrorKind {
            operation,
            errno: Errno::from_raw(error.errno()) as i32,
        }
    }

    /// As in `ENOSPC`.
    pub fn errno_name(self) -> String {
        format!("{:?}", Errno::from_raw(self.errno))
    }
}

/// Threads that are at work at the same time are 16 for each connection, by default.
const SHARDS: usize = 16;

/// One part of each number.
#[repr(align(64))]
#[derive(Default)]
pub struct Shard([AtomicU64; COUNTERS]);

impl Shard {
    #[inline(always)]
    pub fn add(&self, counter: Counter, number: u64) {
        self.0[counter as usize].fetch_add(number, Ordering::Relaxed);
    }

    /// Counts a request of `bytes`.
    #[inline(always)]
    pub fn request(&self, request: Operation, bytes: u64) {
        if let Some((requests, of_bytes)) = request.counters() {
            self.add(requests, 1);
            if let Some(of_bytes) = of_bytes {
                self.add(of_bytes, bytes);
            }
        }
    }
}

/// See the module's documentation.
#[derive(Default)]
pub struct Counters {
    shards: [Shard; SHARDS],
    /// Failures are rare, and cost a line of the log.
    errors: Mutex<BTreeMap<ErrorKind, u64>>,
}

impl Counters {
    /// The shard of the thread that calls this.
    #[inline(always)]
    pub fn here(&self) -> &Shard {
        let on_stack = 0_u8;
        let address = (&raw const on_stack).addr() as u64;
        // Stacks lie at least 16K apart, and most often some power of two. The factor is
        // 2^64 divided by the golden ratio, which spreads multiples of all of those.
        let spread = (address >> 14).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        &self.shards[(spread >> (u64::BITS - SHARDS.trailing_zeros())) as usize]
    }

    pub fn add(&self, counter: Counter, number: u64) {
        self.here().add(counter, number);
    }

    /// Counts a failure, and tells of which kind it is.
    #[cold]
    pub fn failed(&self, operation: Operation, error: &Error) -> ErrorKind {
        let kind = ErrorKind::new(operation, error);
        *self.errors().entry(kind).or_default() += 1;
        kind
    }

    fn errors(&self) -> MutexGuard<'_, BTreeMap<ErrorKind, u64>> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn sum(&self) -> Counts {
        Counts {
            numbers: self.numbers(|part| part.load(Ordering::Relaxed)),
            errors: self.errors().clone(),
        }
    }

    /// The same, and begins again with 0: what is counted meanwhile is in this sum or the
    /// next.
    pub fn take(&self) -> Counts {
        Counts {
            numbers: self.numbers(|part| part.swap(0, Ordering::Relaxed)),
            errors: std::mem::take(&mut self.errors()),
        }
    }

    fn numbers(&self, part: impl Fn(&AtomicU64) -> u64) -> [u64; COUNTERS] {
        std::array::from_fn(|counter| {
            let parts = self.shards.iter().map(|shard| &shard.0[counter]);
            parts.map(&part).sum()
        })
    }
}

/// Sums of [`Counters`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counts {
    numbers: [u64; COUNTERS],
    errors: BTreeMap<ErrorKind, u64>,
}

impl Counts {
    pub fn get(&self, counter: Counter) -> u64 {
        self.numbers[counter as usize]
    }

    /// How many failures there were of each kind.
    pub fn errors(&self) -> impl Iterator<Item = (ErrorKind, u64)> + '_ {
        self.errors.iter().map(|(kind, number)| (*kind, *number))
    }
}

impl AddAssign<&Counts> for Counts {
    fn add_assign(&mut self, other: &Counts) {
        for (number, more) in self.numbers.iter_mut().zip(&other.numbers) {
            *number += more;
        }
        for (kind, more) in &other.errors {
            *self.errors.entry(*kind).or_default() += more;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Barrier;

    use super::*;

    const THREADS: u64 = 16;

    #[test]
    fn nothing_that_was_counted_by_many_threads_is_lost() {
        let counters = Counters::default();
        let barrier = Barrier::new(THREADS as usize);
        let mut shards = BTreeSet::new();
        std::thread::scope(|scope| {
            let count = |thread| {
                let (counters, barrier) = (&counters, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    for _ in 0..10_000 {
                        counters.here().request(Operation::Write, thread);
                    }
                    let error = Error::new(libc::ENOSPC, "x");
                    counters.failed(Operation::Write, &error);
                    (counters.here() as *const Shard).addr()
                })
            };
            let threads: Vec<_> = (0..THREADS).map(count).collect();
            for thread in threads {
                shards.insert(thread.join().expect("a thread"));
            }
        });
        let sum = counters.sum();
        assert_eq!(sum.get(Counter::Writes), THREADS * 10_000);
        let bytes = (0..THREADS).sum::<u64>() * 10_000;
        assert_eq!(sum.get(Counter::WriteBytes), bytes);
        assert_eq!(sum.get(Counter::Reads), 0);
        let errors: Vec<_> = sum.errors().collect();
        assert_eq!(errors.len(), 1);
        assert_eq!(errors[0].0.errno_name(), "ENOSPC");
        assert_eq!(errors[0].1, THREADS);
        assert!(shards.len() > 1, "all threads use one shard");
    }

    #[test]
    fn sums_add_up() {
        let (one, other) = (Counters::default(), Counters::default());
        one.here().request(Operation::Read, 5);
        other.here().request(Operation::Read, 7);
        one.failed(Operation::Read, &Error::new(libc::EIO, "x"));
        other.failed(Operation::Read, &Error::new(libc::EIO, "x"));
        // A number that is no errno is as good as any other of those.
        for number in [5000, 5001] {
            other.failed(Operation::Zero, &Error::from_below(number, "x"));
        }
        let mut sum = one.sum();
        sum += &other.take();
        assert_eq!(other.sum(), Counts::default());
        assert_eq!(sum.get(Counter::Reads), 2);
        assert_eq!(sum.get(Counter::ReadBytes), 12);
        let errors: Vec<_> = sum
            .errors()
            .map(|(kind, number)| (kind.errno_name(), number))
            .collect();
        assert_eq!(errors, [("EIO".into(), 2), ("UnknownErrno".into(), 2)]);
    }
}
