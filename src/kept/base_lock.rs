//! The lock on the base, by which a QEMU that would write to it is kept out.

use std::fs::File;

use super::backing::open_to_read;
use super::{Backing, Kept};
use crate::error::Result;
use crate::qcow2::lock::lock_as_backing;

impl Kept {
    /// Locks the base as QEMU locks a backing file, until what is returned is dropped.
    /// Nothing is returned where that can't be had, or is not wanted: a name with a protocol
    /// is not looked at.
    pub(super) fn lock_base(&self) -> Result<Option<File>> {
        let Some(Backing::File(path)) = &self.backing else {
            return Ok(None);
        };
        let locked = open_to_read(path).and_then(|file| Ok((lock_as_backing(&file)?, file)));
        match locked {
            Ok((true, file)) => Ok(Some(file)),
            Ok((false, _)) => Err(self.path.refused_with(
                libc::EBUSY,
                format!(
                    "another program (qemu, qemu-img) writes to its backing file {}",
                    path.display()
                ),
            )),
            Err(e) => {
                log::warn!(
                    "{} can't be locked ({e}): see to it that nothing writes to it \
                     while nbdkit serves it",
                    path.display()
                );
                Ok(None)
            }
        }
    }
}
