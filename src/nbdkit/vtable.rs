//! `filter_init` and the callbacks.

use std::ffi::{CStr, CString, OsStr, c_void};
use std::mem;
use std::os::raw::{c_char, c_int};
use std::os::unix::ffi::OsStrExt;
use std::panic;
use std::ptr;
use std::slice;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::guard::{self, Answers};
use super::next::{Capabilities, Next};
use super::{extents, log, sys};
use crate::error::{Error, Result};
use crate::filter::config::{self, Config};
#[cfg(nbdkit_dump_plugin)]
use crate::filter::probe;
use crate::filter::{Connection, Filter};
use crate::overlay::Zeroing;

/// How often nbdkit has loaded the library: once for each `--filter` that names it. The
/// system loads it once, so all that is static here is shared by them.
static LAYERS: AtomicUsize = AtomicUsize::new(0);

/// The parameters so far. nbdkit gives them one after the other, before it serves.
static CONFIG: Mutex<Option<Config>> = Mutex::new(None);

/// Set by *get_ready*. It lives until the process ends: requests may be under
/// way until then.
static FILTER: OnceLock<Filter> = OnceLock::new();

/// What nbdkit keeps for us for each connection.
struct Handle {
    export: CString,
    /// Set by *prepare*, which comes before all other callbacks with the handle.
    ready: OnceLock<Ready>,
}

struct Ready {
    connection: Connection<'static>,
    below: Capabilities,
}

fn config() -> MutexGuard<'static, Option<Config>> {
    CONFIG.lock().unwrap_or_else(PoisonError::into_inner)
}

fn filter() -> Result<&'static Filter> {
    FILTER
        .get()
        .ok_or_else(|| Error::new(libc::EIO, "nbdkit used the filter before get_ready"))
}

/// # Safety
/// `handle` is a connection's handle, made by [`open`] and not closed before the
/// reference is gone.
unsafe fn ready<'a>(handle: *mut c_void) -> Result<&'a Ready> {
    // SAFETY: the caller's promise; requests share the handle, so nobody has it
    // mutably until `close`.
    let handle = unsafe { &*handle.cast::<Handle>() };
    handle
        .ready
        .get()
        .ok_or_else(|| Error::new(libc::EIO, "nbdkit used a connection before prepare"))
}

/// What a call of the layer below returned: 0, or -1 after it reported an error.
fn below(answer: c_int, tried: &'static str) -> Result<c_int> {
    match answer {
        0 => Ok(0),
        _ => Err(Error::from_below(libc::EIO, tried)),
    }
}

/// Makes all callbacks. The body gives a [`Result`], and runs in the guard.
///
/// - `plain` ones get what nbdkit passes, and say what a failure returns;
/// - a `query` gets the connection that its handle stands for, and returns -1;
/// - a `request` gets the connection and the layer below, says which errnos it may
///   answer, sets `*err` to one of them, and returns -1.
macro_rules! callback {
    (plain $name:ident($($arg:ident: $type:ty),*) -> $return:ty, or $failure:expr, $body:block) => {
        unsafe extern "C" fn $name($($arg: $type),*) -> $return {
            guard::value(log::error, || -> Result<$return> { $body }).unwrap_or($failure)
        }
    };
    (query $name:ident($ready:ident $(, $arg:ident: $type:ty)*) -> $return:ty, $body:block) => {
        callback! {
            plain $name(_next: *mut sys::nbdkit_next, handle: *mut c_void $(, $arg: $type)*)
            -> $return, or -1, {
                // SAFETY: nbdkit passes what `open` returned, and does not close it
                // while a callback runs.
                let $ready = unsafe { ready(handle) }?;
                $body
            }
        }
    };
    (
        request $name:ident($connection:ident, $base:ident $(, $arg:ident: $type:ty)*),
        may answer $answers:expr, $body:block
    ) => {
        unsafe extern "C" fn $name(
            next: *mut sys::nbdkit_next,
            handle: *mut c_void,
            $($arg: $type,)*
            err: *mut c_int,
        ) -> c_int {
            let errno = guard::request($answers, log::error, || -> Result<()> {
                // SAFETY: as for a query.
                let Ready { connection: $connection, below } = unsafe { ready(handle) }?;
                // SAFETY: `next` is the one of this callback, and goes no further.
                let $base = &unsafe { Next::new(next) }.with(below);
                $body
            });
            if errno == 0 {
                return 0;
            }
            // SAFETY: nbdkit passes a place for the errno.
            unsafe { *err = errno };
            -1
        }
    };
}

callback! { plain load() -> (), or (), {
    LAYERS.fetch_add(1, Ordering::Relaxed);
    log::start();
    // The default hook writes to stderr, which is lost in the background.
    panic::set_hook(Box::new(|info| log::error(&format!("internal error: {info}"))));
    Ok(())
} }

callback! { plain set_config(
    next: sys::nbdkit_next_config,
    nxdata: *mut sys::nbdkit_backend,
    key: *const c_char,
    value: *const c_char
) -> c_int, or -1, {
    // SAFETY: nbdkit passes two strings that end with NUL.
    let (key_string, value_string) = unsafe { (CStr::from_ptr(key), CStr::from_ptr(value)) };
    if let Ok(key) = key_string.to_str() {
        let value = OsStr::from_bytes(value_string.to_bytes());
        if config().get_or_insert_default().set(key, value)? {
            return Ok(0);
        }
    }
    let next = next.expect("nbdkit passes the next layer");
    // SAFETY: the next layer gets what it would have got without us.
    below(unsafe { next(nxdata, key, value) }, "config")
} }

callback! { plain config_complete(
    next: sys::nbdkit_next_config_complete,
    nxdata: *mut sys::nbdkit_backend
) -> c_int, or -1, {
    if LAYERS.load(Ordering::Relaxed) > 1 {
        return Err(Error::new(
            libc::EINVAL,
            "--filter=cow can be given only once: its layers would share one set of \
             parameters and overlays (for an overlay over an overlay start a second \
             nbdkit, with the nbd plugin)",
        ));
    }
    let next = next.expect("nbdkit passes the next layer");
    // SAFETY: the layer is the one that nbdkit passed with it.
    below(unsafe { next(nxdata) }, "config_complete")
} }

callback! { plain get_ready(_thread_model: c_int) -> c_int, or -1, {
    let filter = Filter::new(config().clone().unwrap_or_default())?;
    FILTER.get_or_init(|| filter);
    Ok(0)
} }

callback! { plain after_fork(_backend: *mut sys::nbdkit_backend) -> c_int, or -1, {
    let filter = filter()?;
    filter.start();
    filter.recheck();
    Ok(0)
} }

callback! { plain unload() -> (), or (), {
    // Without a filter, nbdkit ends before it has served anything.
    FILTER.get().map_or(Ok(()), Filter::finish)
} }

// For `nbdkit --dump-plugin`. nbdkits that do not ask a filter have no such member.
#[cfg(nbdkit_dump_plugin)]
callback! { plain dump_plugin() -> (), or (), {
    for line in probe::lines() {
        let line = CString::new(line).map_err(|e| Error::new(libc::EINVAL, e.to_string()))?;
        // By C's library: nbdkit's lines may still be in the buffer there, and go before.
        // If nobody reads them, its own get as little notice.
        // SAFETY: a string that ends with NUL.
        unsafe { libc::puts(line.as_ptr()) };
    }
    Ok(())
} }

/// The parameter that *thread_model* has in newer headers, and has not in
/// older ones: the model of the layer below. Which of the two the installed header
/// wants is found by the type of the field.
trait ThreadModel {
    const CALLBACK: Self;
}

impl ThreadModel for unsafe extern "C" fn() -> c_int {
    const CALLBACK: Self = thread_model_alone;
}

impl ThreadModel for unsafe extern "C" fn(c_int) -> c_int {
    const CALLBACK: Self = thread_model_over;
}

callback! { plain thread_model_alone() -> c_int, or -1, {
    Ok(thread_model())
} }

callback! { plain thread_model_over(below: c_int) -> c_int, or -1, {
    Ok(thread_model().min(below))
} }

fn thread_model() -> c_int {
    if config().as_ref().is_some_and(|config| config.serialize) {
        sys::NBDKIT_THREAD_MODEL_SERIALIZE_ALL_REQUESTS
    } else {
        sys::NBDKIT_THREAD_MODEL_PARALLEL
    }
}

callback! { plain open(
    next: sys::nbdkit_next_open,
    context: *mut sys::nbdkit_context,
    _readonly: c_int,
    export: *const c_char,
    _is_tls: c_int
) -> *mut c_void, or ptr::null_mut(), {
    let next = next.expect("nbdkit passes the next layer");
    // The layer below is always opened read-only: it must not change.
    // SAFETY: context and export name are those that nbdkit passed.
    below(unsafe { next(context, 1, export) }, "open")?;
    let handle = Handle {
        // SAFETY: nbdkit passes a string that ends with NUL.
        export: unsafe { CStr::from_ptr(export) }.to_owned(),
        ready: OnceLock::new(),
    };
    Ok(Box::into_raw(Box::new(handle)).cast())
} }

callback! { plain close(handle: *mut c_void) -> (), or (), {
    // SAFETY: made by `open`; nbdkit closes it once, after all else.
    let handle = unsafe { Box::from_raw(handle.cast::<Handle>()) };
    // There is none if it was refused.
    if let Some(ready) = handle.ready.into_inner() {
        filter()?.disconnect(ready.connection);
    }
    Ok(())
} }

callback! { plain prepare(
    next: *mut sys::nbdkit_next,
    handle: *mut c_void,
    _readonly: c_int
) -> c_int, or -1, {
    // SAFETY: `next` is the one of this callback, and goes no further.
    let next = unsafe { Next::new(next) };
    let below = next.capabilities()?;
    // SAFETY: made by `open`, and not closed while this runs.
    let handle = unsafe { &*handle.cast::<Handle>() };
    let connection = filter()?.connect(&handle.export, &next.with(&below))?;
    handle.ready.get_or_init(|| Ready { connection, below });
    Ok(0)
} }

callback! { query get_size(ready) -> i64, {
    Ok(ready.connection.size() as i64)
} }

callback! { plain block_size(
    next: *mut sys::nbdkit_next,
    handle: *mut c_void,
    minimum: *mut u32,
    preferred: *mut u32,
    maximum: *mut u32
) -> c_int, or -1, {
    // SAFETY: as for a query.
    let ready = unsafe { ready(handle) }?;
    // SAFETY: `next` is the one of this callback, and goes no further.
    let below = unsafe { Next::new(next) }.advice()?;
    let advice = ready.connection.advice(below);
    // SAFETY: nbdkit passes places for three numbers.
    unsafe {
        *minimum = advice.minimum;
        *preferred = advice.preferred;
        *maximum = advice.maximum;
    }
    Ok(0)
} }

callback! { query yes(_ready) -> c_int, { Ok(1) } }

callback! { query can_multi_conn(ready) -> c_int, {
    Ok(c_int::from(ready.connection.can_multi_conn()))
} }

callback! { query can_zero(_ready) -> c_int, { Ok(sys::NBDKIT_ZERO_NATIVE) } }

callback! { query can_fua(_ready) -> c_int, { Ok(sys::NBDKIT_FUA_NATIVE) } }

callback! { query can_cache(_ready) -> c_int, { Ok(sys::NBDKIT_CACHE_NATIVE) } }

callback! { request pread(
    connection, base, buf: *mut c_void, count: u32, offset: u64, _flags: u32
), may answer Answers::READ, {
    // SAFETY: nbdkit passes a buffer of `count` bytes, for this request alone.
    let buf = unsafe { slice::from_raw_parts_mut(buf.cast::<u8>(), count as usize) };
    connection.read(base, buf, offset)
} }

fn has(flags: u32, flag: c_int) -> bool {
    flags & flag as u32 != 0
}

fn fua(flags: u32) -> bool {
    has(flags, sys::NBDKIT_FLAG_FUA)
}

callback! { request pwrite(
    connection, base, buf: *const c_void, count: u32, offset: u64, flags: u32
), may answer Answers::CHANGE, {
    // SAFETY: nbdkit passes a buffer of `count` bytes, which nobody changes.
    let buf = unsafe { slice::from_raw_parts(buf.cast::<u8>(), count as usize) };
    connection.write(base, buf, offset, fua(flags))
} }

callback! { request flush(connection, _base, _flags: u32), may answer Answers::CHANGE, {
    connection.flush()
} }

callback! { request trim(
    connection, base, count: u32, offset: u64, flags: u32
), may answer Answers::CHANGE, {
    connection.zero(base, offset, count.into(), Zeroing::Trim, fua(flags))
} }

fn zero_answers(flags: u32) -> Answers {
    if has(flags, sys::NBDKIT_FLAG_FAST_ZERO) {
        Answers::FAST_ZERO
    } else {
        Answers::CHANGE
    }
}

callback! { request zero(
    connection, base, count: u32, offset: u64, flags: u32
), may answer zero_answers(flags), {
    let how = Zeroing::Zero {
        may_trim: has(flags, sys::NBDKIT_FLAG_MAY_TRIM),
        fast: has(flags, sys::NBDKIT_FLAG_FAST_ZERO),
    };
    connection.zero(base, offset, count.into(), how, fua(flags))
} }

callback! { request get_extents(
    connection, base, count: u32, offset: u64, flags: u32, list: *mut sys::nbdkit_extents
), may answer Answers::READ, {
    let only_first = has(flags, sys::NBDKIT_FLAG_REQ_ONE);
    let found = connection.extents(base, offset, count.into(), only_first)?;
    // SAFETY: `list` is the one of this request.
    unsafe { extents::add(list, &found) }
} }

callback! { request cache(
    connection, base, count: u32, offset: u64, _flags: u32
), may answer Answers::READ, {
    connection.cache(base, offset, count.into())
} }

/// Also what packaging/doctor.sh looks for in the file, because an nbdkit of another
/// version says only that it can't load it.
const LONG_NAME: &CStr = {
    let name = concat!(
        "copy-on-write filter, ",
        env!("CARGO_PKG_NAME"),
        " ",
        env!("CARGO_PKG_VERSION"),
        " for nbdkit ",
        env!("NBDKIT_VERSION"),
        "\0"
    );
    match CStr::from_bytes_with_nul(name.as_bytes()) {
        Ok(name) => name,
        Err(_) => panic!("a NUL in a version"),
    }
};

/// What nbdkit calls first, to get the table of callbacks. It is leaked on
/// purpose: nbdkit reads it until the process ends.
#[unsafe(no_mangle)]
pub extern "C" fn filter_init() -> *mut sys::nbdkit_filter {
    // SAFETY: the struct is made of numbers, pointers and optional functions, for
    // all of which zero is a valid value: 0, null, and "no such callback". (Which
    // callbacks there are differs from version to version.)
    let none: sys::nbdkit_filter = unsafe { mem::zeroed() };
    Box::into_raw(Box::new(sys::nbdkit_filter {
        _api_version: sys::NBDKIT_FILTER_API_VERSION,
        _version: sys::NBDKIT_VERSION_STRING.as_ptr(),
        name: c"cow".as_ptr(),
        longname: LONG_NAME.as_ptr(),
        description: c"Writes go to an overlay; the plugin is only read.".as_ptr(),
        config_help: config::HELP.as_ptr(),
        #[cfg(nbdkit_dump_plugin)]
        dump_plugin: Some(dump_plugin),
        load: Some(load),
        unload: Some(unload),
        config: Some(set_config),
        config_complete: Some(config_complete),
        get_ready: Some(get_ready),
        after_fork: Some(after_fork),
        thread_model: Some(ThreadModel::CALLBACK),
        open: Some(open),
        close: Some(close),
        prepare: Some(prepare),
        get_size: Some(get_size),
        block_size: Some(block_size),
        can_write: Some(yes),
        can_flush: Some(yes),
        can_trim: Some(yes),
        can_zero: Some(can_zero),
        can_fast_zero: Some(yes),
        can_extents: Some(yes),
        can_fua: Some(can_fua),
        can_multi_conn: Some(can_multi_conn),
        can_cache: Some(can_cache),
        pread: Some(pread),
        pwrite: Some(pwrite),
        flush: Some(flush),
        trim: Some(trim),
        zero: Some(zero),
        extents: Some(get_extents),
        cache: Some(cache),
        ..none
    }))
}
