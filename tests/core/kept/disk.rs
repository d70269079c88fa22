//! A kept overlay over a recorded file, and a model of the disk that it serves.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use nbdkit_cow_filter::error::{Error, Result};
use nbdkit_cow_filter::kept::{self, KeptStore};
use nbdkit_cow_filter::overlay::{Overlay, Zeroing};
use nbdkit_cow_filter::qcow2::header::Header;
use nbdkit_cow_filter::qcow2::image::Image;
use nbdkit_cow_filter::qcow2::layout::Layout;

use super::content::{Content, SECTOR, Sector};
use super::crash::{Allowed, base_sector};
use super::recorder::Recorder;
use crate::disk::{TestBase, block_size};

pub type Kept = Overlay<KeptStore<Recorder>>;

/// The backing file's name in the images.
pub const BACKING: &str = "base.img";

pub const KEEP: Zeroing = Zeroing::Zero {
    may_trim: false,
    fast: false,
};

/// As a trim, but what fails is told.
pub const DISCARD: Zeroing = Zeroing::Zero {
    may_trim: true,
    fast: true,
};

/// Offsets and lengths are in bytes.
#[derive(Debug, Clone)]
pub enum Request {
    Write {
        at: u64,
        len: u64,
        byte: u8,
    },
    Zero {
        at: u64,
        len: u64,
        how: Zeroing,
    },
    /// A read that saves what it reads.
    CopyingRead {
        at: u64,
        len: u64,
    },
    Flush,
    /// The process ends without a flush, and another goes on with the file.
    Kill,
}

pub fn layout(size: u64, block: u64) -> Layout {
    Layout::new(size, block_size(block)).expect("fits")
}

/// A new image, as it is when it gets its name.
pub fn new_image(size: u64, block: u64) -> Content {
    let header = Header::new(layout(size, block), BACKING.into(), None);
    let recorder = Recorder::default();
    Image::create(recorder.clone(), Path::new("new"), &header).expect("a new image");
    recorder.content()
}

pub fn resume(recorder: &Recorder) -> Result<Kept> {
    let (image, _) = Image::open(recorder.clone(), Path::new("kept"))?;
    kept::resume(image, true)
}

/// Flushes, and has the record say for what that is good: for all that was asked for
/// and answered before.
pub fn flush(overlay: &Kept, recorder: &Recorder) -> Result<()> {
    let asked = recorder.asked();
    overlay.flush()?;
    recorder.flushed(asked, None);
    Ok(())
}

pub struct Disk {
    pub base: TestBase,
    pub block: u64,
    pub overlay: Arc<Kept>,
    pub recorder: Recorder,
    /// The file when the record began, and what the disk was.
    pub start: Content,
    pub start_model: BTreeMap<u64, Arc<Sector>>,
    /// The sectors of the disk that are not what the base has, and maybe others.
    pub model: BTreeMap<u64, Arc<Sector>>,
}

impl Disk {
    pub fn new(size: u64, block: u64) -> Self {
        let content = new_image(size, block);
        Self::with(TestBase::new(size), block, content, BTreeMap::new())
    }

    /// Goes on with what a crash has left, where `numbers` are those sectors that may
    /// not be as in the base.
    pub fn after_crash(&self, content: &Content, numbers: impl Iterator<Item = u64>) -> Self {
        let base = TestBase::new(self.base.size);
        let overlay = resume(&Recorder::holding(content.clone())).expect("resumable");
        let model = numbers
            .map(|number| (number, Arc::new(sector(&base, &overlay, number))))
            .collect();
        Self::with(base, self.block, content.clone(), model)
    }

    fn with(base: TestBase, block: u64, start: Content, model: BTreeMap<u64, Arc<Sector>>) -> Self {
        let recorder = Recorder::holding(start.clone());
        Disk {
            overlay: Arc::new(resume(&recorder).expect("resumable")),
            base,
            block,
            recorder,
            start,
            start_model: model.clone(),
            model,
        }
    }

    pub fn allowed_at_start(&self) -> Allowed<'_> {
        Allowed::new(&self.base, self.block, &self.start_model)
    }

    pub fn layout(&self) -> Layout {
        layout(self.base.size, self.block)
    }

    fn model_sector(&self, number: u64) -> Sector {
        match self.model.get(&number) {
            Some(sector) => **sector,
            None => base_sector(&self.base, number),
        }
    }

    /// Tells the record what the model is to become: `byte` in `range`, or the same
    /// as before.
    pub fn ask(&mut self, range: Range<u64>, byte: Option<u8>) {
        let numbers = range.start / SECTOR..range.end.div_ceil(SECTOR);
        let sectors: Vec<_> = numbers
            .map(|number| {
                let mut sector = self.model_sector(number);
                for (at, target) in (number * SECTOR..).zip(&mut sector) {
                    if let Some(byte) = byte.filter(|_| range.contains(&at)) {
                        *target = byte;
                    }
                }
                (number, Arc::new(sector))
            })
            .collect();
        self.model.extend(sectors.iter().cloned());
        self.recorder.ask(sectors);
    }

    pub fn request(&mut self, request: &Request) -> Result<()> {
        match *request {
            Request::Write { at, len, byte } => {
                self.ask(at..at + len, Some(byte));
                let bytes = vec![byte; len as usize];
                self.overlay.write(&self.base, &bytes, at)
            }
            Request::Zero { at, len, how } => {
                self.ask(at..at + len, Some(0));
                self.overlay.zero(&self.base, at, len, how)
            }
            Request::CopyingRead { at, len } => {
                self.ask(at..at + len, None);
                let mut bytes = vec![0; len as usize];
                self.overlay.read(&self.base, &mut bytes, at, true)
            }
            Request::Flush => flush(&self.overlay, &self.recorder),
            Request::Kill => {
                self.overlay = Arc::new(resume(&self.recorder)?);
                self.settle();
                Ok(())
            }
        }
    }

    pub fn run(&mut self, script: &[Request]) {
        for (number, request) in script.iter().enumerate() {
            self.request(request)
                .map_err(|e: Error| format!("request {number}, {request:?}: {e}"))
                .expect("no fault");
        }
    }

    /// After something that may have been done or not: the disk is what it is.
    pub fn settle(&mut self) {
        let sectors: Vec<_> = self
            .model
            .keys()
            .map(|number| {
                (
                    *number,
                    Arc::new(sector(&self.base, &self.overlay, *number)),
                )
            })
            .collect();
        self.model.extend(sectors.iter().cloned());
        self.recorder.ask(sectors);
    }

    pub fn assert_as_model(&self) {
        for (number, expected) in &self.model {
            let found = sector(&self.base, &self.overlay, *number);
            assert!(found == **expected, "sector {number} of the disk");
        }
    }
}

/// As the overlay under test reads it.
pub fn sector(base: &TestBase, overlay: &Kept, number: u64) -> Sector {
    let mut bytes = [0; SECTOR as usize];
    let start = number * SECTOR;
    let len = SECTOR.min(base.size - start) as usize;
    overlay
        .read(base, &mut bytes[..len], start, false)
        .expect("a good read");
    bytes
}
