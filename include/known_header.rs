//! What this filter knows of `<nbdkit-filter.h>`, and the sentence with which a build
//! ends where the installed header has something else.
//!
//! nbdkit hands a request to the layer below if the filter has no callback for it. One
//! of a kind that this filter does not know would pass by the overlay, and could write to
//! the disk. So a new member of `struct nbdkit_filter` ends the build, until somebody
//! has thought about it and added it here.

use std::collections::BTreeMap;

use syn::{Expr, Fields, ForeignItem, GenericArgument, Item, Lit, PathArguments, ReturnType, Type};

/// Each name with what it may be, with a bar between; "-" where it may be missing.
const KNOWN: &str = "\
NBDKIT_FILTER_API_VERSION = 6
NBDKIT_FLAG_MAY_TRIM = 1
NBDKIT_FLAG_FUA = 2
NBDKIT_FLAG_REQ_ONE = 4
NBDKIT_FLAG_FAST_ZERO = 8
nbdkit_filter._api_version = c_int
nbdkit_filter._version = *const c_char
nbdkit_filter.name = *const c_char
nbdkit_filter.longname = *const c_char
nbdkit_filter.description = *const c_char
nbdkit_filter.load = fn()
nbdkit_filter.unload = fn()
nbdkit_filter.config = fn(nbdkit_next_config, *mut nbdkit_backend, *const c_char, *const c_char) -> c_int
nbdkit_filter.config_complete = fn(nbdkit_next_config_complete, *mut nbdkit_backend) -> c_int
nbdkit_filter.config_help = *const c_char
nbdkit_filter.thread_model = fn() -> c_int | fn(c_int) -> c_int
nbdkit_filter.dump_plugin = fn() | -
nbdkit_filter.get_ready = fn(c_int) -> c_int
nbdkit_filter.after_fork = fn(*mut nbdkit_backend) -> c_int
nbdkit_filter.cleanup = fn(*mut nbdkit_backend)
nbdkit_filter.preconnect = fn(nbdkit_next_preconnect, *mut nbdkit_backend, c_int) -> c_int
nbdkit_filter.list_exports = fn(nbdkit_next_list_exports, *mut nbdkit_backend, c_int, c_int, *mut nbdkit_exports) -> c_int
nbdkit_filter.default_export = fn(nbdkit_next_default_export, *mut nbdkit_backend, c_int, c_int) -> *const c_char
nbdkit_filter.open = fn(nbdkit_next_open, *mut nbdkit_context, c_int, *const c_char, c_int) -> *mut c_void
nbdkit_filter.close = fn(*mut c_void)
nbdkit_filter.prepare = fn(*mut nbdkit_next, *mut c_void, c_int) -> c_int
nbdkit_filter.finalize = fn(*mut nbdkit_next, *mut c_void) -> c_int
nbdkit_filter.get_size = fn(*mut nbdkit_next, *mut c_void) -> i64
nbdkit_filter.export_description = fn(*mut nbdkit_next, *mut c_void) -> *const c_char
nbdkit_filter.block_size = fn(*mut nbdkit_next, *mut c_void, *mut u32, *mut u32, *mut u32) -> c_int
nbdkit_filter.can_write = fn(*mut nbdkit_next, *mut c_void) -> c_int
nbdkit_filter.can_flush = fn(*mut nbdkit_next, *mut c_void) -> c_int
nbdkit_filter.is_rotational = fn(*mut nbdkit_next, *mut c_void) -> c_int
nbdkit_filter.can_trim = fn(*mut nbdkit_next, *mut c_void) -> c_int
nbdkit_filter.can_zero = fn(*mut nbdkit_next, *mut c_void) -> c_int
nbdkit_filter.can_fast_zero = fn(*mut nbdkit_next, *mut c_void) -> c_int
nbdkit_filter.can_extents = fn(*mut nbdkit_next, *mut c_void) -> c_int
nbdkit_filter.can_fua = fn(*mut nbdkit_next, *mut c_void) -> c_int
nbdkit_filter.can_multi_conn = fn(*mut nbdkit_next, *mut c_void) -> c_int
nbdkit_filter.can_cache = fn(*mut nbdkit_next, *mut c_void) -> c_int
nbdkit_filter.pread = fn(*mut nbdkit_next, *mut c_void, *mut c_void, u32, u64, u32, *mut c_int) -> c_int
nbdkit_filter.pwrite = fn(*mut nbdkit_next, *mut c_void, *const c_void, u32, u64, u32, *mut c_int) -> c_int
nbdkit_filter.flush = fn(*mut nbdkit_next, *mut c_void, u32, *mut c_int) -> c_int
nbdkit_filter.trim = fn(*mut nbdkit_next, *mut c_void, u32, u64, u32, *mut c_int) -> c_int
nbdkit_filter.zero = fn(*mut nbdkit_next, *mut c_void, u32, u64, u32, *mut c_int) -> c_int
nbdkit_filter.extents = fn(*mut nbdkit_next, *mut c_void, u32, u64, u32, *mut nbdkit_extents, *mut c_int) -> c_int
nbdkit_filter.cache = fn(*mut nbdkit_next, *mut c_void, u32, u64, u32, *mut c_int) -> c_int
nbdkit_next_config = fn(*mut nbdkit_backend, *const c_char, *const c_char) -> c_int
nbdkit_next_config_complete = fn(*mut nbdkit_backend) -> c_int
nbdkit_next_open = fn(*mut nbdkit_context, c_int, *const c_char) -> c_int
nbdkit_next_ops.get_size = fn(*mut nbdkit_next) -> i64
nbdkit_next_ops.block_size = fn(*mut nbdkit_next, *mut u32, *mut u32, *mut u32) -> c_int
nbdkit_next_ops.can_extents = fn(*mut nbdkit_next) -> c_int
nbdkit_next_ops.can_cache = fn(*mut nbdkit_next) -> c_int
nbdkit_next_ops.pread = fn(*mut nbdkit_next, *mut c_void, u32, u64, u32, *mut c_int) -> c_int
nbdkit_next_ops.extents = fn(*mut nbdkit_next, u32, u64, u32, *mut nbdkit_extents, *mut c_int) -> c_int
nbdkit_next_ops.cache = fn(*mut nbdkit_next, u32, u64, u32, *mut c_int) -> c_int
nbdkit_extent.offset = u64
nbdkit_extent.length = u64
nbdkit_extent.type_ = u32
nbdkit_extents_new = fn(u64, u64) -> *mut nbdkit_extents
nbdkit_extents_free = fn(*mut nbdkit_extents)
nbdkit_extents_count = fn(*const nbdkit_extents) -> usize
nbdkit_get_extent = fn(*const nbdkit_extents, usize) -> nbdkit_extent
nbdkit_add_extent = fn(*mut nbdkit_extents, u64, u64, u32) -> c_int
nbdkit_error = fn(*const c_char, ...)
nbdkit_debug = fn(*const c_char, ...)
";

/// Where a name that is not known could change what nbdkit does with a request. All
/// else that is new in a header is only more than this filter asks for.
const COMPLETE: [&str; 2] = ["nbdkit_filter.", "NBDKIT_FLAG_"];

/// What the rest of the build has to know of the header.
pub struct Header {
    pub version: String,
    pub has_dump_plugin: bool,
}

/// Looks at what bindgen made of the header, and at the names of all its macros. An error
/// is a sentence for who builds.
pub fn check(bindings: &str, macros: &[String]) -> Result<Header, String> {
    let mut found = declarations(bindings).map_err(|e| format!("bindgen's output: {e}"))?;
    for name in macros {
        found.entry(name.clone()).or_insert("?".to_string());
    }
    let version = found.get("NBDKIT_VERSION_STRING");
    let version = version.map_or("an unknown version", String::as_str);
    let differences = differences(&found);
    if let Some(first) = differences.first() {
        let count = match differences.len() {
            1 => String::new(),
            count => format!(" (the first of {count} differences)"),
        };
        return Err(format!(
            "<nbdkit-filter.h> of nbdkit {version} is none of those that {} {} knows: \
             {first}{count}. Use another version of this filter, or of nbdkit: 1.32 to 1.48 are known.",
            env!("CARGO_PKG_NAME"),
            env!("CARGO_PKG_VERSION"),
        ));
    }
    Ok(Header {
        version: version.to_string(),
        has_dump_plugin: found.contains_key("nbdkit_filter.dump_plugin"),
    })
}

fn differences(found: &BTreeMap<String, String>) -> Vec<String> {
    let known: BTreeMap<&str, Vec<&str>> = KNOWN
        .lines()
        .filter_map(|line| line.split_once(" = "))
        .map(|(name, shapes)| (name, shapes.split(" | ").collect()))
        .collect();
    let mut differences = Vec::new();
    for name in found.keys() {
        if COMPLETE.iter().any(|prefix| name.starts_with(prefix))
            && !known.contains_key(name.as_str())
        {
            differences.push(format!("{name} is new"));
        }
    }
    for (name, shapes) in known {
        match found.get(name) {
            Some(shape) if shapes.contains(&shape.as_str()) => {}
            None if shapes.contains(&"-") => {}
            Some(shape) => {
                differences.push(format!("{name} is {shape}, not {}", shapes.join(" or ")))
            }
            None => differences.push(format!("{name} is missing")),
        }
    }
    differences
}

/// Constants, members, functions and types by name, with what they are.
fn declarations(bindings: &str) -> syn::Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for item in syn::parse_file(bindings)?.items {
        match item {
            Item::Const(constant) => {
                found.insert(constant.ident.to_string(), value(&constant.expr));
            }
            Item::Type(alias) => {
                found.insert(alias.ident.to_string(), shape(&alias.ty));
            }
            Item::Struct(item) => {
                if let Fields::Named(fields) = item.fields {
                    for field in fields.named {
                        let member = field.ident.map(|name| name.to_string());
                        let name = format!("{}.{}", item.ident, member.unwrap_or_default());
                        found.insert(name, shape(&field.ty));
                    }
                }
            }
            Item::ForeignMod(block) => {
                for item in block.items {
                    if let ForeignItem::Fn(function) = item {
                        let signature = function.sig;
                        let arguments = signature.inputs.iter().map(|argument| match argument {
                            syn::FnArg::Typed(argument) => shape(&argument.ty),
                            syn::FnArg::Receiver(_) => "self".to_string(),
                        });
                        let shape = function_shape(
                            arguments.collect(),
                            signature.variadic.is_some(),
                            &signature.output,
                        );
                        found.insert(signature.ident.to_string(), shape);
                    }
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

fn value(expr: &Expr) -> String {
    match expr {
        Expr::Lit(literal) => match &literal.lit {
            Lit::Int(number) => number.base10_digits().to_string(),
            Lit::CStr(text) => text.value().to_string_lossy().into_owned(),
            _ => "?".to_string(),
        },
        _ => "?".to_string(),
    }
}

/// A type without the names of arguments, and without the paths of its parts.
fn shape(ty: &Type) -> String {
    match ty {
        Type::Ptr(pointer) => {
            let kind = match pointer.mutability {
                Some(_) => "mut",
                None => "const",
            };
            format!("*{kind} {}", shape(&pointer.elem))
        }
        Type::BareFn(function) => function_shape(
            function
                .inputs
                .iter()
                .map(|argument| shape(&argument.ty))
                .collect(),
            function.variadic.is_some(),
            &function.output,
        ),
        Type::Path(path) => match path.path.segments.last() {
            Some(last) => match &last.arguments {
                // A function that may be null, which every one in C may be.
                PathArguments::AngleBracketed(arguments) => match arguments.args.first() {
                    Some(GenericArgument::Type(ty)) => shape(ty),
                    _ => "?".to_string(),
                },
                _ => last.ident.to_string(),
            },
            None => "?".to_string(),
        },
        _ => "?".to_string(),
    }
}

fn function_shape(mut arguments: Vec<String>, variadic: bool, output: &ReturnType) -> String {
    if variadic {
        arguments.push("...".to_string());
    }
    let arguments = arguments.join(", ");
    match output {
        ReturnType::Default => format!("fn({arguments})"),
        ReturnType::Type(_, ty) => format!("fn({arguments}) -> {}", shape(ty)),
    }
}
