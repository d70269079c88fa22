//! What bindgen made from the installed `<nbdkit-filter.h>`.

// A selection by name takes in a few constants that nobody asks for.
#![allow(non_camel_case_types, dead_code)]

include!(concat!(env!("OUT_DIR"), "/nbdkit.rs"));
