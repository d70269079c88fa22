//! The store in a qcow2 image.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::block::{BlockNum, ByteRange, parts};
use crate::error::{Error, Result};
use crate::overlay::{Overlay, Purpose, Store};
use crate::qcow2::file::ImageFile;
use crate::qcow2::image::{CLUSTERS_PER_GROUP, Image};
use crate::qcow2::layout::{BLOCKS_PER_CLUSTER, GuestCluster};

const BLOCKS_PER_GROUP: u64 = BLOCKS_PER_CLUSTER * CLUSTERS_PER_GROUP;

/// A store in a qcow2 image.
pub struct KeptStore<F> {
    image: Image<F>,
    can_zero_range: bool,
}

impl<F: ImageFile> KeptStore<F> {
    pub fn new(image: Image<F>, can_zero_range: bool) -> Self {
        KeptStore {
            image,
            can_zero_range,
        }
    }

    pub fn image(&self) -> &Image<F> {
        &self.image
    }

    /// `range` in the file; it lies within the disk.
    fn host(&self, offset: u64, len: u64) -> Result<u64> {
        let layout = self.image.layout();
        ByteRange::checked(offset, len, layout.disk_size())?;
        Ok(layout.data + offset)
    }

    /// For a system call that writes; `offset` is one of the disk.
    fn write_failed(&self, source: io::Error, operation: &str, offset: u64, len: u64) -> Error {
        let at = self.image.layout().data + offset;
        self.image
            .name()
            .write_failed_at(source, operation, at, len)
    }
}

impl<F: ImageFile> Store for KeptStore<F> {
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let len = buf.len() as u64;
        self.image
            .file()
            .read_at(buf, self.host(offset, len)?)
            .map_err(|e| {
                let at = self.image.layout().data + offset;
                self.image.name().failed_at(e, "reading", at, len)
            })
    }

    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        let len = buf.len() as u64;
        self.image
            .changing()?
            .write_at(buf, self.host(offset, len)?)
            .map_err(|e| self.write_failed(e, "writing to", offset, len))
    }

    fn punch(&self, range: ByteRange) -> Result<bool> {
        self.image
            .changing()?
            .punch(self.host(range.start, range.len())?, range.len())
            .map_err(|e| self.write_failed(e, "punching a hole in", range.start, range.len()))
    }

    fn zero_range(&self, range: ByteRange) -> Result<bool> {
        if !self.can_zero_range {
            return Ok(false);
        }
        self.image
            .changing()?
            .zero_range(self.host(range.start, range.len())?, range.len())
            .map_err(|e| self.write_failed(e, "zeroing", range.start, range.len()))
    }

    fn can_zero_range(&self) -> bool {
        self.can_zero_range
    }

    fn next_stored(&self, offset: u64) -> Option<u64> {
        let data = self.image.layout().data;
        let found = self.image.file().next_stored(data + offset)?;
        Some(found.saturating_sub(data))
    }

    fn reserve(&self, blocks: &Range<BlockNum>, purpose: Purpose) -> Result<()> {
        self.image.reserve(clusters_of(blocks), purpose)
    }

    fn publish(
        &self,
        blocks: &Range<BlockNum>,
        change: impl Fn(&Range<BlockNum>) -> Result<bool>,
    ) -> Result<()> {
        for part in parts(blocks.clone(), |start| self.publish_end(start)) {
            self.image.publish(clusters_of(&part), || change(&part))?;
        }
        Ok(())
    }

    fn publish_end(&self, block: BlockNum) -> BlockNum {
        BlockNum((block.0 / BLOCKS_PER_GROUP + 1) * BLOCKS_PER_GROUP)
    }

    fn flush(&self, word: &dyn Fn(u64) -> u64) -> Result<()> {
        self.image.flush(&|cluster: GuestCluster| word(cluster.0))
    }

    fn flushes(&self) -> (u64, u64) {
        self.image.flushes()
    }
}

/// The clusters that have blocks of `blocks`.
fn clusters_of(blocks: &Range<BlockNum>) -> Range<GuestCluster> {
    GuestCluster(blocks.start.0 / BLOCKS_PER_CLUSTER)
        ..GuestCluster(blocks.end.0.div_ceil(BLOCKS_PER_CLUSTER))
}

/// The overlay that an image holds, within the limit of the image. The errors are those of [`Image::load`].
pub fn resume<F: ImageFile>(
    image: Image<F>,
    can_zero_range: bool,
) -> Result<Overlay<KeptStore<F>>> {
    let layout = image.layout();
    let account = image.account().map(Arc::clone);
    let store = KeptStore::new(image, can_zero_range);
    let overlay = Overlay::resume(
        layout.disk_size(),
        layout.block_size(),
        store,
        |store, map| {
            store
                .image
                .load(|group, words| map.load(group * CLUSTERS_PER_GROUP, words))
        },
    )?;
    Ok(overlay.limited(account))
}
