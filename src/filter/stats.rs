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

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::ops::AddAssign;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::resource::{Resource, getrlimit};
use serde_json::{Map, Value, json};
use tempfile::NamedTempFile;

use super::config::ScopeKind;
use super::exports::Exports;
use crate::counters::{Counter, Counts, Operation};
use crate::error::{Error, Result};
use crate::overlay::{Overlay, Store};

/// The least time between two documents, if no client disconnects.
const PERIOD: Duration = Duration::from_secs(1);

/// After a document there is none for so many times the time that it took: the maps of
/// large overlays are looked through for it.
const REST: u32 = 50;

/// What each document begins with: its keys are in alphabetical order.
const START: &[u8] = b"{\n  \"cow\": {";

/// What was counted so far.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Total {
    /// Those that there are now.
    pub connections: usize,
    pub counts: Counts,
}

/// What there is to tell of an export.
#[derive(Debug, Default)]
pub struct Figures {
    pub name: String,
    pub size: u64,
    pub block_size: u64,
    pub total: Total,
    pub taken: Taken,
}

/// What overlays take now, and what was done for them that no request is counted for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Taken {
    data_bytes: u64,
    waiting_bytes: u64,
    map_bytes: u64,
    flushes_done: u64,
    flushes_shared: u64,
}

impl Taken {
    /// Takes time for each leaf of the map.
    pub fn by<S: Store>(overlay: &Overlay<S>) -> Self {
        let usage = overlay.usage();
        let block = overlay.block_size().bytes();
        let (flushes_done, flushes_shared) = overlay.store().flushes();
        Taken {
            data_bytes: usage.data * block,
            waiting_bytes: usage.unused * block,
            map_bytes: usage.memory,
            flushes_done,
            flushes_shared,
        }
    }
}

impl AddAssign for Taken {
    fn add_assign(&mut self, other: Taken) {
        self.data_bytes += other.data_bytes;
        self.waiting_bytes += other.waiting_bytes;
        self.map_bytes += other.map_bytes;
        self.flushes_done += other.flushes_done;
        self.flushes_shared += other.flushes_shared;
    }
}

impl Figures {
    pub fn json(&self) -> Value {
        let mut json = figures(&self.total, self.taken);
        json.insert("name".into(), json!(self.name));
        json.insert("size".into(), json!(self.size));
        json.insert("block_size".into(), json!(self.block_size));
        Value::Object(json)
    }
}

fn figures(total: &Total, taken: Taken) -> Map<String, Value> {
    let count = |counter| total.counts.get(counter);
    let figures = [
        (
            "connections",
            json!({"now": total.connections, "ever": count(Counter::Connections)}),
        ),
        ("requests", requests(&total.counts)),
        (
            "base",
            json!({"reads": count(Counter::BaseReads), "read_bytes": count(Counter::BaseReadBytes)}),
        ),
        (
            "read_modify_writes",
            json!(count(Counter::ReadModifyWrites)),
        ),
        (
            "copied_blocks",
            json!({
                "cow_on_read": count(Counter::CopiedOnRead),
                "cow_on_cache": count(Counter::CopiedOnCache),
            }),
        ),
        (
            "overlay",
            json!({
                "data_bytes": taken.data_bytes,
                "waiting_bytes": taken.waiting_bytes,
                "given_back_bytes": count(Counter::GivenBackBytes),
                "map_bytes": taken.map_bytes,
            }),
        ),
        (
            "flushes",
            json!({
                "asked": count(Counter::Flushes) + count(Counter::Fua),
                "done": taken.flushes_done,
                "shared": taken.flushes_shared,
            }),
        ),
        ("errors", errors(&total.counts)),
    ];
    figures
        .into_iter()
        .map(|(key, value)| (key.to_string(), value))
        .collect()
}

fn requests(counts: &Counts) -> Value {
    let mut requests = Map::new();
    for request in Operation::REQUESTS {
        let Some((number, bytes)) = request.counters() else {
            continue;
        };
        let mut figures = Map::new();
        figures.insert("count".into(), json!(counts.get(number)));
        if let Some(bytes) = bytes {
            figures.insert("bytes".into(), json!(counts.get(bytes)));
        }
        requests.insert(key(request), Value::Object(figures));
    }
    Value::Object(requests)
}

fn errors(counts: &Counts) -> Value {
    let mut errors = Map::new();
    for (kind, number) in counts.errors() {
        let of_operation = errors.entry(key(kind.operation)).or_insert(json!({}));
        of_operation[kind.errno_name()] = json!(number);
    }
    Value::Object(errors)
}

/// As all keys are: with underscores.
fn key(operation: Operation) -> String {
    operation.name().replace('-', "_")
}

/// The file, and who writes it.
pub struct Stats {
    place: Place,
    scope: ScopeKind,
    start_time: u64,
    written: Mutex<Written>,
    thread: Mutex<Thread>,
    woken: Condvar,
}

#[derive(Default)]
struct Written {
    /// What the document was made from, and whether it says that nbdkit is running.
    /// `None`: there is none, or the last could not be written.
    from: Option<(Total, bool)>,
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
    pub fn new(path: &Path, scope: ScopeKind) -> Result<Self> {
        Ok(Stats {
            place: Place::new(path)?,
            scope,
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
            rest = begun.elapsed() * REST;
        }
    }

    /// Waits for so long, or if `may_wake` until a document is wanted. False: the thread is
    /// to end.
    fn wait(&self, at_most: Duration, may_wake: bool) -> bool {
        let goes_on = |thread: &mut Thread| !thread.is_stopped && !(may_wake && thread.is_wanted);
        let (mut thread, _) = self
            .woken
            .wait_timeout_while(self.thread(), at_most, goes_on)
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
        let from = Some((exports.total(), is_running));
        if written.from == from {
            return;
        }
        match self.place.replace(&self.document(exports, is_running)) {
            Ok(()) => written.from = from,
            Err(e) => {
                written.from = None;
                if !std::mem::replace(&mut written.has_failed, true) {
                    log::warn!("{e}");
                }
            }
        }
    }

    fn document(&self, exports: &Exports, is_running: bool) -> String {
        let of_exports = exports.figures();
        let mut taken = Taken::default();
        for export in &of_exports {
            taken += export.taken;
        }
        // No less than those of the exports.
        let total = exports.total();
        let document = json!({
            "cow": {
                "package": env!("CARGO_PKG_NAME"),
                "version": env!("CARGO_PKG_VERSION"),
            },
            "exports": of_exports.iter().map(Figures::json).collect::<Vec<_>>(),
            "pid": process::id(),
            "running": is_running,
            "scope": self.scope.name(),
            "start_time_ms": self.start_time,
            "time_ms": now(),
            "total": figures(&total, taken),
        });
        format!("{document:#}\n")
    }
}

/// Milliseconds since 1970, UTC.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// Where the documents are.
struct Place {
    path: PathBuf,
    /// What the names of the files begin with that are to become the next document.
    prefix: OsString,
}

/// How many random characters follow the prefix.
const RANDOM: usize = 6;

impl Place {
    /// Tries whether a document can be written to `path`, which is absolute. What is there
    /// must be a document, or empty: another file that was named by mistake is not
    /// replaced.
    fn new(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or_default();
        let mut prefix = OsString::from(".cow-stats-");
        prefix.push(name);
        prefix.push("-");
        let place = Place {
            path: path.to_owned(),
            prefix,
        };
        place.expect_replaceable()?;
        place.remove_leftovers();
        place.make("{}").map_err(|e| place.failed(e))?;
        Ok(place)
    }

    fn expect_replaceable(&self) -> Result<()> {
        let metadata = match fs::symlink_metadata(&self.path) {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(self.failed(e)),
        };
        let refused = |what| {
            let path = self.path.display();
            let message = format!("cow-stats={path} can't be used: {what}");
            Err(Error::new(libc::EINVAL, message))
        };
        if !metadata.is_file() {
            return refused("it is not a regular file");
        }
        let mut start = Vec::new();
        File::open(&self.path)
            .and_then(|file| file.take(START.len() as u64).read_to_end(&mut start))
            .map_err(|e| self.failed(e))?;
        if !start.is_empty() && start != START {
            return refused("there is a file of another kind, which it would replace");
        }
        Ok(())
    }

    /// Removes what an nbdkit has left that was killed. (One that runs, and has the same
    /// file by mistake, writes its next document.)
    fn remove_leftovers(&self) {
        let Ok(entries) = fs::read_dir(self.directory()) else {
            return;
        };
        let prefix = self.prefix.as_encoded_bytes();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.as_encoded_bytes();
            if name.starts_with(prefix) && name.len() == prefix.len() + RANDOM {
                // Another user's stays.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Makes `document` the one that is found.
    fn replace(&self, document: &str) -> Result<()> {
        let file = self.make(document).map_err(|e| self.failed(e))?;
        file.persist(&self.path).map_err(|e| self.failed(e.error))?;
        Ok(())
    }

    /// A file that has `document`, which goes away with the value.
    fn make(&self, document: &str) -> io::Result<NamedTempFile<File>> {
        let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE)?;
        if document.len() as u64 > limit {
            // The system would end the process by SIGXFSZ.
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        // By calls of our own: the library's hide the errno of a failure.
        let create = |path: &Path| {
            let mut options = File::options();
            options.write(true).create_new(true).mode(0o600).open(path)
        };
        let named = tempfile::Builder::new()
            .prefix(&self.prefix)
            .rand_bytes(RANDOM)
            .make_in(self.directory(), create)?;
        let mut file = named.as_file();
        file.write_all(document.as_bytes())?;
        // Whatever the umask is: who may see it is up to the directory.
        file.set_permissions(Permissions::from_mode(0o644))?;
        Ok(named)
    }

    fn failed(&self, source: io::Error) -> Error {
        let path = self.path.display();
        Error::io(source, format!("cow-stats={path} can't be written"))
    }
}
