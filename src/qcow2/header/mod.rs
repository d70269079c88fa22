//! The header cluster: header, header extensions, backing file name.
//!
//! Reading trusts nothing. [`Header`] is what this filter has written itself, or QEMU has
//! when it filled or rebased the image: the tables lie where [`Layout`] has them. [`Foreign`] is
//! one of an image whose tables QEMU may have moved. All else is refused with the name of
//! the field, where it is, and what to do.

mod extension;
mod foreign;

use super::layout::Layout;
use crate::error::{Error, Result};
pub use extension::{InUse, MAX_SAMPLES, Mtime, Sample, User, hash};
use extension::{NEW_OURS_AT, OURS};
pub use foreign::{Foreign, NEW_IMAGE, Tables};

const MAGIC: u32 = 0x5146_49fb;
const VERSION: u32 = 3;
const HEADER_LEN: u32 = 112;
/// An incompatible feature bit.
const EXTENDED_L2: u64 = 1 << 4;
const REFCOUNT_ORDER: u32 = 4;
/// QEMU reads no longer ones.
pub const MAX_BACKING_NAME: usize = 1023;

/// Header extensions, section "Header extensions" of the specification.
const END_OF_EXTENSIONS: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;

const FORMAT_OF_BASE: &[u8] = b"raw";

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
            export_at: NEW_OURS_AT + extension::EXPORT as u64,
            in_use: Some(InUse {
                by: None,
                at: NEW_OURS_AT + extension::IN_USE as u64,
            }),
            samples: Vec::new(),
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

    /// Reads `bytes`, the first of the file: 16 KiB, the smallest cluster, unless
    /// the file is shorter. EINVAL says which field is not as it should be.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let foreign = Foreign::from_bytes(bytes)?;
        foreign.expect_at_home(bytes)?;
        Ok(foreign.header)
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::BlockSize;

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
        assert_eq!(read.in_use.expect("as before").by, Some(User::Run));
        bytes[at + 3] = 3;
        assert!(refusal(&bytes).contains("the mark of a run"));
    }

    #[test]
    fn more_samples_than_there_is_room_for_are_refused() {
        let header = header(10 << 20, 4096);
        let mut bytes = padded(&header);
        // The count follows the mark.
        let at = header.in_use.expect("a new image has it").at as usize + 4;
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
