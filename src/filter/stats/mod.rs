//! `cow-stats=FILE`: what is counted, as a JSON document for other programs.
//!
//! A document is written to another file of the directory, which then gets the name of the
//! one before. So who opens the file finds a whole document, and who has it open keeps the
//! one that he has.
//!
//! # When it is written, and by whom
//!
//! Before nbdkit serves, and when it ends, by nbdkit's main thread. In between by a thread of
//! its own, every second, and at once when a client disconnects, so that no client waits for
//! the file system of the document. Where there is no thread, who disconnects writes it.
//! Nothing is written if no number has changed. That a document can't be written is logged
//! once, and makes nothing else fail.
//!
//! Who writes holds `written`, so that an older document does not take the place of a newer
//! one. Under it the locks of the exports are taken for moments. (A first connection to a
//! kept overlay holds one of them while it reads the base. The document waits for that.)

mod document;
mod place;

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::config::ScopeKind;
use super::exports::Exports;
use crate::error::Result;
use crate::overlay::Budget;
pub use document::{Figures, Taken, Total};
use document::{document, now};
use place::Place;

/// The least time between two documents, if no client disconnects.
const PERIOD: Duration = Duration::from_secs(1);

/// After a document there is none for so many times the time that it took, since the maps of
/// large overlays are looked through for it; but not for longer than a minute, since it may
/// have been a file system that took the time.
const REST: u32 = 50;
const LONGEST_REST: Duration = Duration::from_secs(60);

/// The file, and who writes it.
pub struct Stats {
    place: Place,
    scope: ScopeKind,
    budget: Option<Arc<Budget>>,
    start_time: u64,
    written: Mutex<Written>,
    thread: Mutex<Thread>,
    woken: Condvar,
}

#[derive(Default)]
struct Written {
    /// What the document was made from, and whether it says that nbdkit is running.
    /// `None`: there is none, or the last could not be written.
    from: Option<(Total, Option<u64>, bool)>,
    has_failed: bool,
}

#[derive(Default)]
struct Thread {
    handle: Option<JoinHandle<()>>,
    is_wanted: bool,
    is_stopped: bool,
}

impl Stats {
    /// Fails if there can be no such file.
    pub fn new(path: &Path, scope: ScopeKind, budget: Option<Arc<Budget>>) -> Result<Self> {
        Ok(Stats {
            place: Place::new(path)?,
            scope,
            budget,
            start_time: now(),
            written: Mutex::default(),
            thread: Mutex::default(),
            woken: Condvar::new(),
        })
    }

    /// Writes a first document, and has others written until [`Stats::finish`].
    pub fn start(&'static self, exports: &'static Exports) {
        self.write(exports, true);
        let thread = Builder::new().name("cow-stats".to_string());
        match thread.spawn(|| self.run(exports)) {
            Ok(handle) => self.thread().handle = Some(handle),
            Err(e) => log::warn!(
                "there is no thread to write cow-stats, so it is written when a client \
                 disconnects only: {e}"
            ),
        }
    }

    /// Has the document written, because a client has disconnected.
    pub fn disconnected(&self, exports: &Exports) {
        let mut thread = self.thread();
        thread.is_wanted = true;
        let is_there = |handle: &JoinHandle<()>| !handle.is_finished();
        let has_thread = thread.handle.as_ref().is_some_and(is_there);
        drop(thread);
        self.woken.notify_all();
        if !has_thread {
            self.write(exports, true);
        }
    }

    /// Ends the thread, and writes the last document.
    pub fn finish(&self, exports: &Exports) {
        self.thread().is_stopped = true;
        self.woken.notify_all();
        let handle = self.thread().handle.take();
        if let Some(handle) = handle {
            // nbdkit unloads the library after this. A panic was logged when it happened.
            let _ = handle.join();
        }
        self.write(exports, false);
    }

    fn run(&self, exports: &Exports) {
        let mut rest = Duration::ZERO;
        while self.wait(rest, false) && self.wait(PERIOD.saturating_sub(rest), true) {
            let begun = Instant::now();
            self.write(exports, true);
            rest = (begun.elapsed() * REST).min(LONGEST_REST);
        }
    }

    /// Waits for so long, or if `may_wake` until a document is wanted. False: the thread is
    /// to end.
    fn wait(&self, at_most: Duration, may_wake: bool) -> bool {
        let waits = |thread: &mut Thread| !(thread.is_stopped || may_wake && thread.is_wanted);
        let (mut thread, _) = self
            .woken
            .wait_timeout_while(self.thread(), at_most, waits)
            .unwrap_or_else(PoisonError::into_inner);
        if may_wake {
            thread.is_wanted = false;
        }
        !thread.is_stopped
    }

    fn thread(&self) -> MutexGuard<'_, Thread> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a document if anything has changed since the last.
    fn write(&self, exports: &Exports, is_running: bool) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        // What is counted from here on makes a new document, whether this one has it or not.
        let budget = self.budget.as_deref();
        // An overlay gives back what it has taken after its last connection was counted.
        let used = budget.map(Budget::used);
        let from = Some((exports.total(), used, is_running));
        if written.from == from {
            return;
        }
        let document = document(exports, self.scope, budget, self.start_time, is_running);
        match self.place.replace(&document) {
            Ok(()) => {
                written.from = from;
                written.has_failed = false;
            }
            Err(e) => {
                written.from = None;
                if !std::mem::replace(&mut written.has_failed, true) {
                    log::warn!("{e}");
                }
            }
        }
    }
}
