//! The fingerprint of a base: samples of what it has, by which an image knows the disk
//! that it was made for.
//!
//! An image has only what was written. Over another disk of the same size its files and
//! tables lie between bytes that have nothing to do with them, and no program would say
//! so. Sixteen samples of 4K know a disk by its partition table, its superblocks, and by
//! what happens to lie at some more places. They are taken of what the layer below serves,
//! because that is what clients have read and built upon; a filter below may show
//! something else than the file has.
//!
//! # When they are taken
//!
//! When the image is made, and again as long as there is nothing in it (every block is
//! *base*): such an image is as good over any disk of its size. That is also what an image
//! is like that `qemu-img commit` has emptied, whose base has changed by that.
//!
//! # When they are compared
//!
//! At the first connection of a run, before anything is served. A sample is left out unless
//! all of it lies in blocks that are *base*, since of the others
//!
//! - the clients see nothing of the base, so it does no harm that it is another;
//! - the base may have changed with good reason: `qemu-img commit -d` writes to it what
//!   the image has.
//!
//! A block that was written to is never *base* again, unless the image was emptied (a
//! trimmed block is *zero*). So what is still *base* was never written to, no commit has
//! changed the base there, and a sample of it has to be what it was. Against an image that
//! was emptied, and written to again, there are two measures: samples of written blocks are
//! forgotten when a run ends, and all are if the survey of the image finds signs of it.
//!
//! What can't be read is left out, too: a disk with a bad sector can still be used, and
//! that the sector has gone bad is no sign of another disk.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::base::Base;
use crate::block::ByteRange;
use crate::error::Result;
use crate::overlay::{Overlay, Store};
use crate::qcow2::header::{MAX_SAMPLES, Sample, hash};

/// How many bytes a sample has, unless the disk ends before.
const LEN: u64 = 4096;

/// Where disks have what tells them apart: the partition table and most superblocks; that
/// of btrfs; the first partition.
const STARTS: [u64; 3] = [0, 64 << 10, 1 << 20];

/// 2^64 divided by the golden ratio. The fractions of its multiples spread evenly, however
/// many they are, and never come to a round part of the disk, where there are often zeroes.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Where the samples of a disk of `disk_size` bytes lie: in ascending order, at whole
/// multiples of [`LEN`]. Its base ends, or is continued with zeroes, at `base_end`.
fn places(disk_size: u64, base_end: u64) -> Vec<u64> {
    if disk_size == 0 {
        return Vec::new();
    }
    let place_of = |offset: u64| offset / LEN * LEN;
    let last_of = |end: u64| place_of(end.saturating_sub(1));
    let base_end = base_end.min(disk_size);
    let is_continued = base_end < disk_size;

    let mut places: BTreeSet<u64> = STARTS.into_iter().filter(|at| *at < disk_size).collect();
    // A copy of the partition table lies at the end.
    places.insert(last_of(disk_size));
    if is_continued {
        places.extend([last_of(base_end), place_of(base_end)]);
    }
    let spread = |start: u64, end: u64, count: usize| {
        let len = u128::from(end - start);
        (1..=count as u64).map(move |n| {
            let fraction = u128::from(GOLDEN.wrapping_mul(n));
            place_of(start + ((len * fraction) >> 64) as u64)
        })
    };
    let left = MAX_SAMPLES - places.len();
    let beyond = if is_continued { left / 4 } else { 0 };
    places.extend(spread(base_end, disk_size, beyond));
    places.extend(spread(0, base_end, left - beyond));
    places.into_iter().collect()
}

/// The bytes of the sample at `offset`, which lies within the disk.
pub fn range_at(offset: u64, disk_size: u64) -> ByteRange {
    ByteRange {
        start: offset,
        end: disk_size.min(offset.saturating_add(LEN)),
    }
}

/// The hash of what `read` gives. `None`: it can't be read.
fn hash_of(range: ByteRange, read: impl FnOnce(&mut [u8], u64) -> Result<()>) -> Option<u64> {
    let mut bytes = [0; LEN as usize];
    let bytes = &mut bytes[range.in_buffer(range.start)];
    match read(bytes, range.start) {
        Ok(()) => Some(hash(bytes)),
        Err(e) => {
            log::debug!("the sample of the base at {} is left out: {e}", range.start);
            None
        }
    }
}

/// Those of `samples` all of which lies in blocks that are *base*.
pub fn in_base<S: Store>(samples: &[Sample], overlay: &Overlay<S>) -> Result<Vec<Sample>> {
    let mut found = Vec::new();
    for sample in samples {
        if overlay.is_base(range_at(sample.offset, overlay.size()))? {
            found.push(*sample);
        }
    }
    Ok(found)
}

/// Takes the samples of `base`, which ends, or is continued with zeroes, at `base_end`.
pub fn take(base: &impl Base, base_end: u64) -> Vec<Sample> {
    let size = base.size();
    let places = places(size, base_end);
    let samples: Vec<_> = places
        .iter()
        .filter_map(|&offset| {
            let hash = hash_of(range_at(offset, size), |buf, at| base.read(buf, at))?;
            Some(Sample { offset, hash })
        })
        .collect();
    if samples.len() < places.len() {
        log::warn!(
            "{} of {} places by which another disk would be recognised can't be read",
            places.len() - samples.len(),
            places.len()
        );
    }
    samples
}

/// The offset of the first of `samples`, of those that are to be `compared`, for which
/// `read` gives other bytes. The disk has `disk_size` bytes.
pub fn first_difference(
    samples: &[Sample],
    disk_size: u64,
    compared: impl Fn(ByteRange) -> Result<bool>,
    read: impl Fn(&mut [u8], u64) -> Result<()>,
) -> Result<Option<u64>> {
    for sample in samples {
        let range = range_at(sample.offset, disk_size);
        if compared(range)? && hash_of(range, &read).is_some_and(|hash| hash != sample.hash) {
            return Ok(Some(sample.offset));
        }
    }
    Ok(None)
}

/// Reads as QEMU reads a backing file: it has zeroes beyond its end.
pub fn read_continued(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    buf[done..].fill(0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;
    const G: u64 = 1 << 30;

    #[test]
    fn a_small_disk_is_sampled_whole_and_nothing_beyond_it() {
        assert_eq!(places(0, 0), [0; 0]);
        assert_eq!(places(1, 1), [0]);
        assert_eq!(places(4096, 4096), [0]);
        assert_eq!(places(4097, 4097), [0, 4096]);
        assert_eq!(range_at(4096, 4097).len(), 1);
    }

    #[test]
    fn there_are_at_most_sixteen_and_none_twice() {
        let sizes = [
            1,
            511,
            4096,
            65536,
            65537,
            300_000,
            M,
            M + 1,
            5 * G,
            1 << 62,
            u64::MAX,
        ];
        for size in sizes {
            for base_end in [0, 1, size / 3, size - 1, size] {
                let places = places(size, base_end);
                assert!(
                    (1..=MAX_SAMPLES).contains(&places.len()),
                    "{size} {base_end}"
                );
                assert!(places.is_sorted_by(|a, b| a < b), "{places:?}");
                let is_inside = |at: &u64| *at < size && at % LEN == 0;
                assert!(places.iter().all(is_inside), "{size} {base_end}");
            }
        }
    }

    #[test]
    fn a_large_disk_is_sampled_where_it_tells_most_and_everywhere() {
        let places = places(16 * G, 16 * G);
        assert_eq!(places.len(), MAX_SAMPLES);
        for at in [0, 64 << 10, M, 16 * G - 4096] {
            assert!(places.contains(&at), "{at}");
        }
        // No gap of a fifth of the disk.
        assert!(places.windows(2).all(|pair| pair[1] - pair[0] < 16 * G / 5));
        let is_round = |at: &&u64| **at % M == 0;
        assert!(places.iter().filter(is_round).count() <= 2, "{places:?}");
    }

    #[test]
    fn a_base_that_is_continued_is_sampled_on_both_sides_of_its_end() {
        for (size, end) in [(20 * G, 2 * G), (20 * G, 300_001), (G + 8192, G)] {
            let places = places(size, end);
            let beyond = places.iter().filter(|at| **at >= end).count();
            assert!(beyond >= 2, "{places:?}");
            assert!(places.len() - beyond >= 4, "{places:?}");
            let holds_the_end = |at: &u64| range_at(*at, size).end > end && *at <= end;
            assert!(places.iter().any(holds_the_end), "{places:?}");
        }
    }

    #[test]
    fn what_lies_beyond_the_end_of_a_file_is_zeroes() {
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(&[7; 100], 0).expect("written");
        let mut bytes = [1; 150];
        read_continued(&file, &mut bytes, 50).expect("read");
        assert_eq!((&bytes[..50], &bytes[50..]), (&[7; 50][..], &[0; 100][..]));
    }
}
