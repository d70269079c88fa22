//! The header cluster: header, header extensions, backing file name.
//!
//! Reading trusts nothing. [`Header`] is what this filter has written itself, or QEMU has
//! when it filled or rebased the image: the tables lie where [`Layout`] has them. [`Foreign`] is
//! one of an image whose tables QEMU may have moved. All else is refused with the name of
//! the field, where it is, and what to do.

use std::ops::Range;

use super::layout::{Layout, SECTOR, be_u32, be_u64};
use crate::block::BlockSize;
use crate::error::{Error, Result};

const MAGIC: u32 = 0x5146_49fb;
const VERSION: u32 = 3;
const HEADER_LEN: u32 = 112;
/// Incompatible feature bits.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
/// A compatible feature bit.
const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear feature bits.
const BITMAPS_VALID: u64 = 1 << 0;
const RAW_EXTERNAL: u64 = 1 << 1;
const REFCOUNT_ORDER: u32 = 4;
const MAX_REFCOUNT_ORDER: u32 = 6;
/// QEMU reads no longer ones.
pub const MAX_BACKING_NAME: usize = 1023;

/// Header extensions, section "Header extensions" of the specification.
const END_OF_EXTENSIONS: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FULL_DISK_ENCRYPTION: u32 = 0x0537_be77;
const BITMAPS: u32 = 0x2385_2875;
const EXTERNAL_DATA_NAME: u32 = 0x4441_5441;
/// Ours, "nbco": programs skip the extensions that they do not know. 296 bytes:
///
/// | byte | length | what |
/// |---|---|---|
/// | 0 | 8 | the disk's exact size; `size` in the header is rounded up to a sector |
/// | 8 | 8 | the base's modification time, seconds; signed |
/// | 16 | 4 | its nanoseconds |
/// | 20 | 4 | 1 if the time is known, else 0 |
/// | 24 | 8 | which export it keeps: [`hash`] of its name, 0 while nothing was written |
/// | 32 | 4 | 1 from before the first change of a run to its clean end, else 0 |
/// | 36 | 4 | how many samples of the base follow: 0 to 16 |
/// | 40 | 16 each | [`Sample`]: its offset on the disk, and the [`hash`] of its bytes |
///
/// Images of version 1.0 have the first 32 bytes only.
const OURS: u32 = 0x6e62_636f;
const OURS_LEN: usize = 40 + SAMPLE_LEN * MAX_SAMPLES;
const FIRST_OURS_LEN: usize = 32;
/// In the data of ours.
const MTIME: usize = 8;
const EXPORT: usize = 24;
const IN_USE: usize = 32;
const SAMPLE_COUNT: usize = 36;
const SAMPLES: usize = 40;
const SAMPLE_LEN: usize = 16;
/// The most samples that a header has.
pub const MAX_SAMPLES: usize = 16;
/// Where the data of ours lies in the header of a new image.
const NEW_OURS_AT: u64 = HEADER_LEN as u64 + 16 + 8;

const FORMAT_OF_BASE: &[u8] = b"raw";

/// What helps where nothing less does. (It gives the image another backing file.)
pub const NEW_IMAGE: &str = "what is in a copy of it (IMAGE) can be written to a new image with \
     nbdkit -U - --filter=cow file BASE cow-overlay=NEW --run \
     'qemu-img rebase -u -F raw -b \"$uri\" IMAGE && qemu-img commit -d IMAGE'";
const REMOVE_BITMAPS: &str = "remove them with qemu-img bitmap --remove";

/// A modification time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mtime {
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// What the header cluster says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub layout: Layout,
    /// As recorded: absolute, or relative to the image's directory, or a URI.
    pub backing: Vec<u8>,
    /// That of the base when the image was made, where it has one.
    pub mtime: Option<Mtime>,
    /// The hash of the export's name; 0 if it is not known yet.
    pub export: u64,
    /// Where that lies in the file: eight bytes within a sector, which can be changed
    /// without touching anything else.
    pub export_at: u64,
    /// Whether the last run that changed the image came to a clean end. `None`: an image
    /// of version 1.0, which does not say.
    pub in_use: Option<InUse>,
    /// What the base has at some places. Empty: not recorded.
    pub samples: Vec<Sample>,
}

/// The mark of a run that changes the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InUse {
    /// The last such run has not come to a clean end.
    pub is_set: bool,
    /// Where the mark lies in the file: four bytes within a sector, a number that is 0
    /// or 1.
    pub at: u64,
}

/// A few bytes of the base, by which it is known again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Where on the disk they begin.
    pub offset: u64,
    /// Their [`hash`].
    pub hash: u64,
}

/// FNV-1a, 64 bits, which is the same for ever, as what is in a file has to be.
pub fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

fn refused(what: impl std::fmt::Display) -> Error {
    Error::new(libc::EINVAL, what.to_string())
}

impl Header {
    /// That of an image in which nothing was written yet.
    pub fn new(layout: Layout, backing: Vec<u8>, mtime: Option<Mtime>) -> Self {
        Header {
            layout,
            backing,
            mtime,
            export: 0,
            export_at: NEW_OURS_AT + EXPORT as u64,
            in_use: Some(InUse {
                is_set: false,
                at: NEW_OURS_AT + IN_USE as u64,
            }),
            samples: Vec::new(),
        }
    }

    /// Where the file has the base's modification time and the samples, and what is to be
    /// there. None in an image of version 1.0, which has no room for samples.
    pub fn fingerprint(&self) -> Vec<(u64, Vec<u8>)> {
        let bytes = self.ours();
        let ours_at = self.export_at - EXPORT as u64;
        let parts = [MTIME..EXPORT, SAMPLE_COUNT..OURS_LEN];
        let part = |part: Range<usize>| (ours_at + part.start as u64, bytes[part].to_vec());
        match self.in_use {
            Some(_) => parts.map(part).into(),
            None => Vec::new(),
        }
    }

    /// All bytes up to the end of the backing file name.
    pub fn to_bytes(&self) -> Vec<u8> {
        let layout = self.layout;
        let mut extensions = Vec::new();
        extend(&mut extensions, BACKING_FORMAT, FORMAT_OF_BASE);
        extend(&mut extensions, OURS, &self.ours());
        extend(&mut extensions, END_OF_EXTENSIONS, &[]);
        let backing_at = u64::from(HEADER_LEN) + extensions.len() as u64;

        let mut bytes = Vec::new();
        let u32 = |bytes: &mut Vec<u8>, n: u32| bytes.extend(n.to_be_bytes());
        let u64 = |bytes: &mut Vec<u8>, n: u64| bytes.extend(n.to_be_bytes());
        let to_u32 = |n: u64| u32::try_from(n).expect("bounded by the layout");
        u32(&mut bytes, MAGIC);
        u32(&mut bytes, VERSION);
        u64(&mut bytes, backing_at);
        u32(&mut bytes, to_u32(self.backing.len() as u64));
        u32(&mut bytes, layout.cluster_size().trailing_zeros());
        u64(&mut bytes, layout.virtual_size());
        u32(&mut bytes, 0); // crypt_method
        u32(&mut bytes, to_u32(layout.l2_tables()));
        u64(&mut bytes, layout.l1);
        u64(&mut bytes, layout.refcount_table);
        u32(&mut bytes, to_u32(refcount_table_clusters(layout)));
        u32(&mut bytes, 0); // nb_snapshots
        u64(&mut bytes, 0); // snapshots_offset
        u64(&mut bytes, EXTENDED_L2);
        u64(&mut bytes, 0); // compatible_features
        u64(&mut bytes, 0); // autoclear_features
        u32(&mut bytes, REFCOUNT_ORDER);
        u32(&mut bytes, HEADER_LEN);
        u64(&mut bytes, 0); // compression_type and padding
        bytes.extend(extensions);
        bytes.extend(&self.backing);
        bytes
    }

    fn ours(&self) -> [u8; OURS_LEN] {
        let mut bytes = [0; OURS_LEN];
        bytes[..8].copy_from_slice(&self.layout.disk_size().to_be_bytes());
        if let Some(mtime) = self.mtime {
            bytes[8..16].copy_from_slice(&mtime.seconds.to_be_bytes());
            bytes[16..20].copy_from_slice(&mtime.nanoseconds.to_be_bytes());
            bytes[20..24].copy_from_slice(&1u32.to_be_bytes());
        }
        bytes[EXPORT..IN_USE].copy_from_slice(&self.export.to_be_bytes());
        let is_set = self.in_use.is_some_and(|in_use| in_use.is_set);
        bytes[IN_USE..SAMPLE_COUNT].copy_from_slice(&u32::from(is_set).to_be_bytes());
        let count = self.samples.len() as u32;
        bytes[SAMPLE_COUNT..SAMPLES].copy_from_slice(&count.to_be_bytes());
        let places = bytes[SAMPLES..].chunks_exact_mut(SAMPLE_LEN);
        for (place, sample) in places.zip(&self.samples) {
            place[..8].copy_from_slice(&sample.offset.to_be_bytes());
            place[8..].copy_from_slice(&sample.hash.to_be_bytes());
        }
        bytes
    }

    /// Reads `bytes`, the first of the file: 16 KiB, the smallest cluster, unless
    /// the file is shorter. EINVAL says which field is not as it should be.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let foreign = Foreign::from_bytes(bytes)?;
        foreign.expect_at_home(bytes)?;
        Ok(foreign.header)
    }
}

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
        field("version", 4, be_u32(bytes, 4).into(), VERSION.into())?;
        check_features(bytes)?;
        if be_u32(bytes, 32) != 0 {
            return Err(refused(
                "it is encrypted, which this filter can't do (byte 32 of the header)",
            ));
        }
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
        let disk_size = be_u64(ours, 0);

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
            header: Header {
                layout,
                backing: backing.to_vec(),
                mtime: (be_u32(ours, 20) != 0).then(|| Mtime {
                    seconds: be_u64(ours, 8) as i64,
                    nanoseconds: be_u32(ours, 16),
                }),
                export: be_u64(ours, EXPORT),
                export_at: (ours_at + EXPORT) as u64,
                in_use: in_use(ours, ours_at)?,
                samples: samples(ours)?,
            },
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

    fn expect_at_home(&self, bytes: &[u8]) -> Result<()> {
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

fn refcount_table_clusters(layout: Layout) -> u64 {
    (layout.refcount_blocks - layout.refcount_table) / layout.cluster_size()
}

fn extend(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
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
             entries: {NEW_IMAGE}"
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
    let lengths = [FIRST_OURS_LEN, OURS_LEN];
    let Some(ours) = ours.filter(|(data, _)| lengths.contains(&data.len())) else {
        return Err(refused(format!(
            "it was not made by this filter: the header extension \"nbco\" is missing: {NEW_IMAGE}"
        )));
    };
    if format != Some(FORMAT_OF_BASE) {
        return Err(refused(
            "the format of its backing file is not recorded as raw (header extension 0xe2792aca): \
             record it with qemu-img rebase -u -F raw -b NAME",
        ));
    }
    Ok(ours)
}

/// The mark in the data of ours, which lies at `ours_at`.
fn in_use(ours: &[u8], ours_at: usize) -> Result<Option<InUse>> {
    if ours.len() == FIRST_OURS_LEN {
        return Ok(None);
    }
    let mark = be_u32(ours, IN_USE);
    if mark > 1 {
        return Err(refused(format!(
            "the mark of a run at byte {} is {mark:#x}, not 0 or 1",
            ours_at + IN_USE
        )));
    }
    Ok(Some(InUse {
        is_set: mark == 1,
        at: (ours_at + IN_USE) as u64,
    }))
}

fn samples(ours: &[u8]) -> Result<Vec<Sample>> {
    if ours.len() == FIRST_OURS_LEN {
        return Ok(Vec::new());
    }
    let count = be_u32(ours, SAMPLE_COUNT) as usize;
    if count > MAX_SAMPLES {
        return Err(refused(format!(
            "it is said to have {count} samples of its base, but there are at most {MAX_SAMPLES}"
        )));
    }
    let disk_size = be_u64(ours, 0);
    let places = ours[SAMPLES..].chunks_exact(SAMPLE_LEN);
    places
        .take(count)
        .map(|place| {
            let (offset, hash) = (be_u64(place, 0), be_u64(place, 8));
            if offset >= disk_size {
                return Err(refused(format!(
                    "it is said to have a sample of its base at {offset}, but the disk has \
                     {disk_size} bytes"
                )));
            }
            Ok(Sample { offset, hash })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(disk_size: u64, block: u64) -> Header {
        let block_size = BlockSize::new(block).expect("a block size");
        let mtime = Mtime {
            seconds: -5,
            nanoseconds: 7,
        };
        let layout = Layout::new(disk_size, block_size).expect("fits");
        Header::new(layout, b"disk.img".to_vec(), Some(mtime))
    }

    fn padded(header: &Header) -> Vec<u8> {
        let mut bytes = header.to_bytes();
        bytes.resize(16 << 10, 0);
        bytes
    }

    fn refusal(bytes: &[u8]) -> String {
        Header::from_bytes(bytes).expect_err("damaged").to_string()
    }

    #[test]
    fn what_was_written_is_read() {
        for size in [0, 1, 512, 1 << 30, (1 << 40) + 513] {
            for block in [512, 4096, 65536] {
                let mut header = header(size, block);
                assert_eq!(Header::from_bytes(&padded(&header)).expect("ours"), header);
                header.mtime = None;
                header.export = hash(b"a");
                header.backing = vec![b'x'; MAX_BACKING_NAME];
                header.samples = (0..size.min(MAX_SAMPLES as u64))
                    .map(|n| Sample {
                        offset: n * (size / MAX_SAMPLES as u64),
                        hash: !n,
                    })
                    .collect();
                assert_eq!(Header::from_bytes(&padded(&header)).expect("ours"), header);
            }
        }
    }

    #[test]
    fn every_field_is_checked() {
        let header = header(10 << 20, 4096);
        let good = padded(&header);
        let fields: &[(usize, usize)] = &[
            (0, 4),
            (4, 4),
            (20, 4),
            (24, 8),
            (32, 4),
            (36, 4),
            (40, 8),
            (48, 8),
            (56, 4),
            (60, 4),
            (64, 8),
            (72, 8),
            (80, 8),
            (88, 8),
            (96, 4),
            (100, 4),
            (104, 8),
        ];
        for &(at, len) in fields {
            let value = good[at..at + len]
                .iter()
                .fold(0u64, |n, b| (n << 8) | u64::from(*b));
            for bad in [
                0,
                u64::MAX >> (64 - 8 * len),
                value.wrapping_add(1),
                value.wrapping_sub(1),
            ] {
                let mut bytes = good.clone();
                bytes[at..at + len].copy_from_slice(&bad.to_be_bytes()[8 - len..]);
                if bytes != good {
                    assert!(!refusal(&bytes).is_empty(), "byte {at}");
                }
            }
        }
    }

    #[test]
    fn the_hash_of_an_export_is_where_it_is_said_to_be_and_what_it_always_was() {
        // From the published test vectors of FNV-1a.
        assert_eq!(hash(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(hash(b"a"), 0xaf63_dc4c_8601_ec8c);
        let header = header(10 << 20, 4096);
        let mut bytes = padded(&header);
        let at = header.export_at as usize;
        assert!(at % 512 <= 504, "within a sector");
        bytes[at..at + 8].copy_from_slice(&77u64.to_be_bytes());
        assert_eq!(Header::from_bytes(&bytes).expect("ours").export, 77);
    }

    #[test]
    fn the_mark_of_a_run_is_where_it_is_said_to_be() {
        let header = header(10 << 20, 4096);
        let mut bytes = padded(&header);
        let at = header.in_use.expect("a new image has it").at as usize;
        assert!(at % 512 <= 508, "within a sector");
        bytes[at + 3] = 1;
        let read = Header::from_bytes(&bytes).expect("ours");
        assert!(read.in_use.expect("as before").is_set);
        bytes[at + 3] = 2;
        assert!(refusal(&bytes).contains("the mark of a run"));
    }

    #[test]
    fn more_samples_than_there_is_room_for_are_refused() {
        let mut bytes = padded(&header(10 << 20, 4096));
        let at = NEW_OURS_AT as usize + SAMPLE_COUNT;
        bytes[at + 3] = MAX_SAMPLES as u8 + 1;
        assert!(refusal(&bytes).contains("17 samples"));
    }

    #[test]
    fn a_sample_beyond_the_end_of_the_disk_is_refused() {
        let mut header = header(10 << 20, 4096);
        for (offset, is_good) in [((10 << 20) - 1, true), (10 << 20, false), (u64::MAX, false)] {
            header.samples = vec![Sample { offset, hash: 1 }];
            let bytes = padded(&header);
            assert_eq!(Header::from_bytes(&bytes).is_ok(), is_good, "{offset}");
            assert!(is_good || refusal(&bytes).contains("sample"));
        }
    }

    #[test]
    fn a_fingerprint_that_is_recorded_is_read() {
        let mut new = header(10 << 20, 4096);
        let mut bytes = padded(&new);
        new.mtime = None;
        new.samples = vec![Sample {
            offset: 4096,
            hash: 5,
        }];
        for (at, part) in new.fingerprint() {
            bytes[at as usize..][..part.len()].copy_from_slice(&part);
        }
        assert_eq!(Header::from_bytes(&bytes).expect("ours"), new);
        new.in_use = None;
        assert!(new.fingerprint().is_empty(), "no room in version 1.0");
    }

    #[test]
    fn truncated_headers_are_refused() {
        let good = padded(&header(10 << 20, 4096));
        let end = header(10 << 20, 4096).to_bytes().len();
        for len in 0..end {
            refusal(&good[..len]);
        }
    }

    #[test]
    fn messages_say_what_to_do() {
        let good = padded(&header(10 << 20, 4096));
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            refusal(&bytes)
        };
        assert!(with(0, 0).contains("no qcow2 image"));
        assert!(with(79, 0x11).contains("not closed"));
        assert!(with(79, 0x12).contains("corrupt"));
        assert!(with(63, 1).contains("snapshot -d"));
        assert!(with(31, 1).contains("resized"));
    }
}
