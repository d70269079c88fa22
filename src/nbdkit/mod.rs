//! The boundary to nbdkit: all that is `unsafe` about being loaded by it.
//!
//! Every callback that nbdkit can call is made by one macro in `vtable`, which
//! runs its body inside [`guard`]: a panic ends the request, not nbdkit, and no
//! panic unwinds into C. What nbdkit passes as raw pointers becomes a slice, a
//! `&CStr` or a [`next::Next`] on the first line of a callback; the code behind
//! is safe.
//!
//! # Who owns what
//!
//! | pointer | owner | valid |
//! |---|---|---|
//! | `struct nbdkit_filter *` | leaked on purpose; nbdkit reads it | for ever |
//! | a connection's handle | a `Box`, made in *open*, freed in *close* | between the two |
//! | `nbdkit_next *` | nbdkit | from *prepare* to *finalize*, from several threads at once |
//! | `buf`, `err`, `extents` of a request | nbdkit | during the request, for its thread only |
//! | export names, keys, values | nbdkit | during the call |

pub mod extents;
pub mod guard;
pub mod log;
pub mod next;
mod sys;
mod vtable;
