//! The store of a temporary overlay: files without a name, gone when nbdkit ends.
//!
//! [`Directory`] is where they are made, [`TemporaryStore`] is what they hold.

mod directory;
mod store;

pub use directory::Directory;
pub use store::TemporaryStore;
