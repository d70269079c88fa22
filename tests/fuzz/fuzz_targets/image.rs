//! An image from whatever bytes, opened and served as the filter does it.
//!
//! Plain random bytes would never get past the magic. So the input is a script
//! ([`script`]): an image is made for a disk of its choice, then requests go to it
//! in turn with edits of the file, behind the filter's back: with numbers that mean
//! nothing, or as QEMU changes it ([`qemu`]). Of each image it is asked that
//!
//! - nothing panics, and no request fails that should not;
//! - opening it takes no more memory than its tables justify, and writes nothing,
//!   whether it is accepted or refused;
//! - one that is not as the filter leaves it is refused without a change, or brought home,
//!   and then the disk in it is what another reader ([`spec`]) took it for before;
//! - an image that no edit has touched is accepted, and so is one that only QEMU has;
//! - one that is accepted breaks no rule of the format, and each of its blocks is
//!   what the other reader takes it for;
//! - whatever was written is there after the next flush and a new start, all else
//!   is as before, and no cluster has another refcount than it should.

#![no_main]

mod allocations;
mod memory;
mod model;
mod qemu;
mod script;
mod session;
mod spec;

use libfuzzer_sys::fuzz_target;

use script::Script;
use session::Session;

fuzz_target!(|data: &[u8]| {
    let Some(script) = Script::parse(data) else {
        return;
    };
    let mut session = Session::new(&script);
    for step in &script.steps {
        if !session.step(step) {
            return;
        }
    }
    session.end();
});
