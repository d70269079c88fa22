//! The header extension of this filter: what an image keeps beside what QEMU knows.

use std::ops::Range;

use super::super::layout::{Layout, be_u32, be_u64};
use super::{HEADER_LEN, Header, refused};
use crate::error::Result;

/// Ours, "nbco": programs skip the extensions that they do not know. 296 bytes:
///
/// | byte | length | what |
/// |---|---|---|
/// | 0 | 8 | the disk's exact size; `size` in the header is rounded up to a sector |
/// | 8 | 8 | the base's modification time, seconds; signed |
/// | 16 | 4 | its nanoseconds |
/// | 20 | 4 | 1 if the time is known, else 0 |
/// | 24 | 8 | which export it keeps: [`hash`] of its name, 0 while nothing was written |
/// | 32 | 4 | 1 from before the first change of a run to its clean end, 2 while it is brought home, else 0 |
/// | 36 | 4 | how many samples of the base follow: 0 to 16 |
/// | 40 | 16 each | [`Sample`]: its offset on the disk, and the [`hash`] of its bytes |
///
/// Images of version 1.0 have the first 32 bytes only.
pub(super) const OURS: u32 = 0x6e62_636f;
const OURS_LEN: usize = 40 + SAMPLE_LEN * MAX_SAMPLES;
const FIRST_OURS_LEN: usize = 32;
/// In the data of ours.
const MTIME: usize = 8;
pub(super) const EXPORT: usize = 24;
pub(super) const IN_USE: usize = 32;
const SAMPLE_COUNT: usize = 36;
const SAMPLES: usize = 40;
const SAMPLE_LEN: usize = 16;
/// The most samples that a header has.
pub const MAX_SAMPLES: usize = 16;
/// Where the data of ours lies in the header of a new image.
pub(super) const NEW_OURS_AT: u64 = HEADER_LEN as u64 + 16 + 8;

/// A modification time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mtime {
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// The mark of a run that changes the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InUse {
    /// What has changed the image last and has not come to a clean end.
    pub by: Option<User>,
    /// Where the mark lies in the file: four bytes within a sector, a number.
    pub at: u64,
}

/// What changes an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// A run, for its clients.
    Run = 1,
    /// A start that brings it home.
    Start = 2,
}

impl InUse {
    /// The four bytes of the mark.
    pub fn mark(by: Option<User>) -> [u8; 4] {
        by.map_or(0, |user| user as u32).to_be_bytes()
    }
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

impl Header {
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

    /// The data of ours.
    pub(super) fn ours(&self) -> [u8; OURS_LEN] {
        let mut bytes = [0; OURS_LEN];
        bytes[..8].copy_from_slice(&self.layout.disk_size().to_be_bytes());
        if let Some(mtime) = self.mtime {
            bytes[8..16].copy_from_slice(&mtime.seconds.to_be_bytes());
            bytes[16..20].copy_from_slice(&mtime.nanoseconds.to_be_bytes());
            bytes[20..24].copy_from_slice(&1u32.to_be_bytes());
        }
        bytes[EXPORT..IN_USE].copy_from_slice(&self.export.to_be_bytes());
        let by = self.in_use.and_then(|in_use| in_use.by);
        bytes[IN_USE..SAMPLE_COUNT].copy_from_slice(&InUse::mark(by));
        let count = self.samples.len() as u32;
        bytes[SAMPLE_COUNT..SAMPLES].copy_from_slice(&count.to_be_bytes());
        let places = bytes[SAMPLES..].chunks_exact_mut(SAMPLE_LEN);
        for (place, sample) in places.zip(&self.samples) {
            place[..8].copy_from_slice(&sample.offset.to_be_bytes());
            place[8..].copy_from_slice(&sample.hash.to_be_bytes());
        }
        bytes
    }
}

/// Whether it is as long as ours is, or was in version 1.0.
pub(super) fn is_ours(data: &[u8]) -> bool {
    [FIRST_OURS_LEN, OURS_LEN].contains(&data.len())
}

/// The exact size of the disk, in the data of ours.
pub(super) fn disk_size(ours: &[u8]) -> u64 {
    be_u64(ours, 0)
}

impl Header {
    /// With the data of ours, which lies at `ours_at`. EINVAL says what is wrong there.
    pub(super) fn with_ours(
        layout: Layout,
        backing: Vec<u8>,
        ours: &[u8],
        ours_at: usize,
    ) -> Result<Self> {
        Ok(Header {
            layout,
            backing,
            mtime: (be_u32(ours, 20) != 0).then(|| Mtime {
                seconds: be_u64(ours, MTIME) as i64,
                nanoseconds: be_u32(ours, 16),
            }),
            export: be_u64(ours, EXPORT),
            export_at: (ours_at + EXPORT) as u64,
            in_use: in_use(ours, ours_at)?,
            samples: samples(ours)?,
        })
    }
}

/// The mark in the data of ours, which lies at `ours_at`.
fn in_use(ours: &[u8], ours_at: usize) -> Result<Option<InUse>> {
    if ours.len() == FIRST_OURS_LEN {
        return Ok(None);
    }
    let by = match be_u32(ours, IN_USE) {
        0 => None,
        1 => Some(User::Run),
        2 => Some(User::Start),
        mark => {
            return Err(refused(format!(
                "the mark of a run at byte {} is {mark:#x}, not 0, 1 or 2",
                ours_at + IN_USE
            )));
        }
    };
    Ok(Some(InUse {
        by,
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
    let disk_size = disk_size(ours);
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
