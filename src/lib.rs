//! nbdkit-cow-filter: write to a disk without changing it.
//!
//! The library is loaded by nbdkit (`nbdkit --filter=cow PLUGIN`). It serves a
//! disk that clients can write to, over a plugin that is only read: what is
//! written goes to an overlay.
//!
//! Dependencies point one way, down this list:
//!
//! - [`nbdkit`]: the boundary, and the only place that speaks C
//! - [`filter`]: what nbdkit's callbacks mean, in safe Rust: parameters, connections, and
//!   which export has which overlay
//! - [`kept`]: a store that is kept, in an image, and [`qcow2`]: the format of that image
//! - [`temporary`]: a store in files without a name
//! - [`overlay`]: the core: block map, all the locking, and the trait of a store
//! - [`file_system`]: what a file system can do for an overlay
//! - [`sparse`]: system calls on sparse files
//! - [`overlay_file`]: the file of an overlay, as messages name it
//! - [`named_file`]: a file that gets its name when all of it is there
//! - [`error_log`]: which failures go to the log
//! - [`counters`]: what requests came to, in numbers
//! - [`base`]: what lies beneath the overlay
//! - [`block`]: units, and the splitting of requests into blocks
//! - [`buffer`]: bytes in memory
//! - `sync`: the primitives of the parallel code
//! - [`error`]: an errno and a sentence
//!
//! The core knows nothing of nbdkit, of files, or of qcow2; `tests/core` drives it over a base in memory.

pub mod base;
pub mod block;
pub mod buffer;
pub mod counters;
pub mod error;
pub mod error_log;
pub mod file_system;
pub mod filter;
pub mod kept;
// Its symbols are nbdkit's, which only the library finds when it is loaded. The tables
// of the fuzzer name every function, so the linker would want them there as well.
pub mod named_file;
#[cfg(not(fuzzing))]
pub mod nbdkit;
pub mod overlay;
pub mod overlay_file;
pub mod qcow2;
pub mod sparse;
mod sync;
pub mod temporary;
