//! The core, driven without nbdkit, over a base in memory: against a model, with
//! races forced, and with faults injected.

mod disk;
mod extents;
mod faults;
mod kept;
mod limit;
mod model;
mod order;
mod races;
mod reclaim;
mod trim;
