//! Reads and writes that do a part of what they are asked for, as a kernel may.

use super::ground::{Ground, Kind};
use crate::harness::command::{command, success};
use crate::harness::scratch;

const SOURCE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/nbdkit/reliability/syscalls/short.c"
);

/// All of them at once: nobody may notice.
#[test]
fn what_is_read_or_written_in_part_is_completed() {
    let files = scratch();
    let library = files.path().join("short.so");
    let cc = ["-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o"];
    success(command("cc").args(cc).arg(&library).arg(SOURCE));
    let ground = Ground::new();
    for kind in [Kind::Temporary, Kind::New, Kind::Resumed, Kind::Foreign] {
        for how in ["half", "all but one"] {
            ground.run_short(kind, &library, how);
        }
    }
}
