//! The command line, from whatever bytes: parameters with values that end at a zero byte,
//! which no argument can have.
//!
//! Of each it is asked that nothing panics, that what is refused is refused with EINVAL and
//! one line that can be printed, and changes nothing, and that the words mean what they mean
//! everywhere in nbdkit (nbdkit-plugin(3)): that is written down here once more, in other
//! terms, with the C library's own reader of numbers.

#![no_main]

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;

use libfuzzer_sys::fuzz_target;
use nbdkit_cow_filter::block::BlockSize;
use nbdkit_cow_filter::filter::config::{Config, OnRead, PARAMETERS, ScopeKind};

/// Not ours: one that is looked at all the same, and some that only look like ours.
const OTHERS: [&str; 4] = ["file", "cow", "cow-", "COW-SCOPE"];

fuzz_target!(|data: &[u8]| {
    let mut config = Config::default();
    for parameter in data.split(|byte| *byte == 0) {
        let [number, value @ ..] = parameter else {
            continue;
        };
        let ours = PARAMETERS.iter().map(|parameter| parameter.key);
        let keys: Vec<_> = ours.chain(OTHERS).collect();
        set(&mut config, keys[*number as usize % keys.len()], value);
    }
    // What is told of them, and what is made of them.
    let _ = (format!("{config:?}"), config.backing());
});

fn set(config: &mut Config, key: &str, value: &[u8]) {
    let before = config.clone();
    match config.set(key, OsStr::from_bytes(value)) {
        Ok(is_ours) => {
            let is_known = PARAMETERS.iter().any(|parameter| parameter.key == key);
            assert_eq!(is_ours, is_known, "{key}");
            assert!(is_ours || key == "file" || *config == before, "{key}");
            check(config, key, value, true);
        }
        Err(error) => {
            assert_eq!(error.errno(), libc::EINVAL);
            let said = error.to_string();
            assert!(said.starts_with(&format!("{key}=")), "{said:?}");
            assert!(!said.chars().any(char::is_control), "{said:?}");
            assert!(*config == before, "{said}");
            check(config, key, value, false);
        }
    }
}

/// That a value was rightly accepted, or rightly refused.
fn check(config: &Config, key: &str, value: &[u8], accepted: bool) {
    match key {
        "cow-block-size" => {
            let size = size(value).and_then(BlockSize::new);
            assert_eq!(size.is_some(), accepted, "{value:?}");
            assert!(!accepted || config.block_size == size, "{value:?}");
        }
        "cow-on-cache" => {
            let expected = boolean(value);
            assert_eq!(expected.is_some(), accepted, "{value:?}");
            assert!(!accepted || Some(config.on_cache) == expected, "{value:?}");
        }
        "cow-serialize" => {
            let expected = boolean(value);
            assert_eq!(expected.is_some(), accepted, "{value:?}");
            assert!(!accepted || Some(config.serialize) == expected, "{value:?}");
        }
        "cow-on-read" => {
            let expected = match boolean(value) {
                Some(true) => Some(OnRead::Always),
                Some(false) => Some(OnRead::Never),
                None if value.first() == Some(&b'/') => {
                    Some(OnRead::WhileExists(OsStr::from_bytes(value).into()))
                }
                None => None,
            };
            assert_eq!(expected.is_some(), accepted, "{value:?}");
            let is_set = expected.is_some_and(|expected| config.on_read == expected);
            assert!(!accepted || is_set, "{value:?}");
        }
        "cow-scope" => {
            let expected = match value {
                b"export" => Some(ScopeKind::Export),
                b"connection" => Some(ScopeKind::Connection),
                _ => None,
            };
            assert_eq!(expected.is_some(), accepted, "{value:?}");
            assert!(!accepted || Some(config.scope) == expected, "{value:?}");
        }
        "cow-limit" => {
            let size = size(value).filter(|size| *size > 0);
            assert_eq!(size.is_some(), accepted, "{value:?}");
            assert!(!accepted || config.limit == size, "{value:?}");
        }
        "cow-overlay" | "cow-stats" => {
            let is_file = value.last().is_some_and(|last| *last != b'/');
            assert_eq!(is_file, accepted, "{value:?}");
            let path = match key {
                "cow-overlay" => &config.overlay,
                _ => &config.stats,
            };
            let is_absolute = path.as_ref().is_some_and(|path| path.is_absolute());
            assert!(!accepted || is_absolute, "{value:?}");
        }
        "cow-backing" => assert_eq!(!value.is_empty(), accepted),
        _ => assert!(accepted, "{key} is not ours to refuse"),
    }
}

/// `nbdkit_parse_size`, for what has no sign but a plus.
fn size(value: &[u8]) -> Option<u64> {
    let text = CString::new(value).expect("it ends at a zero byte");
    let mut end = std::ptr::null_mut();
    // SAFETY: both pointers are good, and the text ends with a zero byte.
    let (number, rest) = unsafe {
        *libc::__errno_location() = 0;
        let number = libc::strtoll(text.as_ptr(), &raw mut end, 10);
        (number, &value[end.offset_from(text.as_ptr()) as usize..])
    };
    // SAFETY: it is a number of this thread's own.
    let errno = unsafe { *libc::__errno_location() };
    if errno != 0 || rest.len() == value.len() {
        return None;
    }
    let shift = match rest.to_ascii_lowercase().as_slice() {
        b"" | b"b" => 0,
        b"s" => 9,
        b"k" => 10,
        b"m" => 20,
        b"g" => 30,
        b"t" => 40,
        b"p" => 50,
        b"e" => 60,
        _ => return None,
    };
    u64::try_from(number.checked_mul(1 << shift)?).ok()
}

/// `nbdkit_parse_bool`
fn boolean(value: &[u8]) -> Option<bool> {
    let is_one_of = |words: [&str; 6]| {
        let same = |word: &&str| word.as_bytes().eq_ignore_ascii_case(value);
        words.iter().any(same)
    };
    match () {
        () if is_one_of(["1", "true", "t", "yes", "y", "on"]) => Some(true),
        () if is_one_of(["0", "false", "f", "no", "n", "off"]) => Some(false),
        () => None,
    }
}
