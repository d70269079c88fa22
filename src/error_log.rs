//! Which failures go to the log, so that a client which tries again and again does not
//! fill it: the first of a kind, and then one every few seconds, with the number of those
//! between.
//!
//! The log is that of the process, and so is what was logged.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::counters::ErrorKind;

/// The least time between two lines about failures of a kind.
const PERIOD: Duration = Duration::from_secs(5);

static LOG: ErrorLog = ErrorLog {
    kinds: Mutex::new(BTreeMap::new()),
};

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

/// Logs how many failures were not. To be called when there will be none for a while.
pub fn tell_rest() {
    for (ErrorKind { operation, errno }, unlogged) in LOG.take_rest() {
        log::warn!(
            "{unlogged} more times: {} failed: {}",
            operation.name(),
            Errno::from_raw(errno).desc()
        );
    }
}

struct ErrorLog {
    /// No more than there are operations and errnos.
    kinds: Mutex<BTreeMap<ErrorKind, Logged>>,
}

/// The failures of a kind.
struct Logged {
    last: Instant,
    /// How many there were since.
    unlogged: u64,
}

impl ErrorLog {
    fn kinds(&self) -> MutexGuard<'_, BTreeMap<ErrorKind, Logged>> {
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(&self, kind: ErrorKind, now: Instant) -> Option<u64> {
        let mut kinds = self.kinds();
        let Some(logged) = kinds.get_mut(&kind) else {
            let first = Logged {
                last: now,
                unlogged: 0,
            };
            kinds.insert(kind, first);
            return Some(0);
        };
        if now.duration_since(logged.last) < PERIOD {
            logged.unlogged += 1;
            return None;
        }
        logged.last = now;
        Some(std::mem::take(&mut logged.unlogged))
    }

    /// The numbers of those that were not logged, which are 0 from now on.
    fn take_rest(&self) -> Vec<(ErrorKind, u64)> {
        let mut kinds = self.kinds();
        let rest = kinds
            .iter_mut()
            .map(|(kind, logged)| (*kind, std::mem::take(&mut logged.unlogged)));
        rest.filter(|(_, unlogged)| *unlogged > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::Operation;

    #[test]
    fn of_many_failures_of_a_kind_one_is_logged_in_five_seconds() {
        let log = ErrorLog {
            kinds: Mutex::default(),
        };
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

        assert_eq!(log.take_rest(), [(full, 1999)]);
        assert_eq!(log.take_rest(), []);
        assert_eq!(log.admit(full, now), None);
        assert_eq!(log.admit(full, now + PERIOD), Some(1));
    }
}
