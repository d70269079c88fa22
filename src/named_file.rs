//! A file that gets the name by which it is found when all of it is there.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use tempfile::{Builder, NamedTempFile};

/// How many random characters follow the prefix.
pub const RANDOM_LEN: usize = 6;

/// A new file in `directory`, with a name of its own that begins with `prefix`. It goes away
/// with the value, if it has not got another name.
pub fn in_directory(directory: &Path, prefix: &OsStr) -> io::Result<NamedTempFile> {
    // Opened here, because the library's own errors don't have the errno.
    let create = |path: &Path| {
        let mut options = File::options();
        options.read(true).write(true).create_new(true);
        options.mode(0o600).open(path)
    };
    Builder::new()
        .prefix(prefix)
        .rand_bytes(RANDOM_LEN)
        .make_in(directory, create)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_can_not_be_made_says_why() {
        let made = in_directory(Path::new("/nonexistent-directory"), OsStr::new("x"));
        let error = made.expect_err("the directory does not exist");
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }
}
