//! The overlay that is kept, over a file in memory: what a crash leaves of it, what
//! happens when a write or a sync fails, and which flush is good for what.
//!
//! The file tells `sync`, which makes all that was done before safe, from
//! `write_synced`, which makes its own bytes safe and no others. Everything else may
//! be lost in a crash, in whatever order.

mod check;
mod content;
mod crash;
mod crashes;
pub mod disk;
mod faults;
mod flushes;
mod foreign;
mod homecoming;
mod layout;
mod mark;
mod moved;
mod opening;
mod random;
mod reader;
pub mod recorder;
mod scripts;
mod space;
mod stress;
