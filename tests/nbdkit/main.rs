//! The library as nbdkit loads it, spoken to by clients that others wrote.
//!
//! Each test starts its own nbdkit on a socket of its own, with an overlay
//! directory of its own, and when that nbdkit stops the harness looks at what
//! no test should have to remember: that it ended by itself and with success,
//! that nothing panicked, that no overlay file was left behind. A [`Base`]
//! checks its bytes and its modification time when it goes out of scope, so a
//! test that has a base file can't forget to.
//!
//! The tests need root (loop devices, mounts) and the tools that `make deps`
//! installs. Where a tool is missing a test fails and names it.
//!
//! `COW_FILTER=/path/to/filter.so` tests another library than the one that
//! cargo built beside this executable; with nbdkit's own filter it shows which
//! tests can fail.
//!
//! [`Base`]: harness::base::Base

mod advice;
mod clients;
mod diff;
mod documents;
mod errnos;
mod exports;
mod extents;
mod file_systems;
mod fills;
mod full;
mod harness;
mod hosts;
mod kept;
mod kept_disk;
mod layers;
mod lifecycle;
mod logging;
mod parameters;
mod races;
mod real_disk;
mod reliability;
mod requests;
mod stacked;
mod stats;
mod tmpdir;
mod users;
