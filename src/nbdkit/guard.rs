//! The one `catch_unwind`: what a callback's body comes to.
//!
//! Unwinding into C is undefined behaviour, so nothing may leave a callback but
//! a value. A panic is a bug of ours; it costs the client that one request, and
//! all other requests and connections go on.

use std::panic::{self, AssertUnwindSafe};

use crate::error::Result;

/// Runs `body`. A failure gives its errno, after `report` was given its message,
/// if the layer below has not written one already; a panic gives `EIO`.
///
/// Asserting unwind safety is sound here: what the requests share are atomics
/// that change in one step, and locks whose poisoning is ignored for that reason
/// (`overlay::stripes`).
pub fn outcome<T>(
    report: impl FnOnce(&str),
    body: impl FnOnce() -> Result<T>,
) -> std::result::Result<T, i32> {
    match panic::catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => {
            if e.is_reported() {
                ::log::debug!("{e}");
            } else {
                report(&e.to_string());
            }
            Err(e.client_errno())
        }
        Err(payload) => {
            // The panic hook has written the message. The payload is not dropped:
            // its destructor could panic in turn.
            std::mem::forget(payload);
            Err(libc::EIO)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    fn reported<T>(body: impl FnOnce() -> Result<T>) -> (std::result::Result<T, i32>, String) {
        let mut message = String::new();
        let outcome = outcome(|text| message = text.to_string(), body);
        (outcome, message)
    }

    #[test]
    fn a_value_passes() {
        assert_eq!(reported(|| Ok(7)), (Ok(7), String::new()));
    }

    #[test]
    fn a_failure_gives_its_errno_and_its_message() {
        let (outcome, message) = reported(|| Err::<(), _>(Error::new(libc::ENOSPC, "no room")));
        assert_eq!((outcome, message.as_str()), (Err(libc::ENOSPC), "no room"));
    }

    #[test]
    fn a_failure_that_nbd_has_no_code_for_is_eio() {
        let (outcome, message) = reported(|| Err::<(), _>(Error::new(libc::EMFILE, "no file")));
        assert_eq!((outcome, message.as_str()), (Err(libc::EIO), "no file"));
    }

    #[test]
    fn a_failure_that_the_layer_below_reported_is_not_reported_twice() {
        let (outcome, message) = reported(|| Err::<(), _>(Error::from_below(libc::EIO, "read")));
        assert_eq!((outcome, message.as_str()), (Err(libc::EIO), ""));
    }

    #[test]
    fn a_panic_is_eio_and_goes_no_further() {
        struct PanicsWhenDropped;
        impl Drop for PanicsWhenDropped {
            fn drop(&mut self) {
                panic!("and again");
            }
        }
        let (outcome, _) = reported::<()>(|| panic::panic_any(PanicsWhenDropped));
        assert_eq!(outcome, Err(libc::EIO));
    }
}
