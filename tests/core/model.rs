//! Random requests, one after the other, compared with a plain vector of bytes.

use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::FileFailurePersistence;

use nbdkit_cow_filter::base::Allocation;
use nbdkit_cow_filter::block::{BlockNum, ByteRange, Piece};
use nbdkit_cow_filter::error::Result;
use nbdkit_cow_filter::overlay::{Overlay, Reclaim, State, Store, Zeroing};

use crate::disk::{
    TestBase, TestStore, assert_only_data_is_stored, block_size, file_overlay, with_thread,
};

#[derive(Debug, Clone)]
enum Request {
    Read { copy: bool },
    Write { seed: u8 },
    WriteZeroes,
    Zero { may_trim: bool, fast: bool },
    Trim,
    Cache { copy: bool },
    Extents { only_first: bool },
}

fn requests() -> impl Strategy<Value = Request> {
    prop_oneof![
        any::<bool>().prop_map(|copy| Request::Read { copy }),
        any::<u8>().prop_map(|seed| Request::Write { seed }),
        Just(Request::WriteZeroes),
        any::<(bool, bool)>().prop_map(|(may_trim, fast)| Request::Zero { may_trim, fast }),
        Just(Request::Trim),
        any::<bool>().prop_map(|copy| Request::Cache { copy }),
        any::<bool>().prop_map(|only_first| Request::Extents { only_first }),
    ]
}

/// Where a request starts and how long it is, to be fitted to a disk: near a
/// block's edge as often as not, since that is where mistakes are.
#[derive(Debug, Clone)]
struct Place {
    at: u64,
    jitter: i64,
    len: u64,
}

fn places() -> impl Strategy<Value = Place> {
    // Also more than an area, so that zeroes that take space go by steps.
    let len = prop_oneof![
        0u64..700,
        select(vec![512, 4096, 65536]),
        0u64..300_000,
        0u64..3_000_000
    ];
    (any::<u64>(), -3i64..4, len).prop_map(|(at, jitter, len)| Place { at, jitter, len })
}

impl Place {
    fn range(&self, size: u64, block: u64) -> ByteRange {
        let at = self.at % (size + 1);
        let at = if self.at % 3 == 0 {
            at
        } else {
            at / block * block
        };
        let start = at.saturating_add_signed(self.jitter).min(size);
        ByteRange {
            start,
            end: start.saturating_add(self.len).min(size),
        }
    }
}

/// The vector holds each byte xored with the base's, so that what nobody wrote to
/// is zero, and a vector of a GiB takes no memory.
struct Model<'a> {
    base: &'a TestBase,
    changed: Vec<u8>,
}

impl Model<'_> {
    fn get(&self, range: ByteRange) -> Vec<u8> {
        (range.start..range.end)
            .map(|at| self.changed[at as usize] ^ self.base.byte(at))
            .collect()
    }

    fn set(&mut self, range: ByteRange, bytes: &[u8]) {
        for (at, byte) in (range.start..range.end).zip(bytes) {
            self.changed[at as usize] = byte ^ self.base.byte(at);
        }
    }
}

/// The bytes that the blocks of `range` and those that are *data* take in a store.
fn space_with<S: Store>(overlay: &Overlay<S>, range: ByteRange) -> u64 {
    let block_size = overlay.block_size();
    let touched = block_size.touched_by(range);
    let blocks = (0..block_size.count(overlay.size()).0).map(BlockNum);
    let takes_space = |block: &BlockNum| {
        let state = overlay.state_at(block_size.start_of(*block));
        touched.contains(block) || state.expect("in range") == State::Data
    };
    blocks
        .filter(takes_space)
        .map(|block| block_size.bytes_of(&(block..block.next()), overlay.size()))
        .map(|bytes| bytes.len().next_multiple_of(512))
        .sum()
}

fn bytes(seed: u8, len: u64) -> Vec<u8> {
    // Long stretches of zeroes among it, for the blocks that are not stored.
    (0..len)
        .map(|i| {
            if i / 5000 % 3 == 1 {
                0
            } else {
                seed.wrapping_add(i as u8)
            }
        })
        .collect()
}

fn compare<S: Store>(
    base: &TestBase,
    overlay: &Overlay<S>,
    block: u64,
    capacity: Option<u64>,
    script: &[(Request, Place)],
) -> std::result::Result<(), TestCaseError> {
    let size = base.size;
    // Where the store may be full: true if it was, and the model knows what became of it.
    let is_refused = |model: &mut Model<'_>, range: ByteRange, new: &[u8], done: Result<()>| {
        let Err(error) = done else { return false };
        assert_eq!(error.errno(), libc::ENOSPC);
        let capacity = capacity.expect("only a small store is full");
        let wanted = space_with(overlay, range);
        assert!(wanted > capacity, "{wanted} of {capacity}: there was room");
        let old = model.get(range);
        let mut found = vec![0xaa; range.len() as usize];
        overlay
            .read(base, &mut found, range.start, false)
            .expect("a good read");
        let is_known = |at: usize| found[at] == old[at] || found[at] == new[at];
        assert!((0..found.len()).all(is_known), "{range:?}");
        model.set(range, &found);
        true
    };
    let mut model = Model {
        base,
        changed: vec![0; size as usize],
    };
    let mut touched = vec![ByteRange {
        start: 0,
        end: size.min(1 << 16),
    }];
    for (request, place) in script {
        let range = place.range(size, block);
        touched.push(range);
        match request {
            Request::Read { copy } => {
                let mut buf = vec![0xaa; range.len() as usize];
                overlay
                    .read(base, &mut buf, range.start, *copy)
                    .expect("a good read");
                prop_assert!(buf == model.get(range), "read {:?}", range);
            }
            Request::Write { seed } => {
                let buf = bytes(*seed, range.len());
                let done = overlay.write(base, &buf, range.start);
                if !is_refused(&mut model, range, &buf, done) {
                    model.set(range, &buf);
                }
            }
            Request::WriteZeroes => {
                let buf = vec![0; range.len() as usize];
                let done = overlay.write(base, &buf, range.start);
                if !is_refused(&mut model, range, &buf, done) {
                    model.set(range, &buf);
                }
            }
            Request::Zero { may_trim, fast } => {
                let how = Zeroing::Zero {
                    may_trim: *may_trim,
                    fast: *fast,
                };
                let zeroes = vec![0; range.len() as usize];
                match overlay.zero(base, range.start, range.len(), how) {
                    Err(e) if e.errno() == libc::ENOTSUP => {
                        prop_assert!(*fast, "only a fast zero may be refused");
                        let is_large = !may_trim || block > 1 << 20;
                        prop_assert!(is_large, "what is fast is not refused");
                    }
                    done => {
                        if !is_refused(&mut model, range, &zeroes, done) {
                            model.set(range, &zeroes);
                        }
                    }
                }
            }
            Request::Trim => {
                // Parts of blocks of the base stay.
                let block_size = overlay.block_size();
                let mut becomes = model.get(range);
                for piece in block_size.pieces(range, size) {
                    let bytes = match piece {
                        Piece::Partial { bytes, .. } => {
                            if overlay.state_at(bytes.start).expect("in range") == State::Base {
                                continue;
                            }
                            bytes
                        }
                        Piece::Whole { bytes, .. } => bytes,
                    };
                    becomes[bytes.in_buffer(range.start)].fill(0);
                }
                overlay
                    .zero(base, range.start, range.len(), Zeroing::Trim)
                    .expect("a good trim");
                model.set(range, &becomes);
            }
            Request::Cache { copy } => {
                overlay
                    .cache(base, range.start, range.len(), *copy)
                    .expect("a good cache");
            }
            Request::Extents { only_first } => {
                let extents = overlay
                    .extents(base, range.start, range.len(), *only_first)
                    .expect("good extents");
                let mut at = range.start;
                let mut before: Option<Allocation> = None;
                for extent in &extents {
                    prop_assert_eq!(extent.bytes.start, at, "no gaps");
                    prop_assert!(!extent.bytes.is_empty());
                    prop_assert_ne!(before, Some(extent.allocation), "neighbours differ");
                    if extent.allocation.zero {
                        let zeroes = model.get(extent.bytes).iter().all(|byte| *byte == 0);
                        prop_assert!(zeroes, "{:?} is said to be zeroes", extent);
                    }
                    at = extent.bytes.end;
                    before = Some(extent.allocation);
                }
                if *only_first {
                    prop_assert!(extents.len() == usize::from(!range.is_empty()));
                } else {
                    prop_assert_eq!(at, range.end, "the request is covered");
                }
            }
        }
    }
    // Whatever was touched is right at the end too, its surroundings included.
    for range in touched {
        let range = ByteRange {
            start: range.start.saturating_sub(2 * block.min(1 << 17)),
            end: (range.end + 2 * block.min(1 << 17)).min(size),
        };
        let mut buf = vec![0; range.len() as usize];
        overlay
            .read(base, &mut buf, range.start, false)
            .expect("a good read");
        prop_assert!(buf == model.get(range), "at the end, {:?}", range);
    }
    Ok(())
}

fn base(size: u64) -> TestBase {
    // Holes that end within blocks, for zero detection and extents.
    let holes = [(0, 3000), (70_000, 200_000)];
    let holes: Vec<_> = holes
        .into_iter()
        .map(|(start, end)| (start.min(size), end.min(size)))
        .filter(|(start, end)| start < end)
        .collect();
    TestBase::with_holes(size, &holes)
}

const BLOCK_SIZES: [u64; 4] = [512, 4096, 65536, 1 << 20];
const SIZES: [u64; 6] = [0, 1, 511, 512, 4097, 100_000];

/// What failed is tried first the next time. It is kept where cargo builds, not in the
/// tree: what is to be tried for ever becomes a test that says what it is about.
fn cases(count: u32) -> ProptestConfig {
    let file = concat!(env!("CARGO_TARGET_TMPDIR"), "/proptest-regressions");
    ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(file))),
        ..ProptestConfig::with_cases(count)
    }
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn requests_equal_a_byte_vector(
        block in select(&BLOCK_SIZES[..]),
        size in prop_oneof![select(&SIZES[..]), 0u64..1_000_000],
        can_punch in any::<bool>(),
        can_zero_range in any::<bool>(),
        script in vec((requests(), places()), 1..40)
    ) {
        let base = base(size);
        let store = TestStore::with(can_punch, can_zero_range);
        let overlay = Overlay::new(size, block_size(block), store);
        compare(&base, &overlay, block, None, &script)?;
        if can_punch {
            assert_only_data_is_stored(&overlay);
        }
    }

    /// What was trimmed is room for what comes later, and nothing else is lost.
    #[test]
    fn requests_to_a_small_store_equal_a_byte_vector_or_are_refused(
        block in select(&BLOCK_SIZES[..]),
        size in prop_oneof![select(&SIZES[..]), 0u64..3_000_000],
        blocks in 0u64..20,
        has_thread in any::<bool>(),
        script in vec((requests(), places()), 1..40)
    ) {
        let base = base(size);
        let store = TestStore::with_capacity(blocks * block);
        let reclaim = Arc::new(Reclaim::default());
        let overlay = Overlay::new(size, block_size(block), store).join(&reclaim);
        let compare = || compare(&base, &overlay, block, Some(blocks * block), &script);
        if has_thread {
            with_thread(&reclaim, compare)?;
        } else {
            compare()?;
        }
        overlay.give_back();
        assert_only_data_is_stored(&overlay);
    }

    #[test]
    fn requests_on_real_files_equal_a_byte_vector(
        block in select(&BLOCK_SIZES[..]),
        size in prop_oneof![select(&SIZES[..]), 0u64..1_000_000],
        script in vec((requests(), places()), 1..40)
    ) {
        compare(&base(size), &file_overlay(size, block), block, None, &script)?;
    }
}

proptest! {
    #![proptest_config(cases(4))]

    #[test]
    fn requests_on_a_large_disk_equal_a_byte_vector(
        block in select(&BLOCK_SIZES[..]),
        script in vec((requests(), places()), 1..25)
    ) {
        let size = (1 << 30) + 513;
        compare(&base(size), &file_overlay(size, block), block, None, &script)?;
    }
}

#[test]
fn every_size_and_block_size_can_be_written_and_read_whole() {
    for size in SIZES {
        for block in BLOCK_SIZES {
            let base = base(size);
            let overlay = file_overlay(size, block);
            let mut buf = vec![0; size as usize];
            overlay
                .read(&base, &mut buf, 0, false)
                .expect("a good read");
            assert_eq!(
                buf,
                base.bytes(ByteRange {
                    start: 0,
                    end: size
                })
            );
            let new = bytes(9, size);
            overlay.write(&base, &new, 0).expect("a good write");
            overlay
                .read(&base, &mut buf, 0, false)
                .expect("a good read");
            assert_eq!(buf, new, "size {size}, block {block}");
            assert!(overlay.write(&base, &[1], size).is_err(), "past the end");
        }
    }
}
