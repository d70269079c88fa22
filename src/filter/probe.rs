//! What a program can ask of the filter before it uses it: lines of `key=value`, for
//! `nbdkit --dump-plugin`. The manual page promises that the keys stay.

use super::config::{PARAMETERS, ScopeKind};
use crate::block::BlockSize;
use crate::file_system::DEFAULT_BLOCK_SIZE;

/// nbdkit adds `cow_path` and `cow_name`.
pub fn lines() -> Vec<String> {
    [
        ("package", env!("CARGO_PKG_NAME").to_string()),
        ("version", env!("CARGO_PKG_VERSION").to_string()),
        ("nbdkit_version", env!("NBDKIT_VERSION").to_string()),
        (
            "parameters",
            PARAMETERS.map(|parameter| parameter.key).join(","),
        ),
        ("block_size_minimum", BlockSize::MIN.to_string()),
        ("block_size_maximum", BlockSize::MAX.to_string()),
        (
            "default_block_size_minimum",
            DEFAULT_BLOCK_SIZE.start().to_string(),
        ),
        (
            "default_block_size_maximum",
            DEFAULT_BLOCK_SIZE.end().to_string(),
        ),
        ("scopes", ScopeKind::ALL.map(ScopeKind::name).join(",")),
        ("overlay_formats", "qcow2".to_string()),
    ]
    .map(|(key, value)| format!("cow_{key}={value}"))
    .into()
}
