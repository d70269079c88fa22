//! What is told of the exports, as JSON.
//!
//! The manual page describes each figure, and promises that the names stay.

use std::ops::AddAssign;
use std::process;
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use crate::counters::{Counter, Counts, Operation};
use crate::filter::config::ScopeKind;
use crate::filter::exports::Exports;
use crate::overlay::{Budget, Overlay, Store};

/// What each document begins with: its keys are in alphabetical order.
pub const START: &[u8] = b"{\n  \"cow\": {";

/// What was counted so far.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Total {
    /// Those that there are now.
    pub connections: usize,
    pub counts: Counts,
}

/// So many exports are told of: a client may be able to make up names, each of which takes
/// place in the document.
const MOST_EXPORTS: usize = 1000;

/// In characters, of the name of an export.
const LONGEST_NAME: usize = 255;

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
        let name = self.name.chars().take(LONGEST_NAME).collect::<String>();
        json.insert("name".into(), json!(name));
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

/// The document of a filter that runs since `start_time`, as of [`now`].
pub fn document(
    exports: &Exports,
    scope: ScopeKind,
    budget: Option<&Budget>,
    start_time: u64,
    is_running: bool,
) -> String {
    let of_exports = exports.figures();
    let taken = exports.taken(&of_exports);
    // No less than those of the exports.
    let total = exports.total();
    let document = json!({
        "cow": {
            "package": env!("CARGO_PKG_NAME"),
            "version": env!("CARGO_PKG_VERSION"),
        },
        "exports": of_exports.iter().take(MOST_EXPORTS).map(Figures::json).collect::<Vec<_>>(),
        "exports_left_out": of_exports.len().saturating_sub(MOST_EXPORTS),
        "limit": budget.map(|budget| {
            json!({"bytes": budget.limit(), "used_bytes": budget.used()})
        }),
        "pid": process::id(),
        "running": is_running,
        "scope": scope.name(),
        "start_time_ms": start_time,
        "time_ms": now(),
        "total": figures(&total, taken),
    });
    format!("{document:#}\n")
}

/// Milliseconds since 1970, UTC.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}
