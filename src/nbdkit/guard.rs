//! The one `catch_unwind`: what a callback's body comes to, and which errno it answers.
//!
//! Unwinding into C is undefined behaviour, so nothing may leave a callback but
//! a value. A panic is a bug of ours; it costs the client that one request, and
//! all other requests and connections go on.
//!
//! A request answers only errnos of its [`Answers`], wherever the error comes from: us,
//! the overlay's file system, or the layer below. nbdkit ends the whole process when a
//! zero that need not be fast answers ENOTSUP (the same number as EOPNOTSUPP). And it
//! makes EINVAL of all errnos that NBD has no code for, which tells the client that its
//! request was wrong, where a table of open files was full.

use std::panic::{self, AssertUnwindSafe};

use crate::error::{Error, Result};

/// The errnos that a request may answer; all others become `EIO`.
#[derive(Debug, Clone, Copy)]
pub struct Answers {
    errnos: &'static [i32],
    refuses_fast_zero: bool,
}

impl Answers {
    /// Of a request that changes nothing which its client can see.
    pub const READ: Self = Answers {
        errnos: &[
            libc::EPERM,
            libc::EIO,
            libc::ENOMEM,
            libc::EINVAL,
            libc::ESHUTDOWN,
        ],
        refuses_fast_zero: false,
    };

    /// Of a request that changes the disk, or makes a change safe.
    pub const CHANGE: Self = Answers {
        errnos: &[
            libc::EPERM,
            libc::EIO,
            libc::ENOMEM,
            libc::EINVAL,
            libc::ESHUTDOWN,
            libc::EROFS,
            libc::ENOSPC,
            libc::EDQUOT,
            libc::EFBIG,
        ],
        refuses_fast_zero: false,
    };

    /// Of a zero with FAST_ZERO: as [`Answers::CHANGE`], and `ENOTSUP` where we refuse it
    /// ourselves ([`Error::not_fast`]). From elsewhere that errno does not say that
    /// nothing has changed.
    pub const FAST_ZERO: Self = Answers {
        refuses_fast_zero: true,
        ..Self::CHANGE
    };

    fn errno(self, error: &Error) -> i32 {
        if self.errnos.contains(&error.errno())
            || self.refuses_fast_zero && error.refuses_fast_zero()
        {
            error.errno()
        } else {
            libc::EIO
        }
    }
}

/// What a request comes to: 0, or one of the errnos in `answers`. See [`value`].
pub fn request(
    answers: Answers,
    report: impl FnOnce(&str),
    body: impl FnOnce() -> Result<()>,
) -> i32 {
    match run(report, body) {
        Ok(()) => 0,
        Err(Some(error)) => answers.errno(&error),
        Err(None) => libc::EIO,
    }
}

/// What a callback comes to that answers no errno: a value, or `None` for a failure. Its
/// message goes to `report`, unless [`Error::is_reported`]. A panic is a failure.
pub fn value<T>(report: impl FnOnce(&str), body: impl FnOnce() -> Result<T>) -> Option<T> {
    run(report, body).ok()
}

/// `Err(None)`: a panic.
///
/// Asserting unwind safety is sound here: what the requests share are atomics
/// that change in one step, and locks whose poisoning is ignored for that reason
/// (`overlay::stripes`).
fn run<T>(
    report: impl FnOnce(&str),
    body: impl FnOnce() -> Result<T>,
) -> std::result::Result<T, Option<Error>> {
    match panic::catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => {
            if e.is_reported() {
                ::log::trace!("{e}");
            } else {
                report(&e.to_string());
            }
            Err(Some(e))
        }
        Err(payload) => {
            // The panic hook has written the message. The payload is not dropped:
            // its destructor could panic in turn.
            std::mem::forget(payload);
            Err(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// The answer of a request, and what was reported.
    fn answered(answers: Answers, body: impl FnOnce() -> Result<()>) -> (i32, String) {
        let mut message = String::new();
        let answer = request(answers, |text| message = text.to_string(), body);
        (answer, message)
    }

    fn answer(answers: Answers, error: Error) -> i32 {
        answered(answers, || Err(error)).0
    }

    #[test]
    fn a_value_passes() {
        assert_eq!(value(|_| (), || Ok(7)), Some(7));
        assert_eq!(answered(Answers::READ, || Ok(())), (0, String::new()));
    }

    #[test]
    fn a_failure_gives_its_errno_and_its_message() {
        let full = || Error::new(libc::ENOSPC, "no room");
        let (errno, message) = answered(Answers::CHANGE, || Err(full()));
        assert_eq!((errno, message.as_str()), (libc::ENOSPC, "no room"));
        let mut message = String::new();
        let failed: Option<()> = value(|text| message = text.to_string(), || Err(full()));
        assert_eq!((failed, message.as_str()), (None, "no room"));
    }

    #[test]
    fn a_failure_that_the_layer_below_reported_is_not_reported_twice() {
        let (errno, message) =
            answered(Answers::READ, || Err(Error::from_below(libc::EIO, "read")));
        assert_eq!((errno, message.as_str()), (libc::EIO, ""));
    }

    #[test]
    fn an_errno_that_a_request_may_not_answer_is_eio() {
        let reads = [1, 5, 12, 22, 108];
        let changes = [30, 28, 122, 27];
        for errno in (1..200).chain([524, 9999, i32::MAX]) {
            let expected = |is_allowed| if is_allowed { errno } else { libc::EIO };
            let makers: [fn(i32) -> Error; 3] = [
                |errno| Error::new(errno, "x"),
                |errno| Error::from_below(errno, "x"),
                |errno| Error::io(io::Error::from_raw_os_error(errno), "x"),
            ];
            for make in makers {
                let error = || make(errno);
                let read = reads.contains(&errno);
                let change = read || changes.contains(&errno);
                assert_eq!(answer(Answers::READ, error()), expected(read));
                assert_eq!(answer(Answers::CHANGE, error()), expected(change));
                assert_eq!(answer(Answers::FAST_ZERO, error()), expected(change));
            }
        }
    }

    #[test]
    fn only_a_fast_zero_is_refused_as_not_supported() {
        let refusal = || Error::not_fast("x");
        assert_eq!(answer(Answers::FAST_ZERO, refusal()), libc::ENOTSUP);
        assert_eq!(answer(Answers::CHANGE, refusal()), libc::EIO);
        assert_eq!(answer(Answers::READ, refusal()), libc::EIO);
    }

    #[test]
    fn a_panic_is_eio_and_goes_no_further() {
        struct PanicsWhenDropped;
        impl Drop for PanicsWhenDropped {
            fn drop(&mut self) {
                panic!("and again");
            }
        }
        let panics = || panic::panic_any(PanicsWhenDropped);
        assert_eq!(answered(Answers::CHANGE, panics).0, libc::EIO);
        assert_eq!(value::<()>(|_| (), panics), None);
    }
}
