//! The limit to what all overlays of a process take together: blocks that are stored, the
//! memory of the block maps, and the tables of an image.
//!
//! Space is *settled* when something takes it, and *in flight* while a request is about to
//! take it and may still fail.
//!
//! # Never over, and not refused while there is room
//!
//! What is settled and what is in flight are together never more than the limit: both
//! change under one lock, and nothing is taken that was not charged before. (An image that
//! is resumed is settled as it is, be it more or not.)
//!
//! A charge that does not fit beside what is settled is refused. If only what is in flight
//! is in its way, it waits: that may fail, or turn out to be stored already, and be given
//! back.
//!
//! # Nobody waits for ever
//!
//! 1. Who waits has nothing in flight. [`Account::take`] settles at once, and a
//!    [`Charge`] is the last thing that a change asks for before it takes what it has
//!    charged. (That of a first change is settled or given back before more is asked for.)
//! 2. Who has something in flight waits for nobody who may be waiting here. Such a request
//!    has its stripes already, and takes only locks that are held for moments, and under
//!    which nothing is charged.
//! 3. So all that is in flight is settled or given back. While somebody waits nobody else
//!    is let in, so what is in flight becomes less until the one who waits fits or is
//!    refused.
//!
//! # Locks
//!
//! That of the budget is an inner one: it is held for moments, and nothing is taken under
//! it. Who waits may hold stripes.

use std::cell::Cell;
use std::sync::{Arc, PoisonError};

use super::limit::OVERLAY_LEN;
use super::map::BlockMap;
use crate::block::BlockSize;
use crate::error::{Error, Result};
use crate::sync::{AtomicU64, Condvar, Mutex, MutexGuard, Ordering, locked};

/// See the module's documentation. All numbers are bytes.
pub struct Budget {
    limit: u64,
    taken: Mutex<Taken>,
    /// Somebody waits, and what is taken has changed; or somebody has stopped waiting.
    changed: Condvar,
    /// See [`Budget::first_change`].
    first_change: Mutex<()>,
}

#[derive(Default)]
struct Taken {
    settled: u64,
    in_flight: u64,
    /// How much has been given back of what was settled, since the start.
    given_back: u64,
    /// Somebody waits until more fits.
    has_waiter: bool,
}

/// How much of the limit a change may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// A client has asked for the change.
    All,
    /// A copy of the base, which nobody has asked for: it must leave room for what is.
    Half,
}

impl Budget {
    pub fn new(limit: u64) -> Self {
        Budget {
            limit,
            taken: Mutex::default(),
            changed: Condvar::new(),
            first_change: Mutex::new(()),
        }
    }

    /// EINVAL if nothing at all could be stored in such blocks, where the first one needs
    /// `tables` bytes more.
    pub fn expect_room_for_a_block(&self, block_size: BlockSize, tables: u64) -> Result<()> {
        let least = OVERLAY_LEN + block_size.bytes() + BlockMap::LEAF_LEN + tables;
        if self.limit >= least {
            return Ok(());
        }
        Err(Error::new(
            libc::EINVAL,
            format!(
                "cow-limit={} is too small: an overlay with one block of {block_size} bytes takes \
                 {least} bytes",
                self.limit
            ),
        ))
    }

    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// What is taken, with what is in flight.
    pub fn used(&self) -> u64 {
        let taken = locked(&self.taken);
        taken.settled.saturating_add(taken.in_flight)
    }

    /// Held by an overlay until its first change has all that it needs. Who holds it may wait
    /// for room, and who wants it has nothing in flight.
    pub fn first_change(&self) -> MutexGuard<'_, ()> {
        locked(&self.first_change)
    }

    /// Moves on when something that was settled is given back.
    pub fn given_back(&self) -> u64 {
        locked(&self.taken).given_back
    }

    /// Whether so much more could be charged at this moment, without waiting.
    pub fn has_room(&self, bytes: u64, share: Share) -> bool {
        self.used().saturating_add(bytes) <= self.most(share)
    }

    fn most(&self, share: Share) -> u64 {
        match share {
            Share::All => self.limit,
            Share::Half => self.limit / 2,
        }
    }

    /// ENOSPC if so much more does not fit beside what is settled.
    pub fn expect_fits(&self, bytes: u64, share: Share) -> Result<()> {
        let settled = locked(&self.taken).settled;
        if bytes == 0 || settled.saturating_add(bytes) <= self.most(share) {
            return Ok(());
        }
        Err(self.refused(bytes, settled))
    }

    /// Puts `bytes` in flight. ENOSPC if they don't fit. (Nothing always fits.)
    fn charge(&self, bytes: u64, share: Share) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let most = self.most(share);
        let mut taken = locked(&self.taken);
        let mut is_waiter = false;
        let fits = loop {
            let settled = taken.settled.saturating_add(bytes);
            if settled > most {
                break false;
            }
            let fits = settled.saturating_add(taken.in_flight) <= most;
            if fits && (is_waiter || !taken.has_waiter) {
                break true;
            }
            // It is not worth waiting for a copy.
            if share == Share::Half {
                break false;
            }
            if !taken.has_waiter {
                taken.has_waiter = true;
                is_waiter = true;
            }
            taken = self
                .changed
                .wait(taken)
                .unwrap_or_else(PoisonError::into_inner);
        };
        if is_waiter {
            taken.has_waiter = false;
            self.changed.notify_all();
        }
        if !fits {
            return Err(self.refused(bytes, taken.settled));
        }
        taken.in_flight += bytes;
        Ok(())
    }

    #[cold]
    fn refused(&self, bytes: u64, settled: u64) -> Error {
        Error::over_limit(format!(
            "cow-limit={}: {settled} bytes are taken, and {bytes} more do not fit",
            self.limit
        ))
    }

    /// `landed` of what is in flight have been taken, or `given_back` of what was taken are
    /// free again, or both; and `unused` of what is in flight are not going to be taken.
    fn settle(&self, landed: u64, given_back: u64, unused: u64) {
        let mut taken = locked(&self.taken);
        taken.in_flight -= landed + unused;
        taken.settled = taken.settled + landed - given_back;
        taken.given_back = taken.given_back.wrapping_add(given_back);
        // The call of the system is saved where nobody waits.
        if taken.has_waiter {
            self.changed.notify_all();
        }
    }
}

/// What one overlay has taken. All of it is given back when this is dropped.
pub struct Account {
    budget: Arc<Budget>,
    settled: AtomicU64,
}

impl Account {
    pub fn new(budget: &Arc<Budget>) -> Arc<Self> {
        Arc::new(Account {
            budget: Arc::clone(budget),
            settled: AtomicU64::new(0),
        })
    }

    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Puts `bytes` in flight: the caller must have nothing there yet. ENOSPC if they don't
    /// fit.
    pub fn charge(&self, bytes: u64, share: Share) -> Result<Charge<'_>> {
        self.budget.charge(bytes, share)?;
        Ok(Charge {
            account: self,
            in_flight: Cell::new(bytes),
        })
    }

    /// Takes `bytes`, as [`Account::charge`] does, and settles them at once.
    pub fn take(&self, bytes: u64, share: Share) -> Result<()> {
        self.charge(bytes, share)?.settle(bytes);
        Ok(())
    }

    /// Takes what is there already, whether or not it fits.
    pub fn take_all_the_same(&self, bytes: u64) {
        let mut taken = locked(&self.budget.taken);
        taken.settled = taken.settled.saturating_add(bytes);
        self.settled.fetch_add(bytes, Ordering::Relaxed);
    }

    /// `bytes` that were taken are free again.
    pub fn give_back(&self, bytes: u64) {
        self.settled.fetch_sub(bytes, Ordering::Relaxed);
        self.budget.settle(0, bytes, 0);
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let settled = self.settled.load(Ordering::Relaxed);
        self.budget.settle(0, settled, 0);
    }
}

/// Bytes in flight. What was not settled when this is dropped is free again.
pub struct Charge<'a> {
    account: &'a Account,
    in_flight: Cell<u64>,
}

impl Charge<'_> {
    /// `bytes` of it have been taken.
    pub fn settle(&self, bytes: u64) {
        self.in_flight.set(self.in_flight.get() - bytes);
        // Before another can see it, or an overlay might give back what it has not noted.
        self.account.settled.fetch_add(bytes, Ordering::Relaxed);
        self.account.budget.settle(bytes, 0, 0);
    }
}

impl Drop for Charge<'_> {
    fn drop(&mut self) {
        let unused = self.in_flight.get();
        if unused > 0 {
            self.account.budget.settle(0, 0, unused);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    fn account(limit: u64) -> (Arc<Budget>, Arc<Account>) {
        let budget = Arc::new(Budget::new(limit));
        let account = Account::new(&budget);
        (budget, account)
    }

    #[test]
    fn what_fits_is_taken_to_the_byte_and_no_byte_more() {
        let (budget, account) = account(1000);
        account.take(999, Share::All).expect("it fits");
        let refused = account.take(2, Share::All).expect_err("one too many");
        assert_eq!(refused.errno(), libc::ENOSPC);
        assert!(refused.is_full() && refused.is_over_limit());
        for number in ["cow-limit=1000", "999 bytes", "2 more"] {
            assert!(
                refused.to_string().contains(number),
                "{number} in {refused}"
            );
        }
        account.take(1, Share::All).expect("it fits");
        assert_eq!(budget.used(), 1000);
        account.take(0, Share::All).expect("nothing always fits");
        account.give_back(1000);
        account
            .take(1000, Share::All)
            .expect("it was all given back");
    }

    #[test]
    fn what_is_not_settled_is_given_back() {
        let (budget, account) = account(1000);
        let charge = account.charge(900, Share::All).expect("it fits");
        assert_eq!(budget.used(), 900);
        charge.settle(300);
        assert_eq!(budget.used(), 900);
        drop(charge);
        assert_eq!(budget.used(), 300);
        assert_eq!(account.settled.load(Ordering::Relaxed), 300);
    }

    #[test]
    fn an_account_gives_its_own_back_when_it_is_dropped() {
        let (budget, one) = account(1000);
        let other = Account::new(&budget);
        one.take(400, Share::All).expect("it fits");
        other.take(300, Share::All).expect("it fits");
        one.give_back(100);
        drop(one);
        assert_eq!(budget.used(), 300);
        drop(other);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_copy_gets_no_more_than_half() {
        let (budget, account) = account(1001);
        account.take(400, Share::All).expect("it fits");
        account.take(100, Share::Half).expect("it fits");
        assert!(!budget.has_room(1, Share::Half));
        let refused = account.take(1, Share::Half).expect_err("more than half");
        assert!(refused.is_over_limit());
        assert!(budget.has_room(501, Share::All));
        account.take(501, Share::All).expect("it fits");
    }

    #[test]
    fn what_is_there_already_is_taken_and_then_nothing_more() {
        let (budget, account) = account(1000);
        account.take_all_the_same(5000);
        assert_eq!(budget.used(), 5000);
        account
            .take(1, Share::All)
            .expect_err("it is over the limit");
        account.take(0, Share::All).expect("nothing always fits");
        account.give_back(4500);
        account.take(500, Share::All).expect("it fits again");
    }

    /// Runs `charge` on a thread, and tells whether it ends while `meanwhile` has not been
    /// done yet.
    fn waits(charge: impl FnOnce() -> bool + Send, meanwhile: impl FnOnce()) -> (bool, bool) {
        thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            let thread = scope.spawn(move || {
                let fits = charge();
                sender.send(()).expect("received");
                fits
            });
            let has_waited = receiver.recv_timeout(Duration::from_millis(50)).is_err();
            meanwhile();
            (has_waited, thread.join().expect("no panic"))
        })
    }

    #[test]
    fn who_is_kept_out_by_what_is_in_flight_waits_for_it() {
        for lands in [false, true] {
            let (_budget, account) = account(1000);
            let in_flight = account.charge(600, Share::All).expect("it fits");
            let (has_waited, fits) = waits(
                || account.take(500, Share::All).is_ok(),
                || {
                    if lands {
                        in_flight.settle(600);
                    }
                    drop(in_flight);
                },
            );
            assert!(has_waited, "it was not refused for what may be given back");
            assert_eq!(fits, !lands);
        }
    }

    #[test]
    fn a_copy_does_not_wait() {
        let (_budget, account) = account(1000);
        let _in_flight = account.charge(400, Share::All).expect("it fits");
        let refused = account.charge(200, Share::Half).err();
        assert!(refused.expect("more than half").is_over_limit());
    }

    /// Small ones could keep a large one out for ever.
    #[test]
    fn nobody_is_let_in_before_one_who_waits() {
        let (budget, account) = account(1000);
        let first = account.charge(600, Share::All).expect("it fits");
        thread::scope(|scope| {
            let large = scope.spawn(|| account.take(1000, Share::All).is_ok());
            while !locked(&budget.taken).has_waiter {
                thread::yield_now();
            }
            let (has_waited, fits) = waits(|| account.take(1, Share::All).is_ok(), || drop(first));
            assert!(has_waited, "it would have fitted");
            assert!(!fits, "the large one was first");
            assert!(large.join().expect("no panic"));
        });
    }

    #[test]
    fn threads_never_have_more_than_the_limit_and_leave_nothing() {
        let (budget, account) = account(1000);
        thread::scope(|scope| {
            for thread in 0..8 {
                let (budget, account) = (&budget, &account);
                scope.spawn(move || {
                    for round in 0..2000_u64 {
                        let bytes = (round * 37 + thread * 101) % 400 + 1;
                        let Ok(charge) = account.charge(bytes, Share::All) else {
                            continue;
                        };
                        let landed = bytes / 2;
                        charge.settle(landed);
                        drop(charge);
                        let used = budget.used();
                        assert!(used <= 1000, "{used}");
                        account.give_back(landed);
                    }
                });
            }
        });
        assert_eq!(budget.used(), 0);
        account.take(1000, Share::All).expect("all is free again");
    }
}
