//! The parameters: `key=value` in, [`Config`] out. Pure, so tested alone.
//!
//! Sizes and booleans are spelled as everywhere else in nbdkit; a user must not
//! have to learn that one filter wants `64KiB` where the others want `64K`.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::block::BlockSize;
use crate::error::{Error, Result};
use crate::kept::{Backing, absolute};

/// Which overlay a connection gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScopeKind {
    /// One for each export name, shared by its connections.
    #[default]
    Export,
    /// A fresh one for each connection.
    Connection,
}

impl ScopeKind {
    pub const ALL: [ScopeKind; 2] = [ScopeKind::Export, ScopeKind::Connection];

    pub fn name(self) -> &'static str {
        match self {
            ScopeKind::Export => "export",
            ScopeKind::Connection => "connection",
        }
    }
}

/// When reads copy what they read from the base into the overlay.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum OnRead {
    #[default]
    Never,
    Always,
    /// While this file exists; it is an absolute path, because nbdkit changes
    /// its directory to `/` when it goes into the background.
    WhileExists(PathBuf),
}

impl OnRead {
    /// Whether a read that starts now copies.
    pub fn is_on(&self) -> bool {
        match self {
            OnRead::Never => false,
            OnRead::Always => true,
            OnRead::WhileExists(path) => path.exists(),
        }
    }
}

/// The `file=` parameters of the layers below.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum FilesBelow {
    #[default]
    None,
    One(PathBuf),
    /// Of a plugin that puts a disk together from several: none is the base.
    Several,
}

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Config {
    /// The image to keep what is written in; an absolute path.
    pub overlay: Option<PathBuf>,
    /// `cow-backing`.
    pub backing: Option<Backing>,
    pub files_below: FilesBelow,
    /// `None`: that of the overlay's file system.
    pub block_size: Option<BlockSize>,
    /// `cow-limit`, in bytes.
    pub limit: Option<u64>,
    pub on_cache: bool,
    pub on_read: OnRead,
    pub scope: ScopeKind,
    pub serialize: bool,
    /// Where to tell what is counted; an absolute path.
    pub stats: Option<PathBuf>,
}

/// A parameter that the filter takes.
pub struct Parameter {
    pub key: &'static str,
    /// The value that changes nothing, if there is one.
    pub default: Option<&'static str>,
    set: fn(&mut Config, Given<'_>) -> Result<()>,
}

/// All of them. What is not here is left to the layers below.
pub const PARAMETERS: [Parameter; 9] = [
    Parameter {
        key: "cow-block-size",
        default: None,
        set: |config, given| {
            let size = parse_size(&given.text()).and_then(BlockSize::new);
            let size = size.ok_or_else(|| given.refused("a power of two from 512 to 2G"))?;
            config.block_size = Some(size);
            Ok(())
        },
    },
    Parameter {
        key: "cow-limit",
        default: None,
        set: |config, given| {
            let limit = parse_size(&given.text()).filter(|limit| *limit > 0);
            let limit = limit.ok_or_else(|| given.refused("a size in bytes, more than 0"))?;
            config.limit = Some(limit);
            Ok(())
        },
    },
    Parameter {
        key: "cow-on-cache",
        default: Some("false"),
        set: |config, given| {
            config.on_cache = given.bool()?;
            Ok(())
        },
    },
    Parameter {
        key: "cow-on-read",
        default: Some("false"),
        set: |config, given| {
            config.on_read = match boolean(&given.text()) {
                Some(true) => OnRead::Always,
                Some(false) => OnRead::Never,
                None if given.path().is_absolute() => OnRead::WhileExists(given.path().into()),
                None => return Err(given.refused("true, false or an absolute path")),
            };
            Ok(())
        },
    },
    Parameter {
        key: "cow-scope",
        default: Some("export"),
        set: |config, given| {
            config.scope = ScopeKind::ALL
                .into_iter()
                .find(|scope| given.value == scope.name())
                .ok_or_else(|| given.refused("export or connection"))?;
            Ok(())
        },
    },
    Parameter {
        key: "cow-overlay",
        default: None,
        set: |config, given| {
            config.overlay = Some(absolute(given.new_file()?));
            Ok(())
        },
    },
    Parameter {
        key: "cow-backing",
        default: None,
        set: |config, given| {
            config.backing = Some(Backing::parse(given.file()?.as_os_str()));
            Ok(())
        },
    },
    Parameter {
        key: "cow-serialize",
        default: Some("false"),
        set: |config, given| {
            config.serialize = given.bool()?;
            Ok(())
        },
    },
    Parameter {
        key: "cow-stats",
        default: None,
        set: |config, given| {
            config.stats = Some(absolute(given.new_file()?));
            Ok(())
        },
    },
];

/// The text for `nbdkit --help`.
pub const HELP: &std::ffi::CStr = c"\
cow-block-size=SIZE      Unit of the block map, a power of two from 512 to 2G
                         (default: the block size of the file system that
                         holds the overlay, usually 4K).
cow-limit=SIZE           The most that all overlays together may take, data and
                         memory; what would take more fails with ENOSPC
                         (default: no limit).
cow-on-cache=BOOL        true: cache requests copy data of the plugin into the
                         overlay (default: false).
cow-on-read=BOOL|/PATH   true: reads copy data of the plugin into the overlay;
                         /PATH: only while that path exists (default: false).
cow-scope=SCOPE          export: one overlay for each export name; connection:
                         a fresh one for each connection (default: export).
cow-overlay=FILE         Keep what is written in this qcow2 image, a diff to
                         the plugin's disk; go on with it if it exists
                         (default: a temporary file).
cow-backing=NAME         The name of the disk below that the image records: a
                         file or a URI (default: the plugin's file=).
cow-serialize=BOOL       true: handle one request at a time (default: false).
cow-stats=FILE           Write what is counted to this file, as JSON, every
                         second while one changes (default: nowhere).";

impl Config {
    /// What to record as the base's name: what was given, else the one file that
    /// the layers below were given.
    pub fn backing(&self) -> Option<Backing> {
        match (&self.backing, &self.files_below) {
            (Some(backing), _) => Some(backing.clone()),
            (None, FilesBelow::One(path)) => Some(Backing::File(path.clone())),
            (None, FilesBelow::None | FilesBelow::Several) => None,
        }
    }

    /// Takes a parameter. `Ok(false)`: the key is none of ours.
    pub fn set(&mut self, key: &str, value: &OsStr) -> Result<bool> {
        if let Some(parameter) = PARAMETERS.iter().find(|parameter| parameter.key == key) {
            (parameter.set)(self, Given { key, value })?;
            return Ok(true);
        }
        if key == "file" {
            let file = absolute(value.as_ref());
            self.files_below = match &self.files_below {
                FilesBelow::None => FilesBelow::One(file),
                FilesBelow::One(_) | FilesBelow::Several => FilesBelow::Several,
            };
        }
        Ok(false)
    }
}

/// What the command line has for a parameter.
#[derive(Clone, Copy)]
struct Given<'a> {
    key: &'a str,
    value: &'a OsStr,
}

impl<'a> Given<'a> {
    /// For all but paths, which may be any bytes. Nothing that is not UTF-8 is right
    /// elsewhere, and the replacement characters keep it wrong.
    fn text(self) -> Cow<'a, str> {
        self.value.to_string_lossy()
    }

    fn path(self) -> &'a Path {
        Path::new(self.value)
    }

    fn bool(self) -> Result<bool> {
        boolean(&self.text()).ok_or_else(|| self.refused("true or false"))
    }

    fn file(self) -> Result<&'a Path> {
        if self.value.is_empty() {
            return Err(self.refused("the name of a file"));
        }
        Ok(self.path())
    }

    /// One that may have to be made. A name that ends with a slash is that of a directory,
    /// which would be seen only then.
    fn new_file(self) -> Result<&'a Path> {
        if self.text().ends_with('/') {
            return Err(self.refused("the name of a file"));
        }
        self.file()
    }

    fn refused(self, allowed: &str) -> Error {
        let key = self.key;
        // A message is one line, whatever was typed.
        let value = self.text().replace(char::is_control, "\u{fffd}");
        Error::new(
            libc::EINVAL,
            format!("{key}={value}: the value must be {allowed}"),
        )
    }
}

/// The words of `nbdkit_parse_bool`, nbdkit-plugin(3).
fn boolean(value: &str) -> Option<bool> {
    match value.to_ascii_lowercase().as_str() {
        "1" | "true" | "t" | "yes" | "y" | "on" => Some(true),
        "0" | "false" | "f" | "no" | "n" | "off" => Some(false),
        _ => None,
    }
}

/// A size in bytes, spelled as for `nbdkit_parse_size`, nbdkit-plugin(3): a whole
/// number and at most one letter, `b` for bytes, `s` for 512-byte sectors, and
/// `k m g t p e` in either case for powers of 1024. As there, white space and a
/// plus sign may stand before it, and the largest is that of a signed number.
fn parse_size(value: &str) -> Option<u64> {
    // As the C library sees it: not what Unicode calls white space beyond that.
    let value = value.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    let value = value.strip_prefix('+').unwrap_or(value);
    let letter = value.find(|c: char| !c.is_ascii_digit());
    let (number, unit) = value.split_at(letter.unwrap_or(value.len()));
    let unit: i64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "s" => 512,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        "t" => 1 << 40,
        "p" => 1 << 50,
        "e" => 1 << 60,
        _ => return None,
    };
    let bytes = number.parse::<i64>().ok()?.checked_mul(unit)?;
    u64::try_from(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    fn config(pairs: &[(&str, &str)]) -> Config {
        let mut config = Config::default();
        for (key, value) in pairs {
            assert!(
                config.set(key, value.as_ref()).expect("a good value"),
                "{key}"
            );
        }
        config
    }

    fn refusal(key: &str, value: &str) -> String {
        Config::default()
            .set(key, value.as_ref())
            .expect_err("a bad value")
            .to_string()
    }

    #[test]
    fn sizes_are_spelled_as_nbdkit_spells_them() {
        for (text, bytes) in [
            ("512", 512),
            ("4096b", 4096),
            ("+4096", 4096),
            (" 4096", 4096),
            ("8s", 4096),
            ("64K", 65536),
            ("64k", 65536),
            ("1M", 1 << 20),
            ("2G", 1 << 31),
        ] {
            let size = config(&[("cow-block-size", text)]).block_size;
            assert_eq!(size.map(BlockSize::bytes), Some(bytes), "{text}");
        }
    }

    #[test]
    fn a_bad_block_size_is_refused_with_what_is_allowed() {
        for bad in [
            "",
            "0",
            "1",
            "256",
            "513",
            "3000",
            "4G",
            "-1",
            "++4096",
            "+",
            "4096 ",
            "abc",
            "4KB",
            "K",
            "16E",
            "\u{a0}4096",
            "99999999999999999999",
            "0x1000",
        ] {
            assert_eq!(
                refusal("cow-block-size", bad),
                format!("cow-block-size={bad}: the value must be a power of two from 512 to 2G")
            );
        }
    }

    #[test]
    fn a_refusal_is_one_line() {
        assert_eq!(
            refusal("cow-scope", "a\nb\x1b"),
            "cow-scope=a\u{fffd}b\u{fffd}: the value must be export or connection"
        );
    }

    #[test]
    fn a_limit_is_a_size_and_not_nothing() {
        assert_eq!(config(&[]).limit, None);
        for (text, bytes) in [("1", 1), ("10g", 10 << 30), ("7E", 7 << 60)] {
            assert_eq!(config(&[("cow-limit", text)]).limit, Some(bytes), "{text}");
        }
        for bad in [
            "0",
            "0G",
            "",
            "-1",
            "8E",
            "9223372036854775808",
            "50%",
            "none",
        ] {
            assert_eq!(
                refusal("cow-limit", bad),
                format!("cow-limit={bad}: the value must be a size in bytes, more than 0")
            );
        }
    }

    #[test]
    fn booleans_are_spelled_as_nbdkit_spells_them() {
        for yes in ["1", "true", "t", "YES", "y", "on"] {
            assert!(config(&[("cow-on-cache", yes)]).on_cache);
            assert!(config(&[("cow-serialize", yes)]).serialize);
        }
        for no in ["0", "false", "F", "no", "n", "off"] {
            assert!(!config(&[("cow-on-cache", "1"), ("cow-on-cache", no)]).on_cache);
        }
        assert_eq!(
            refusal("cow-serialize", "maybe"),
            "cow-serialize=maybe: the value must be true or false"
        );
    }

    #[test]
    fn on_read_takes_a_bool_or_an_absolute_path() {
        assert_eq!(config(&[]).on_read, OnRead::Never);
        assert_eq!(config(&[("cow-on-read", "true")]).on_read, OnRead::Always);
        assert_eq!(
            config(&[("cow-on-read", "/a/b")]).on_read,
            OnRead::WhileExists("/a/b".into())
        );
        for bad in ["a/b", "./true", "", "2"] {
            assert_eq!(
                refusal("cow-on-read", bad),
                format!("cow-on-read={bad}: the value must be true, false or an absolute path")
            );
        }
    }

    #[test]
    fn the_base_is_the_file_below_if_there_is_one() {
        let files_below = |files: &[&str]| {
            let mut config = Config::default();
            for file in files {
                let is_ours = config.set("file", file.as_ref());
                assert!(!is_ours.expect("not looked at"), "{file}");
            }
            config.files_below
        };
        assert_eq!(files_below(&[]), FilesBelow::None);
        assert_eq!(files_below(&["/a/./b"]), FilesBelow::One("/a/b".into()));
        for several in [&["/a/b", "/a/c"][..], &["/a/b", "/a/b"], &["1", "2", "3"]] {
            assert_eq!(files_below(several), FilesBelow::Several);
        }
    }

    #[test]
    fn an_overlay_has_the_name_of_a_file() {
        for bad in ["", "/", "o.qcow2/", "/a/b//"] {
            for key in ["cow-overlay", "cow-stats"] {
                assert_eq!(
                    refusal(key, bad),
                    format!("{key}={bad}: the value must be the name of a file")
                );
            }
        }
        let config = config(&[("cow-overlay", "/a/./b.qcow2")]);
        assert_eq!(config.overlay, Some("/a/b.qcow2".into()));
    }

    #[test]
    fn a_path_need_not_be_utf8() {
        let mut config = Config::default();
        let path = OsStr::from_bytes(b"/tmp/\xff");
        assert!(config.set("cow-on-read", path).expect("a path"));
        assert_eq!(config.on_read, OnRead::WhileExists(path.into()));
    }

    #[test]
    fn scope_is_export_or_connection() {
        assert_eq!(config(&[]).scope, ScopeKind::Export);
        assert_eq!(
            config(&[("cow-scope", "connection")]).scope,
            ScopeKind::Connection
        );
        assert!(refusal("cow-scope", "disk").contains("export or connection"));
    }

    #[test]
    fn a_key_that_is_not_ours_is_left_to_the_next_layer() {
        let mut config = Config::default();
        for key in ["dir", "cow", "cow-", "cow-block-size ", "COW-SCOPE"] {
            assert!(
                !config.set(key, "1".as_ref()).expect("not looked at"),
                "{key}"
            );
        }
        assert_eq!(config, Config::default());
    }

    #[test]
    fn a_default_changes_nothing() {
        for Parameter { key, default, .. } in PARAMETERS {
            if let Some(default) = default {
                assert_eq!(config(&[(key, default)]), Config::default(), "{key}");
            }
        }
    }
}
