//! One error type: an errno that reaches the client, and a sentence that
//! reaches the log.
//!
//! The invariant is that the errno is positive. nbdkit hands `*err` to the
//! client, and an unset or zero `*err` beside a failure would either be sent as
//! "success" or trip an assertion in the server, depending on its version. So
//! the number is made sound once, here, and can't be changed afterwards.

use std::borrow::Cow;
use std::fmt;
use std::io;

use nix::errno::Errno;

use crate::error_log::Unlogged;

/// Why something failed: the errno, what was tried, and the system's reason.
#[derive(Debug)]
// In a box, so that a result is as small as a pointer: every function on the path of
// a request returns one, and nearly all of them are `Ok`.
pub struct Error(Box<Failure>);

#[derive(Debug)]
struct Failure {
    errno: i32,
    tried: Cow<'static, str>,
    source: Option<io::Error>,
    reported: bool,
    unlogged: Unlogged,
    of_write: bool,
    refuses_fast_zero: bool,
    over_limit: bool,
}

/// What every fallible function of the crate returns.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A failure that we found ourselves. A number that is no errno becomes `EIO`.
    #[cold]
    pub fn new(errno: i32, tried: impl Into<Cow<'static, str>>) -> Self {
        Error(Box::new(Failure {
            errno: if errno > 0 { errno } else { libc::EIO },
            tried: tried.into(),
            source: None,
            reported: false,
            unlogged: Unlogged(0),
            of_write: false,
            refuses_fast_zero: false,
            over_limit: false,
        }))
    }

    /// A failure of the system: its errno is kept, however deep in `source` it lies.
    #[cold]
    pub fn io(source: io::Error, tried: impl Into<Cow<'static, str>>) -> Self {
        let mut error = Error::new(errno_of(&source).unwrap_or(libc::EIO), tried);
        error.0.source = Some(source);
        error
    }

    /// A failure of the layer below, which has told nbdkit its reason already.
    #[cold]
    pub fn from_below(errno: i32, tried: impl Into<Cow<'static, str>>) -> Self {
        let mut error = Error::new(errno, tried);
        error.0.reported = true;
        error
    }

    /// The same error, which is not to be logged: the log has enough of its kind.
    #[cold]
    pub fn unlogged(mut self) -> Self {
        self.0.reported = true;
        self
    }

    /// The same error, which is to be logged after so many of its kind that were not.
    #[cold]
    pub fn after(mut self, unlogged: u64) -> Self {
        self.0.unlogged = Unlogged(unlogged);
        self
    }

    /// ENOTSUP: zeroes that would have to be written, where the client wants to be told of
    /// that instead, and nothing has changed.
    #[cold]
    pub fn not_fast(tried: impl Into<Cow<'static, str>>) -> Self {
        let mut error = Error::new(libc::ENOTSUP, tried);
        error.0.refuses_fast_zero = true;
        error
    }

    /// ENOSPC: it would be more than `cow-limit` allows.
    #[cold]
    pub fn over_limit(tried: impl Into<Cow<'static, str>>) -> Self {
        let mut error = Error::new(libc::ENOSPC, tried);
        error.0.over_limit = true;
        error
    }

    /// Memory that could not be had; `what` names what it was for.
    pub fn no_memory(what: impl Into<Cow<'static, str>>) -> Self {
        Error::new(libc::ENOMEM, what)
    }

    /// The errno; always positive.
    pub fn errno(&self) -> i32 {
        self.0.errno
    }

    /// The same error, as one of a system call that writes to a file.
    #[cold]
    pub fn of_write(mut self) -> Self {
        self.0.of_write = true;
        self
    }

    /// Whether it is an error of a system call that writes to a file. Such an error may
    /// be that of an earlier write, of which the system tells now, and only once.
    pub fn is_of_write(&self) -> bool {
        self.0.of_write
    }

    /// Whether it says that there is no space.
    pub fn is_full(&self) -> bool {
        matches!(self.0.errno, libc::ENOSPC | libc::EDQUOT)
    }

    /// Whether this was made by [`Error::over_limit`].
    pub fn is_over_limit(&self) -> bool {
        self.0.over_limit
    }

    /// Whether nothing is to be logged: the layer below has written its own message, or
    /// see [`Error::unlogged`].
    pub fn is_reported(&self) -> bool {
        self.0.reported
    }

    /// Whether this was made by [`Error::not_fast`]. A system call or the layer below can
    /// fail with the same errno, and means something else.
    pub fn refuses_fast_zero(&self) -> bool {
        self.0.refuses_fast_zero
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.tried)?;
        match &self.0.source {
            // The system's words alone: the libraries in between add a number,
            // or a path that the user has never seen.
            Some(source) if errno_of(source).is_some() => {
                write!(f, ": {}", Errno::from_raw(self.0.errno).desc())?;
            }
            Some(source) => write!(f, ": {source}")?,
            None => {}
        }
        write!(f, "{}", self.0.unlogged)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0
            .source
            .as_ref()
            .map(|e| e as &(dyn std::error::Error + 'static))
    }
}

/// The errno inside an `io::Error`, also where a library has wrapped the error
/// of the system call into one of its own.
fn errno_of(error: &io::Error) -> Option<i32> {
    if let Some(errno) = error.raw_os_error() {
        return Some(errno);
    }
    let mut source = error
        .get_ref()
        .map(|e| e as &(dyn std::error::Error + 'static));
    while let Some(error) = source {
        if let Some(errno) = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::raw_os_error)
        {
            return Some(errno);
        }
        source = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_is_never_zero_or_negative() {
        assert_eq!(Error::new(0, "x").errno(), libc::EIO);
        assert_eq!(Error::new(-5, "x").errno(), libc::EIO);
        assert_eq!(Error::from_below(0, "x").errno(), libc::EIO);
        assert_eq!(
            Error::io(io::Error::other("no errno in here"), "x").errno(),
            libc::EIO
        );
    }

    #[test]
    fn only_our_own_refusal_of_a_fast_zero_is_one() {
        let error = Error::not_fast("x");
        assert_eq!(error.errno(), libc::ENOTSUP);
        assert!(error.refuses_fast_zero());
        for error in [
            Error::new(libc::ENOTSUP, "x"),
            Error::from_below(libc::ENOTSUP, "x"),
            Error::io(io::Error::from_raw_os_error(libc::ENOTSUP), "x"),
        ] {
            assert!(!error.refuses_fast_zero(), "{error:?}");
        }
    }

    #[test]
    fn errno_survives_a_wrapped_error() {
        let error = io::Error::other(io::Error::from_raw_os_error(libc::ENOSPC));
        let error = Error::io(error, "x");
        assert_eq!(error.errno(), libc::ENOSPC);
        assert_eq!(error.to_string(), "x: No space left on device");
    }

    #[test]
    fn the_message_has_what_was_tried_and_the_reason() {
        let error = Error::io(io::Error::from_raw_os_error(libc::ENOSPC), "writing there");
        assert_eq!(error.to_string(), "writing there: No space left on device");
        assert!(!error.is_reported());
        assert!(Error::from_below(libc::EIO, "x").is_reported());
    }
}
