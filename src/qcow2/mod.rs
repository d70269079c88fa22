//! The qcow2 image that an overlay can be kept in.
//!
//! [`layout`] says where things lie and what they look like as bytes, [`header`]
//! is the first cluster, [`mod@file`] what an image is written to, [`image`] makes,
//! checks and flushes one, [`home`] brings one back to that layout which another program
//! has written to, and [`lock`] keeps others away from it.

pub mod file;
pub mod header;
pub mod home;
pub mod image;
pub mod layout;
pub mod lock;
