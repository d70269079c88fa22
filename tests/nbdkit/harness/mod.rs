//! What the tests stand on: children that can't hang, a base that watches
//! itself, an nbdkit that is looked at when it stops, mounts that go away.

pub mod base;
pub mod command;
pub mod daemon;
pub mod line;
pub mod log;
pub mod mount;
// The benchmarks use the rest of it.
#[allow(dead_code)]
pub mod nbd;
mod nginx;
pub mod python;
pub mod qemu;
pub mod raw;
pub mod server;
pub mod setup;
pub mod storage;

pub use base::Base;
pub use command::{run, run_in};
pub use daemon::Daemon;
pub use server::Server;
pub use setup::Setup;
pub use storage::Storage;

/// A directory that goes away with the value.
///
/// Below /var/tmp because a tmpfs, which /tmp often is, answers differently
/// about holes than the disk file systems that the expectations are written for.
pub fn scratch() -> tempfile::TempDir {
    // Another user, of `nbdkit -u`, must get into it whatever the developer's umask is.
    // SAFETY: umask takes an integer and touches no memory of ours.
    unsafe { libc::umask(0o022) };
    // Where that is a symbolic link, the kernel lists a mount by what it leads to.
    let place = std::fs::canonicalize("/var/tmp").expect("/var/tmp");
    tempfile::Builder::new()
        .prefix("cow-test-")
        .tempdir_in(place)
        .expect("a scratch directory in /var/tmp")
}

/// Bytes that look random, are never all zero in a block, and are the same every time.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
