//! nbdkit-cow-filter: write to a disk without changing it.
//!
//! The library is loaded by nbdkit (`nbdkit --filter=cow PLUGIN`). It serves a
//! disk that clients can write to, over a plugin that is only read: what is
//! written goes to an overlay.
//!
//! Dependencies point one way, down this list:
//!
//! - [`nbdkit`]: the boundary, and the only place that speaks C
//! - [`filter`]: what nbdkit's callbacks mean, in safe Rust
//! - [`config`]: the parameters
//! - [`overlay`]: the core: block map, store, and all the locking
//! - [`qcow2`]: the image that an overlay can be kept in
//! - [`sparse`]: system calls on sparse files
//! - [`base`]: what lies beneath the overlay
//! - [`block`]: units, and the splitting of requests into blocks
//! - [`buffer`]: bytes in memory
//! - `sync`: the primitives of the parallel code
//! - [`error`]: an errno and a sentence
//!
//! The core knows nothing of nbdkit; `tests/core` drives it over a base in memory.

pub mod base;
pub mod block;
pub mod buffer;
pub mod config;
pub mod error;
pub mod filter;
pub mod nbdkit;
pub mod overlay;
pub mod qcow2;
pub mod sparse;
mod sync;
