//! Which failures go to the log, so that a client which tries again and again does not
//! fill it: the first of a kind, and then a line every few seconds, with the number of those
//! between: with the next failure, or by a thread ([`run`]) if there is none.
//!
//! The log is that of the process, and so is what was logged.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::counters::ErrorKind;

/// The least time between two lines about failures of a kind.
const PERIOD: Duration = Duration::from_secs(5);

static LOG: ErrorLog = ErrorLog::new();

/// Whether a failure of this kind is to be logged: the number of those before it that were
/// not. `None`: it is one of these.
pub fn admit(kind: ErrorKind) -> Option<u64> {
    LOG.admit(kind, Instant::now())
}

/// Logs a failure of which no client is told, if it is to be.
pub fn warn(kind: ErrorKind, message: impl FnOnce() -> String) {
    if let Some(unlogged) = admit(kind) {
        log::warn!("{}{}", message(), Unlogged(unlogged));
    }
}

/// How a line in the log ends, where there were so many of its kind before that were not
/// logged.
#[derive(Debug, Clone, Copy)]
pub struct Unlogged(pub u64);

impl fmt::Display for Unlogged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            unlogged => write!(f, " (and {unlogged} more times since the last message)"),
        }
    }
}

/// Logs every few seconds how many failures were not, until [`stop`] is called. For a
/// thread of its own.
pub fn run() {
    let mut kinds = LOG.kinds();
    while !kinds.is_stopped {
        let now = Instant::now();
        let due = kinds.take_due(now);
        kinds = if !due.is_empty() {
            drop(kinds);
            tell(due);
            LOG.kinds()
        } else {
            LOG.wait(kinds, now)
        };
    }
}

/// Ends the thread, and logs how many failures were not logged so far.
pub fn stop() {
    let mut kinds = LOG.kinds();
    kinds.is_stopped = true;
    let rest = kinds.take_rest();
    drop(kinds);
    LOG.changed.notify_all();
    tell(rest);
}

/// Logs what is left, after [`stop`].
pub fn tell_rest() {
    let rest = LOG.kinds().take_rest();
    tell(rest);
}

fn tell(unlogged: Vec<(ErrorKind, u64)>) {
    for (ErrorKind { operation, errno }, number) in unlogged {
        log::warn!(
            "{number} more times: {} failed: {}",
            operation.name(),
            Errno::from_raw(errno).desc()
        );
    }
}

struct ErrorLog {
    kinds: Mutex<Kinds>,
    /// A failure was not logged, and the thread may not know yet; or it is to end.
    changed: Condvar,
}

struct Kinds {
    /// No more than there are operations and errnos.
    logged: BTreeMap<ErrorKind, Logged>,
    is_stopped: bool,
}

/// The failures of a kind.
struct Logged {
    last: Instant,
    /// How many there were since.
    unlogged: u64,
}

impl ErrorLog {
    const fn new() -> Self {
        ErrorLog {
            kinds: Mutex::new(Kinds {
                logged: BTreeMap::new(),
                is_stopped: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn kinds(&self) -> MutexGuard<'_, Kinds> {
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(&self, kind: ErrorKind, now: Instant) -> Option<u64> {
        let mut kinds = self.kinds();
        let Some(logged) = kinds.logged.get_mut(&kind) else {
            let first = Logged {
                last: now,
                unlogged: 0,
            };
            kinds.logged.insert(kind, first);
            return Some(0);
        };
        if now.duration_since(logged.last) < PERIOD {
            logged.unlogged += 1;
            if logged.unlogged == 1 {
                self.changed.notify_all();
            }
            return None;
        }
        logged.last = now;
        Some(std::mem::take(&mut logged.unlogged))
    }

    /// Waits until something may be due. It is `now`.
    fn wait<'a>(&self, kinds: MutexGuard<'a, Kinds>, now: Instant) -> MutexGuard<'a, Kinds> {
        match kinds.next_due() {
            Some(due) => {
                let time = due.saturating_duration_since(now);
                let woken = self.changed.wait_timeout(kinds, time);
                woken.unwrap_or_else(PoisonError::into_inner).0
            }
            None => {
                let woken = self.changed.wait(kinds);
                woken.unwrap_or_else(PoisonError::into_inner)
            }
        }
    }
}

impl Kinds {
    /// When there is something to tell.
    fn next_due(&self) -> Option<Instant> {
        let waiting = self.logged.values().filter(|logged| logged.unlogged > 0);
        waiting.map(|logged| logged.last + PERIOD).min()
    }

    /// The numbers of those that were not logged, of the kinds of which a line is due.
    fn take_due(&mut self, now: Instant) -> Vec<(ErrorKind, u64)> {
        self.take(|logged| logged.last + PERIOD <= now, now)
    }

    /// The same of all kinds.
    fn take_rest(&mut self) -> Vec<(ErrorKind, u64)> {
        self.take(|_| true, Instant::now())
    }

    fn take(&mut self, is_due: impl Fn(&Logged) -> bool, now: Instant) -> Vec<(ErrorKind, u64)> {
        let waiting = self
            .logged
            .iter_mut()
            .filter(|(_, logged)| logged.unlogged > 0 && is_due(logged));
        let taken = waiting.map(|(kind, logged)| {
            logged.last = now;
            (*kind, std::mem::take(&mut logged.unlogged))
        });
        taken.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::Operation;

    #[test]
    fn of_many_failures_of_a_kind_one_is_logged_in_five_seconds() {
        let log = ErrorLog::new();
        let kind = |operation, errno| ErrorKind { operation, errno };
        let full = kind(Operation::Write, libc::ENOSPC);
        let start = Instant::now();
        let mut logged = Vec::new();
        for milliseconds in 0..12_000 {
            let now = start + Duration::from_millis(milliseconds);
            logged.extend(log.admit(full, now).map(|before| (milliseconds, before)));
        }
        assert_eq!(logged, [(0, 0), (5000, 4999), (10_000, 4999)]);

        // Other kinds do not wait for it.
        let now = start + Duration::from_secs(12);
        assert_eq!(log.admit(kind(Operation::Write, libc::EIO), now), Some(0));
        assert_eq!(log.admit(kind(Operation::Zero, libc::ENOSPC), now), Some(0));

        // Without another failure it is told when the time has come.
        let due = start + Duration::from_secs(15);
        assert_eq!(log.kinds().next_due(), Some(due));
        assert_eq!(log.kinds().take_due(now), []);
        assert_eq!(log.kinds().take_due(due), [(full, 1999)]);
        assert_eq!(log.kinds().next_due(), None);
        assert_eq!(log.admit(full, due), None);
        assert_eq!(log.admit(full, due + PERIOD), Some(1));
        assert_eq!(log.admit(full, due + PERIOD), None);
        assert_eq!(log.kinds().take_rest(), [(full, 1)]);
    }
}
