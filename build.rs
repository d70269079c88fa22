//! Makes Rust declarations of the installed `<nbdkit-filter.h>`.
//!
//! The include path comes from pkg-config (`nbdkit.pc`). For a cross build, or
//! an nbdkit that was built by hand, `NBDKIT_CFLAGS` replaces what pkg-config
//! would say, and pkg-config's own variables (`PKG_CONFIG_PATH`,
//! `PKG_CONFIG_SYSROOT_DIR`, `PKG_CONFIG_ALLOW_CROSS`) work as everywhere.

use std::cell::RefCell;
use std::env;
use std::panic::{self, AssertUnwindSafe};
use std::path::PathBuf;
use std::rc::Rc;

use bindgen::callbacks::{MacroParsingBehavior, ParseCallbacks};

#[path = "include/known_header.rs"]
mod known_header;

/// The names of the header's macros. bindgen makes no constant of one that has a cast.
#[derive(Debug, Default, Clone)]
struct Macros(Rc<RefCell<Vec<String>>>);

impl ParseCallbacks for Macros {
    fn will_parse_macro(&self, name: &str) -> MacroParsingBehavior {
        self.0.borrow_mut().push(name.to_string());
        MacroParsingBehavior::Default
    }
}

const HEADER: &str = "include/nbdkit_cow.h";

fn main() {
    println!("cargo::rerun-if-changed={HEADER}");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=include/known_header.rs");
    println!("cargo::rerun-if-env-changed=NBDKIT_CFLAGS");
    println!("cargo::rustc-check-cfg=cfg(nbdkit_dump_plugin)");
    if let Err(message) = generate() {
        println!("cargo::error={message}");
    }
}

fn generate() -> Result<(), String> {
    let flags = compiler_flags()?;
    let macros = Macros::default();
    let builder = bindgen::Builder::default()
        .header(HEADER)
        .clang_args(&flags)
        .allowlist_type("nbdkit_(filter|next_ops|extents?)")
        .allowlist_function("nbdkit_(error|debug)")
        .allowlist_function("nbdkit_extents_(new|free|count)")
        .allowlist_function("nbdkit_(get|add)_extent")
        .allowlist_var("NBDKIT_(FILTER_API_VERSION|VERSION_STRING)")
        .allowlist_var("NBDKIT_(FLAG|ZERO|FUA|CACHE|THREAD_MODEL|EXTENT)_.*")
        .generate_cstr(true)
        .default_macro_constant_type(bindgen::MacroTypeVariation::Signed)
        .merge_extern_blocks(true)
        .wrap_unsafe_ops(true)
        // Doc comments of the header belong to nbdkit, and are not ours to repeat.
        .generate_comments(false)
        .rust_target(bindgen::RustTarget::stable(85, 0).map_err(|e| e.to_string())?)
        .parse_callbacks(Box::new(
            // A new nbdkit header must lead to new bindings.
            bindgen::CargoCallbacks::new(),
        ))
        .parse_callbacks(Box::new(macros.clone()));

    // bindgen panics where libclang is missing, with a page of advice.
    let bindings = panic::catch_unwind(AssertUnwindSafe(|| builder.generate()))
        .map_err(|_| "bindgen could not load libclang: install libclang (Debian: libclang-dev) or set LIBCLANG_PATH".to_string())?
        .map_err(|e| {
            format!("<nbdkit-filter.h> could not be read; install nbdkit's development files (Debian: nbdkit-plugin-dev): {}",
                e.to_string().lines().next().unwrap_or("no reason given"))
        })?;
    let header = known_header::check(&bindings.to_string(), &macros.0.borrow())?;
    println!("cargo::rustc-env=NBDKIT_VERSION={}", header.version);
    if header.has_dump_plugin {
        println!("cargo::rustc-cfg=nbdkit_dump_plugin");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("nbdkit.rs");
    bindings
        .write_to_file(&out)
        .map_err(|e| format!("{}: {e}", out.display()))
}

fn compiler_flags() -> Result<Vec<String>, String> {
    if let Ok(flags) = env::var("NBDKIT_CFLAGS") {
        return Ok(flags.split_whitespace().map(str::to_string).collect());
    }
    let nbdkit = pkg_config::Config::new()
        .cargo_metadata(false)
        .probe("nbdkit")
        .map_err(|_| {
            "nbdkit's development files were not found by pkg-config: install them (Debian: nbdkit-plugin-dev and pkg-config), or set NBDKIT_CFLAGS=-I/directory/of/nbdkit-filter.h".to_string()
        })?;
    Ok(nbdkit
        .include_paths
        .iter()
        .map(|path| format!("-I{}", path.display()))
        .collect())
}
