//! What is promised when something goes wrong: docs/reliability.md has the table of
//! faults, and a test compares it with the tests that exist.
//!
//! These tests take minutes: `make check-reliability` runs them, and `make check` does not.

mod full;
mod hostile;
mod leaks;
mod limits;
mod memcheck;
mod place;
mod signals;
mod soak;
mod syscalls;
