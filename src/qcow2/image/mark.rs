//! The mark of a run: a number in the header that is not 0 from before the first change of
//! a run to its clean end. (It also is not while a start brings the image home.)
//!
//! A program that finds it set knows that what it reads of the file through the page cache
//! may not be on the disk: when the system can't write a page it keeps it, as if it had
//! been written, and only the one who syncs is told.
//!
//! So the mark has to be on the disk before anything else changes. Whoever changes the
//! file gets it from [`Image::changing`], which sees to that; the first one sets the mark,
//! and others who come meanwhile wait for it. A mark that can't be set makes the request
//! fail, and the next one tries again: nothing has changed yet.

use std::path::Path;
use std::sync::OnceLock;

use super::super::file::ImageFile;
use super::super::header::{Header, InUse, User};
use super::Image;
use crate::error::Result;
use crate::overlay_file::OverlayFile;
use crate::sync::{Mutex, locked};

pub(super) struct Mark {
    /// Where it lies in the file. `None`: in an image of version 1.0, which has none.
    at: Option<u64>,
    /// One was found when the image was opened.
    was_found: bool,
    /// That of a run is set in the file, and safe; or there is none. (A cell of the standard library
    /// also for the model checker, which would try more orders than it can.)
    is_safe: OnceLock<()>,
    /// Held while it is being set.
    setting: Mutex<()>,
}

impl Mark {
    pub(super) fn new(header: &Header) -> Self {
        let mark = Mark {
            at: header.in_use.map(|in_use| in_use.at),
            was_found: header.in_use.is_some_and(|in_use| in_use.by.is_some()),
            is_safe: OnceLock::new(),
            setting: Mutex::default(),
        };
        if header
            .in_use
            .is_none_or(|in_use| in_use.by == Some(User::Run))
        {
            mark.is_safe.get_or_init(|| ());
        }
        mark
    }
}

impl<F: ImageFile> Image<F> {
    /// The file, to be changed: the mark is safe on the disk.
    #[inline(always)]
    pub fn changing(&self) -> Result<&F> {
        if self.mark.is_safe.get().is_none() {
            self.set_mark()?;
        }
        Ok(&self.file)
    }

    #[cold]
    fn set_mark(&self) -> Result<()> {
        let _setting = locked(&self.mark.setting);
        if self.mark.is_safe.get().is_none() {
            self.write_mark(Some(User::Run))?;
            self.mark.is_safe.get_or_init(|| ());
        }
        Ok(())
    }

    /// A run comes to its clean end: its last flush was good, and nothing changes the file
    /// any more.
    pub fn end_run(&self) -> Result<()> {
        if self.mark.is_safe.get().is_none() && !self.mark.was_found {
            return Ok(());
        }
        self.write_mark(None)
    }

    fn write_mark(&self, by: Option<User>) -> Result<()> {
        let Some(at) = self.mark.at else {
            return Ok(());
        };
        let bytes = InUse::mark(by);
        self.file.write_synced(&bytes, at).map_err(|e| {
            let operation = "writing the mark of a run to";
            self.name
                .write_failed_at(e, operation, at, bytes.len() as u64)
        })
    }

    /// Whether the last run that changed the image in `file` is known to have come to a
    /// clean end. `path` is for messages.
    ///
    /// This may be asked of the page cache: the mark was on the disk before anything could
    /// be lost, and it is taken away after all else is there.
    pub fn has_ended_well(file: &F, path: &Path) -> bool {
        let name = OverlayFile::Image(path.to_owned());
        // What is no image of ours is found out, and told, by who opens it.
        Self::read_header(file, &name)
            .is_ok_and(|header| header.in_use.is_some_and(|in_use| in_use.by.is_none()))
    }
}
