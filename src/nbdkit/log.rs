//! `log` records to nbdkit's own log.
//!
//! Errors and warnings go to `nbdkit_error`, everything else to `nbdkit_debug`,
//! which shows it under `nbdkit -v`. What the requests do is logged at the trace
//! level, which is on only under `-D cow.verbose=1`. `COW_LOG` chooses further,
//! in the syntax of env_logger.
//!
//! A record that nobody would see is not formatted: its level is above
//! `log::max_level`, which the `log` macros look at first.

use std::ffi::CString;
use std::os::raw::c_int;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use env_logger::{Env, Logger};
use log::{Level, LevelFilter, Log, Metadata, Record};

use super::sys;

/// Set by `nbdkit -D cow.verbose=N`: nbdkit finds it by its name, and writes to it
/// as to a C `int` before it calls *load*.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static cow_debug_verbose: AtomicI32 = AtomicI32::new(0);

struct NbdkitLog {
    chosen: Logger,
}

static LOG: OnceLock<NbdkitLog> = OnceLock::new();

/// Starts logging; called by *load*.
pub fn start() {
    let env = Env::new().filter_or("COW_LOG", "trace");
    let log = LOG.get_or_init(|| NbdkitLog {
        chosen: env_logger::Builder::from_env(env).build(),
    });
    let shown = if !nbdkit_is_verbose() {
        LevelFilter::Warn
    } else if cow_debug_verbose.load(Ordering::Relaxed) > 0 {
        LevelFilter::Trace
    } else {
        LevelFilter::Debug
    };
    // It fails only if there is a logger already: then it is this one.
    let _ = log::set_logger(log);
    log::set_max_level(shown.min(log.chosen.filter()));
}

/// Whether `nbdkit -v` was given. There is no function that tells, but
/// `nbdkit_debug` formats its message only if it is going to show it, and `%n`
/// stores something only if it is formatted.
fn nbdkit_is_verbose() -> bool {
    let mut formatted: c_int = 0;
    let version = c"version " as *const _ as *const std::ffi::c_char;
    let number = concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr();
    // SAFETY: the format is a constant in read-only memory (C libraries refuse
    // `%n` elsewhere) and names two strings that end with NUL and a pointer to an
    // int, which is what is passed; all of them outlive the call.
    unsafe {
        sys::nbdkit_debug(
            c"cow: nbdkit-cow-filter %s%s%n".as_ptr(),
            version,
            number,
            &raw mut formatted,
        );
    }
    formatted != 0
}

/// Writes an error to nbdkit's log.
pub fn error(message: &str) {
    let message = c_string(message);
    // SAFETY: `%s` takes one string that ends with NUL; it outlives the call.
    unsafe { sys::nbdkit_error(c"%s".as_ptr(), message.as_ptr()) };
}

fn debug(message: &str) {
    let message = c_string(message);
    // SAFETY: as in `error`.
    unsafe { sys::nbdkit_debug(c"%s".as_ptr(), message.as_ptr()) };
}

fn c_string(message: &str) -> CString {
    CString::new(message.replace('\0', "\\0")).expect("its NULs were replaced")
}

impl Log for NbdkitLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level() && self.chosen.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.chosen.matches(record) {
            return;
        }
        match record.level() {
            Level::Error => error(&record.args().to_string()),
            Level::Warn => error(&format!("warning: {}", record.args())),
            Level::Info | Level::Debug | Level::Trace => {
                debug(&format!("{}: {}", record.target(), record.args()));
            }
        }
    }

    fn flush(&self) {}
}
