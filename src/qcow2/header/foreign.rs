//! The header of an image that another program may have written to.

use super::super::layout::{Layout, SECTOR, be_u32, be_u64};
use super::extension::{OURS, disk_size, is_ours};
use super::{
    BACKING_FORMAT, END_OF_EXTENSIONS, EXTENDED_L2, FORMAT_OF_BASE, HEADER_LEN, Header, MAGIC,
    MAX_BACKING_NAME, REFCOUNT_ORDER, VERSION, refcount_table_clusters, refused,
};
use crate::block::BlockSize;
use crate::error::Result;

/// Incompatible feature bits.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
/// A compatible feature bit.
const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear feature bits.
const BITMAPS_VALID: u64 = 1 << 0;
const RAW_EXTERNAL: u64 = 1 << 1;
const MAX_REFCOUNT_ORDER: u32 = 6;
/// Header extensions that this filter can't go on with.
const FULL_DISK_ENCRYPTION: u32 = 0x0537_be77;
const BITMAPS: u32 = 0x2385_2875;
const EXTERNAL_DATA_NAME: u32 = 0x4441_5441;

/// What helps where nothing less does. (It gives the image another backing file.)
pub const NEW_IMAGE: &str = "what is in a copy of it (IMAGE) can be written to a new image, if its \
     backing file (BASE) is raw and has its size, with nbdkit -U - --filter=cow file BASE cow-overlay=NEW --run \
     'qemu-img rebase -u -F raw -b \"$uri\" IMAGE && qemu-img commit -d IMAGE'";
const REMOVE_BITMAPS: &str = "remove them with qemu-img bitmap --remove";

/// Where the tables lie that are found by the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tables {
    /// How many entries the L1 table has.
    pub l1_size: u64,
    pub l1: u64,
    pub refcount_table: u64,
    pub refcount_table_clusters: u64,
    /// A refcount has two to the power of this many bits.
    pub refcount_order: u32,
}

impl Tables {
    pub fn at_home(layout: Layout) -> Self {
        Tables {
            l1_size: layout.l2_tables(),
            l1: layout.l1,
            refcount_table: layout.refcount_table,
            refcount_table_clusters: refcount_table_clusters(layout),
            refcount_order: REFCOUNT_ORDER,
        }
    }

    /// Changes the first sector of an image, so that it leads to these tables, which are
    /// right and are kept up at once: no feature says otherwise any more.
    pub fn put_into(self, sector: &mut [u8]) {
        let to_u32 = |n: u64| u32::try_from(n).expect("bounded by the layout");
        sector[36..40].copy_from_slice(&to_u32(self.l1_size).to_be_bytes());
        sector[40..48].copy_from_slice(&self.l1.to_be_bytes());
        sector[48..56].copy_from_slice(&self.refcount_table.to_be_bytes());
        let clusters = to_u32(self.refcount_table_clusters);
        sector[56..60].copy_from_slice(&clusters.to_be_bytes());
        sector[72..80].copy_from_slice(&EXTENDED_L2.to_be_bytes());
        sector[80..96].fill(0);
        sector[96..100].copy_from_slice(&self.refcount_order.to_be_bytes());
    }
}

/// The header of an image of ours that another program may have written to since.
#[derive(Debug)]
pub struct Foreign {
    pub header: Header,
    pub tables: Tables,
    /// The program was not ended well: the refcounts may be wrong.
    pub is_dirty: bool,
    /// It has other features that only QEMU keeps up, and that can be taken from it.
    pub has_features: bool,
}

impl Foreign {
    /// As [`Header::from_bytes`]; the tables may lie anywhere.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        if bytes.len() < HEADER_LEN as usize || be_u32(bytes, 0) != MAGIC {
            return Err(refused("it is no qcow2 image"));
        }
        if be_u32(bytes, 32) != 0 {
            return Err(refused(
                "it is encrypted, which this filter can't do (byte 32 of the header)",
            ));
        }
        let version = be_u32(bytes, 4);
        if version != VERSION {
            return Err(refused(format!(
                "version (byte 4 of the header) is {version}, not {VERSION}: {}",
                new_image(bytes)
            )));
        }
        check_features(bytes)?;
        if be_u32(bytes, 60) != 0 {
            return Err(refused(
                "it has internal snapshots (byte 60 of the header): \
                 delete them with qemu-img snapshot -d",
            ));
        }
        field("snapshots_offset", 64, be_u64(bytes, 64), 0)?;
        let refcount_order = be_u32(bytes, 96);
        if refcount_order > MAX_REFCOUNT_ORDER {
            return Err(refused(format!(
                "refcount_order (byte 96 of the header) is {refcount_order}, \
                 but can be {MAX_REFCOUNT_ORDER} at most"
            )));
        }
        field(
            "header_length",
            100,
            be_u32(bytes, 100).into(),
            HEADER_LEN.into(),
        )?;
        field("compression_type", 104, be_u64(bytes, 104), 0)?;

        let cluster_bits = be_u32(bytes, 20);
        if !(14..=21).contains(&cluster_bits) {
            return Err(refused(format!(
                "cluster_bits (byte 20 of the header) is {cluster_bits}, \
                 but an image with extended L2 entries has 14 to 21"
            )));
        }
        let block_size = BlockSize::new(1 << (cluster_bits - 5)).expect("512 to 64K");

        let (name_at, name_len) = (be_u64(bytes, 8), be_u32(bytes, 16) as usize);
        let backing = usize::try_from(name_at)
            .ok()
            .filter(|at| *at >= HEADER_LEN as usize && name_len > 0 && name_len <= MAX_BACKING_NAME)
            .and_then(|at| bytes.get(at..at.checked_add(name_len)?))
            .ok_or_else(|| {
                refused(format!(
                    "it has no backing file name where its header says \
                     ({name_len} bytes at {name_at:#x}; bytes 8 and 16 of the header): \
                     if it was taken away, give it again with qemu-img rebase -u -F raw -b NAME"
                ))
            })?;
        let (ours, ours_at) = extensions(&bytes[..name_at as usize])?;
        let disk_size = disk_size(ours);

        let size = be_u64(bytes, 24);
        // The sum can't overflow: a multiple of a power of two that is no larger.
        let virtual_size = disk_size.checked_next_multiple_of(SECTOR);
        if virtual_size != Some(size) {
            let shrink = if virtual_size < Some(size) {
                "--shrink "
            } else {
                ""
            };
            return Err(refused(format!(
                "size (byte 24 of the header) is {size}, but it was made for a disk \
                 of {disk_size} bytes: if it was resized, give it back its size with \
                 qemu-img resize {shrink}IMAGE {}",
                virtual_size.unwrap_or(disk_size)
            )));
        }
        let layout = Layout::new(disk_size, block_size).map_err(refused)?;
        Ok(Foreign {
            header: Header::with_ours(layout, backing.to_vec(), ours, ours_at)?,
            tables: Tables {
                l1_size: be_u32(bytes, 36).into(),
                l1: be_u64(bytes, 40),
                refcount_table: be_u64(bytes, 48),
                refcount_table_clusters: be_u32(bytes, 56).into(),
                refcount_order,
            },
            is_dirty: be_u64(bytes, 72) & DIRTY != 0,
            has_features: be_u64(bytes, 80) != 0 || be_u64(bytes, 88) != 0,
        })
    }

    pub(super) fn expect_at_home(&self, bytes: &[u8]) -> Result<()> {
        if self.is_dirty {
            return Err(refused(
                "it was not closed by the program that wrote to it \
                 (incompatible_features, byte 72 of the header)",
            ));
        }
        field("compatible_features", 80, be_u64(bytes, 80), 0)?;
        field("autoclear_features", 88, be_u64(bytes, 88), 0)?;
        let (found, home) = (self.tables, Tables::at_home(self.header.layout));
        let order = |tables: Tables| u64::from(tables.refcount_order);
        field("l1_size", 36, found.l1_size, home.l1_size)?;
        field("l1_table_offset", 40, found.l1, home.l1)?;
        field(
            "refcount_table_offset",
            48,
            found.refcount_table,
            home.refcount_table,
        )?;
        field(
            "refcount_table_clusters",
            56,
            found.refcount_table_clusters,
            home.refcount_table_clusters,
        )?;
        field("refcount_order", 96, order(found), order(home))
    }
}

fn field(name: &str, at: usize, found: u64, wanted: u64) -> Result<()> {
    if found == wanted {
        return Ok(());
    }
    Err(refused(format!(
        "it is not laid out as this filter lays out its own images: \
         {name} (byte {at} of the header) is {found:#x}, not {wanted:#x}"
    )))
}

/// What helps with an image that this filter has not made.
fn new_image(bytes: &[u8]) -> &'static str {
    match be_u32(bytes, 16) {
        0 => {
            "it has no backing file: qemu-img convert -O raw IMAGE DISK makes a disk of it, \
             which can be served"
        }
        _ => NEW_IMAGE,
    }
}

/// Refuses what this filter can't go on with, wherever it lies.
fn check_features(bytes: &[u8]) -> Result<()> {
    let incompatible = be_u64(bytes, 72);
    for (bit, what) in [
        (
            CORRUPT,
            "it is marked as corrupt: run qemu-img check -r all".to_string(),
        ),
        (
            EXTERNAL_DATA,
            format!("its data is in another file: {NEW_IMAGE}"),
        ),
        (COMPRESSION, format!("it is compressed: {NEW_IMAGE}")),
    ] {
        if incompatible & bit != 0 {
            return Err(refused(format!(
                "{what} (incompatible_features, byte 72 of the header, is {incompatible:#x})"
            )));
        }
    }
    if incompatible & !DIRTY != EXTENDED_L2 {
        return Err(refused(format!(
            "it is not laid out as this filter lays out its own images: incompatible_features \
             (byte 72 of the header) is {incompatible:#x}, not {EXTENDED_L2:#x}, extended L2 \
             entries: {}",
            new_image(bytes)
        )));
    }
    let (compatible, autoclear) = (be_u64(bytes, 80), be_u64(bytes, 88));
    if compatible & !LAZY_REFCOUNTS != 0 {
        return Err(refused(format!(
            "it has features that this filter does not know: \
             compatible_features (byte 80 of the header) is {compatible:#x}"
        )));
    }
    if autoclear & (BITMAPS_VALID | RAW_EXTERNAL) != 0 {
        return Err(refused(format!(
            "it has features that this filter does not keep up: autoclear_features (byte 88 of \
             the header) is {autoclear:#x}: {REMOVE_BITMAPS}"
        )));
    }
    Ok(())
}

/// The data of our extension and where it lies; the extensions end where `bytes` do at
/// the latest.
fn extensions(bytes: &[u8]) -> Result<(&[u8], usize)> {
    let mut at = HEADER_LEN as usize;
    let mut format = None;
    let mut ours = None;
    while at + 8 <= bytes.len() {
        let (kind, len) = (be_u32(bytes, at), be_u32(bytes, at + 4) as usize);
        let Some(data) = bytes[at + 8..].get(..len) else {
            return Err(refused(format!(
                "the header extension at byte {at} is longer than the space for it"
            )));
        };
        match kind {
            END_OF_EXTENSIONS => break,
            BACKING_FORMAT => format = Some(data),
            OURS => ours = Some((data, at + 8)),
            BITMAPS => {
                return Err(refused(format!(
                    "it has bitmaps, which this filter does not keep up (a header extension at \
                     byte {at}): {REMOVE_BITMAPS}"
                )));
            }
            FULL_DISK_ENCRYPTION | EXTERNAL_DATA_NAME => {
                return Err(refused(format!(
                    "it has features that this filter does not keep up (encryption, external \
                     data): there is a header extension {kind:#x} at byte {at}"
                )));
            }
            // The names of feature bits, and whatever else may safely be ignored.
            _ => {}
        }
        at += 8 + len.next_multiple_of(8);
    }
    let Some(ours) = ours.filter(|(data, _)| is_ours(data)) else {
        return Err(refused(format!(
            "it was not made by this filter: the header extension \"nbco\" is missing: {}",
            new_image(bytes)
        )));
    };
    if format != Some(FORMAT_OF_BASE) {
        return Err(refused(
            "the format of its backing file is not recorded as raw (header extension 0xe2792aca): \
             record it with qemu-img rebase -u -F raw -b NAME, where NAME is the disk",
        ));
    }
    Ok(ours)
}
