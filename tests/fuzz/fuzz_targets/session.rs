//! An image through its starts, requests, ends and edits.

use std::path::Path;

use nbdkit_cow_filter::block::{BlockSize, ByteRange, Piece};
use nbdkit_cow_filter::buffer::is_zero;
use nbdkit_cow_filter::error::Result;
use nbdkit_cow_filter::kept::{KeptStore, resume};
use nbdkit_cow_filter::overlay::{Overlay, State, Zeroing};
use nbdkit_cow_filter::qcow2::header::{Header, Mtime};
use nbdkit_cow_filter::qcow2::home;
use nbdkit_cow_filter::qcow2::image::Image;
use nbdkit_cow_filter::qcow2::layout::{GuestCluster, Layout};

use crate::allocations::peak;
use crate::memory::{MemoryFile, PAGE, Sparse};
use crate::model::{FormulaBase, Model, spec_bytes};
use crate::qemu::Qemu;
use crate::script::{Edit, How, Part, Place, Script, Step};
use crate::spec::{Found, Qcow2};

/// Images with larger tables take too long to look at, here; the filter bears them.
const MAX_TABLES: u64 = 8 << 20;

/// L1 table and refcount table are no longer, together.
const MAX_POINTERS: u64 = 40 << 20;

/// How many clusters are looked at, of those that something is said of.
const MAX_CLUSTERS: usize = 64;

type Disk = Overlay<KeptStore<MemoryFile>>;

pub struct Session {
    file: MemoryFile,
    can_zero_range: bool,
    /// That of the image as it was made, which edits find their places by.
    layout: Layout,
    /// Whether an edit may have broken the image since it was accepted last.
    is_edited: bool,
    /// `None` while no overlay uses the file.
    served: Option<Served>,
}

struct Served {
    disk: Disk,
    base: FormulaBase,
    model: Model,
}

fn header(layout: Layout) -> Header {
    let mtime = Mtime {
        seconds: 1,
        nanoseconds: 2,
    };
    Header::new(layout, b"disk.img".to_vec(), Some(mtime))
}

fn layout(size: u64, block: u64) -> Result<Layout> {
    Layout::new(size, BlockSize::new(block).expect("a power of two"))
}

fn path() -> &'static Path {
    Path::new("diff.qcow2")
}

impl Session {
    pub fn new(script: &Script) -> Self {
        let file = MemoryFile::new(script.can_punch);
        let layout = layout(script.size, script.block).expect("not too large");
        Image::create(file.clone(), path(), &header(layout)).expect("a new image");
        Session {
            file,
            can_zero_range: script.can_zero_range,
            layout,
            is_edited: false,
            served: None,
        }
    }

    /// `false`: the image was refused, or is not worth the time.
    pub fn step(&mut self, step: &Step) -> bool {
        match step {
            Step::Edit(edit) => {
                self.end();
                self.edit(edit);
                return true;
            }
            Step::Reopen => self.end(),
            Step::Kill => self.kill(),
            _ => {}
        }
        if self.served.is_none() {
            self.served = self.open();
        }
        match &mut self.served {
            Some(served) => {
                served.request(step, self.can_zero_range);
                true
            }
            None => false,
        }
    }

    /// A clean end, and a look at what it leaves.
    pub fn end(&mut self) {
        let Some(Served { disk, model, .. }) = self.served.take() else {
            return;
        };
        disk.flush().expect("a good flush");
        drop(disk);
        let file = self.file.sparse();
        let image = Qcow2::open(&file);
        image.check(false);
        for block in model.changed() {
            let range = model.bytes_of(block);
            assert!(
                spec_bytes(&file, &image, range) == model.read(range),
                "block {block} after a flush"
            );
        }
    }

    /// An end without a flush: what was flushed before, or never changed, is as it was.
    fn kill(&mut self) {
        let Some(Served { disk, model, .. }) = self.served.take() else {
            return;
        };
        drop(disk);
        let file = self.file.sparse();
        let image = Qcow2::open(&file);
        image.check(true);
        for cluster in image.touched(MAX_CLUSTERS) {
            for block in blocks_of(cluster, &model).filter(|block| !model.is_changed(*block)) {
                for range in model.samples(block) {
                    assert!(
                        spec_bytes(&file, &image, range) == model.read(range),
                        "block {block} after a kill"
                    );
                }
            }
        }
    }

    /// As the filter opens an image. `None` if it was refused.
    fn open(&mut self) -> Option<Served> {
        let resumed = match self.resume() {
            Err(_) if self.bring_home()? => self.resume(),
            resumed => resumed,
        };
        let (disk, header) = resumed.expect("what was brought home is opened")?;
        self.is_edited = false;
        self.layout = header.layout;
        let (size, block) = (
            header.layout.disk_size(),
            header.layout.block_size().bytes(),
        );
        assert_eq!((disk.size(), disk.block_size().bytes()), (size, block));
        let served = Served {
            disk,
            base: FormulaBase { size },
            model: Model::new(self.file.sparse().clone(), size, block),
        };
        let file = self.file.sparse().clone();
        let image = Qcow2::open(&file);
        image.check(true);
        assert_eq!(image.size, size.next_multiple_of(512));
        assert_eq!(image.block(), block);
        assert_eq!(image.backing(), header.backing);
        served.compare_states(&image);
        Some(served)
    }

    /// Opens an image in which all is at home. `Ok(None)`: it is not worth the time.
    fn resume(&self) -> Result<Option<(Disk, Header)>> {
        let before = self.file.sparse().changes;
        let (opened, taken) = peak(|| Image::open(self.file.clone(), path()));
        // The header's bytes, one chunk of a table, what an image is made of.
        assert!(
            taken < (1 << 20) + (64 << 10),
            "{taken} bytes for the header"
        );
        let resumed = opened.and_then(|(image, header)| {
            let layout = header.layout;
            if layout.data > MAX_TABLES {
                return Ok(None);
            }
            let (resumed, taken) = peak(|| resume(image, self.can_zero_range));
            let pages = self
                .file
                .sparse()
                .pages_in(layout.refcount_blocks..layout.data);
            // Chunks of two tables; and of the block map a leaf and the nodes above
            // it for each KiB of a table in which there is something.
            let justified = (2 << 20) + pages * 8 * PAGE as usize;
            assert!(
                taken < justified,
                "{taken} bytes for {pages} pages of tables"
            );
            resumed.map(|disk| Some((disk, header)))
        });
        assert_eq!(self.file.sparse().changes, before, "opening it writes");
        if let Err(e) = &resumed {
            assert_eq!(e.errno(), libc::EINVAL, "{e}");
        }
        resumed
    }

    /// Brings home what is elsewhere. `None`: it is refused, or not worth the time.
    fn bring_home(&self) -> Option<bool> {
        let before = self.file.sparse().clone();
        let (survey, taken) = peak(|| home::survey(&self.file, path()));
        // What is said of a cluster of the file takes no more than that, and the tables
        // of pointers have to lie in it, where there may be holes.
        let pointers = before.len.min(MAX_POINTERS) as usize;
        let pages = before.pages_in(0..before.len);
        let justified = (3 << 20) + 3 * pointers + pages * 8 * PAGE as usize;
        assert!(taken < justified, "{taken} bytes for {pages} pages");
        let survey = match survey {
            Ok(survey) if survey.header().layout.data > MAX_TABLES => return None,
            Ok(survey) => survey,
            Err(e) => {
                let changes = self.file.sparse().changes;
                assert_eq!(changes, before.changes, "what is refused is changed");
                assert!([libc::EINVAL, libc::EFBIG].contains(&e.errno()), "{e}");
                assert!(self.is_edited, "what only QEMU has changed is refused: {e}");
                return None;
            }
        };
        self.file.sparse().may_grow = true;
        let (ended, taken) = peak(|| survey.bring_home(&mut |_| {}));
        assert!(taken < justified, "{taken} bytes for {pages} pages");
        self.file.sparse().may_grow = false;
        ended.expect("it can be brought home");
        expect_same(&before, &self.file.sparse());
        Some(true)
    }

    fn edit(&mut self, edit: &Edit) {
        if let Edit::Qemu(change) = edit {
            let mut file = self.file.sparse();
            let mut changed = file.clone();
            let done = Qemu::open(&mut changed).and_then(|mut qemu| qemu.change(*change));
            if done.is_some() {
                *file = changed;
            }
            return;
        }
        self.is_edited = true;
        let mut file = self.file.sparse();
        match *edit {
            Edit::Number {
                part,
                at,
                width,
                how,
                value,
            } => {
                let (start, len) = extent(self.layout, part);
                let at = start + at % len;
                let mut number = [0; 8];
                file.read(&mut number[..usize::from(width)], at);
                let old = u64::from_be_bytes(number) >> (64 - 8 * u32::from(width));
                let new = match how {
                    How::Set => value,
                    How::Xor => old ^ value,
                    How::Add => old.wrapping_add(value),
                };
                file.write(&new.to_be_bytes()[8 - usize::from(width)..], at);
            }
            Edit::Entry { cluster, bitmap } => {
                let clusters = self.layout.guest_clusters();
                if clusters == 0 {
                    return;
                }
                let cluster = GuestCluster(cluster % clusters);
                // (A block that is said to be both is made *data*.)
                let bitmap = bitmap & !(bitmap << 32);
                let has_data = bitmap as u32 != 0;
                let descriptor = match has_data {
                    true => self.layout.descriptor(cluster),
                    false => 0,
                };
                let entry = [descriptor.to_be_bytes(), bitmap.to_be_bytes()].concat();
                file.write(&entry, self.layout.entry_at(cluster));
                let refcount = u16::from(has_data).to_be_bytes();
                file.write(&refcount, self.layout.refcount_at(cluster));
            }
            Edit::Header {
                block,
                size,
                also_length,
            } => {
                if let Ok(layout) = layout(size, block) {
                    file.write(&header(layout).to_bytes(), 0);
                    if also_length {
                        file.set_len(layout.end);
                    }
                }
            }
            Edit::Qemu(_) => unreachable!("done above"),
            Edit::Length { len } => file.set_len(len.min(i64::MAX as u64)),
        }
    }
}

/// Where a part of the file begins, and how long it is: one byte at least.
fn extent(layout: Layout, part: Part) -> (u64, u64) {
    let (start, end) = match part {
        Part::Header => (0, 512),
        Part::RefcountTable => (layout.refcount_table, layout.refcount_blocks),
        Part::RefcountBlocks => (layout.refcount_blocks, layout.l1),
        Part::L1 => (layout.l1, layout.l2),
        Part::L2 => (layout.l2, layout.data),
        Part::Data => (layout.data, layout.end),
    };
    (start, (end - start).max(1))
}

/// The disk in a file was not changed by bringing it home.
fn expect_same(before: &Sparse, after: &Sparse) {
    let (old, new) = (Qcow2::open_foreign(before), Qcow2::open(after));
    old.check(true);
    new.check(false);
    assert_eq!((old.size, old.block()), (new.size, new.block()));
    let model = Model::new(before.clone(), old.size, old.block());
    let mut looked_at = old.touched(MAX_CLUSTERS);
    looked_at.extend(new.touched(MAX_CLUSTERS));
    for block in looked_at.into_iter().flat_map(|n| blocks_of(n, &model)) {
        for range in model.samples(block) {
            let bytes = spec_bytes(before, &old, range);
            assert!(bytes == spec_bytes(after, &new, range), "block {block}");
        }
        let kind = |image: &Qcow2| match image.lookup(block * image.block()) {
            Found::Data(_) => Found::Data(0),
            found => found,
        };
        assert_eq!(kind(&old), kind(&new), "block {block}");
    }
}

/// The blocks of a cluster that the disk has.
fn blocks_of(cluster: u64, model: &Model) -> impl Iterator<Item = u64> + use<> {
    let blocks = model.size.div_ceil(model.block);
    32 * cluster..blocks.min(32 * (cluster + 1))
}

impl Served {
    /// Each block is in the state that the image says, and reads so.
    fn compare_states(&self, image: &Qcow2) {
        let clusters = self.model.size.div_ceil(32 * self.model.block);
        let mut looked_at = image.touched(MAX_CLUSTERS);
        looked_at.extend([0, clusters / 2, clusters.saturating_sub(1)]);
        for cluster in looked_at {
            for block in blocks_of(cluster, &self.model) {
                let at = block * self.model.block;
                let expected = match image.lookup(at) {
                    Found::Base => State::Base,
                    Found::Zero => State::Zero,
                    Found::Data(_) => State::Data,
                };
                let found = self.disk.state_at(at).expect("in range");
                assert_eq!(found, expected, "block {block}");
                for range in self.model.samples(block) {
                    self.expect_read(range, false);
                }
            }
        }
    }

    fn expect_read(&self, range: ByteRange, copy: bool) {
        let mut buf = vec![0xee; range.len() as usize];
        self.disk
            .read(&self.base, &mut buf, range.start, copy)
            .expect("a good read");
        assert!(buf == self.model.read(range), "read of {range:?}");
    }

    fn fit(&self, place: Place) -> ByteRange {
        let (start, len) = place.fit_buffer(self.model.size, self.model.block);
        ByteRange {
            start,
            end: start + len,
        }
    }

    fn request(&mut self, step: &Step, can_zero_range: bool) {
        let (disk, base) = (&self.disk, &self.base);
        match *step {
            Step::Read { place, copy } => self.expect_read(self.fit(place), copy),
            Step::Write { place, seed } => {
                let range = self.fit(place);
                let bytes = written(seed, range);
                disk.write(base, &bytes, range.start).expect("a good write");
                self.model.write(&bytes, range.start);
            }
            Step::Zero { place, how } => {
                let (start, len) = place.fit(self.model.size, self.model.block);
                let keeps = matches!(
                    how,
                    Zeroing::Zero {
                        may_trim: false,
                        ..
                    }
                );
                let is_fast = matches!(how, Zeroing::Zero { fast: true, .. });
                // Space that is kept may have to be written.
                let len = if keeps { len.min(256 << 10) } else { len };
                let end = start + len;
                let mut zeroed = Vec::new();
                let pieces = disk
                    .block_size()
                    .pieces(ByteRange { start, end }, disk.size());
                for piece in pieces {
                    match piece {
                        Piece::Partial { bytes, .. } if how == Zeroing::Trim => {
                            // Of a block of the base it stays.
                            let state = disk.state_at(bytes.start).expect("in range");
                            zeroed.extend((state != State::Base).then_some(bytes));
                        }
                        Piece::Partial { bytes, .. } | Piece::Whole { bytes, .. } => {
                            zeroed.push(bytes);
                        }
                    }
                }
                match disk.zero(base, start, len, how) {
                    Ok(()) => zeroed.into_iter().for_each(|part| self.model.zero(part)),
                    Err(e) => assert!(keeps && is_fast && !can_zero_range, "{e}"),
                }
            }
            Step::Cache { place, copy } => {
                let range = self.fit(place);
                disk.cache(base, range.start, range.len(), copy)
                    .expect("a good cache");
            }
            Step::Extents { place } => self.expect_extents(self.fit(place)),
            Step::Flush => disk.flush().expect("a good flush"),
            Step::Reopen | Step::Kill | Step::Edit(_) => {}
        }
    }

    fn expect_extents(&self, range: ByteRange) {
        let extents = self
            .disk
            .extents(&self.base, range.start, range.len(), false)
            .expect("good extents");
        let mut at = range.start;
        for extent in extents {
            assert_eq!(extent.bytes.start, at, "no gaps");
            assert!(!extent.bytes.is_empty());
            at = extent.bytes.end;
            if extent.allocation.zero {
                assert!(is_zero(&self.model.read(extent.bytes)), "{extent:?}");
            }
        }
        assert_eq!(at, range.end);
    }
}

/// What a write writes: with an odd seed some blocks of zeroes among others, with
/// the seed 0 zeroes alone.
fn written(seed: u8, range: ByteRange) -> Vec<u8> {
    let masks = match seed {
        0 => [0, 0],
        _ if seed & 1 != 0 => [255, 0],
        _ => [255, 255],
    };
    (range.start..range.end)
        .map(|at| (seed.wrapping_add((at >> 3) as u8) | 1) & masks[((at >> 12) & 1) as usize])
        .collect()
}
