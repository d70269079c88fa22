//! Extents, read-through and prefetch: what the base is asked, and how often.

use std::sync::atomic::Ordering;

use nbdkit_cow_filter::overlay::{Overlay, Store, Zeroing};

use crate::disk::{BLOCK, TestBase, TestStore, base_byte, block_size, test_disk};

const DISCARD: Zeroing = Zeroing::Zero {
    may_trim: true,
    fast: false,
};

/// `(start, end, hole and zero)` of each extent.
fn map<S: Store>(base: &TestBase, overlay: &Overlay<S>, only_first: bool) -> Vec<(u64, u64, bool)> {
    overlay
        .extents(base, 0, overlay.size(), only_first)
        .expect("good extents")
        .iter()
        .map(|extent| {
            assert_eq!(extent.allocation.hole, extent.allocation.zero);
            (extent.bytes.start, extent.bytes.end, extent.allocation.hole)
        })
        .collect()
}

#[test]
fn the_map_is_that_of_the_overlay_over_that_of_the_base() {
    let size = 10 * BLOCK;
    let base = TestBase::with_holes(size, &[(2 * BLOCK, 5 * BLOCK + 100)]);
    let overlay = Overlay::new(size, block_size(BLOCK), TestStore::default());
    assert_eq!(
        map(&base, &overlay, false),
        [
            (0, 2 * BLOCK, false),
            (2 * BLOCK, 5 * BLOCK + 100, true),
            (5 * BLOCK + 100, size, false)
        ]
    );
    overlay.write(&base, &[1], 3 * BLOCK).expect("a good write");
    overlay
        .zero(&base, 7 * BLOCK, BLOCK, Zeroing::Trim)
        .expect("a good trim");
    assert_eq!(
        map(&base, &overlay, false),
        [
            (0, 2 * BLOCK, false),
            (2 * BLOCK, 3 * BLOCK, true),
            (3 * BLOCK, 4 * BLOCK, false),
            (4 * BLOCK, 5 * BLOCK + 100, true),
            (5 * BLOCK + 100, 7 * BLOCK, false),
            (7 * BLOCK, 8 * BLOCK, true),
            (8 * BLOCK, size, false),
        ]
    );
    assert_eq!(map(&base, &overlay, true), [(0, 2 * BLOCK, false)]);
}

#[test]
fn a_base_that_answers_in_small_steps_is_asked_until_the_request_is_covered() {
    let size = 6 * BLOCK;
    let base = TestBase {
        extents_per_call: 1,
        ..TestBase::with_holes(size, &[(0, BLOCK), (2 * BLOCK, 3 * BLOCK)])
    };
    let overlay = Overlay::new(size, block_size(BLOCK), TestStore::default());
    assert_eq!(
        map(&base, &overlay, false).last(),
        Some(&(3 * BLOCK, size, false))
    );
    assert_eq!(base.extent_calls.load(Ordering::SeqCst), 4);
}

#[test]
fn a_fragmented_overlay_asks_the_base_once() {
    let size = 1000 * BLOCK;
    let base = TestBase::new(size);
    let overlay = Overlay::new(size, block_size(BLOCK), TestStore::default());
    for block in (0..1000).step_by(2) {
        overlay
            .zero(&base, block * BLOCK, BLOCK, Zeroing::Trim)
            .expect("a good trim");
    }
    assert_eq!(map(&base, &overlay, false).len(), 1000);
    assert_eq!(base.extent_calls.load(Ordering::SeqCst), 1);
}

#[test]
fn extents_stay_within_the_request() {
    let (base, overlay) = test_disk(10 * BLOCK);
    for (offset, len) in [
        (0, 1),
        (BLOCK - 1, 2),
        (5, 10 * BLOCK - 5),
        (3 * BLOCK, BLOCK),
    ] {
        let extents = overlay
            .extents(&base, offset, len, false)
            .expect("good extents");
        assert_eq!(extents.first().map(|e| e.bytes.start), Some(offset));
        assert_eq!(extents.last().map(|e| e.bytes.end), Some(offset + len));
    }
}

#[test]
fn a_read_asks_the_base_only_for_the_bytes_that_are_wanted() {
    let (base, overlay) = test_disk(10 * BLOCK);
    overlay
        .write(&base, &vec![7; BLOCK as usize], 3 * BLOCK)
        .expect("a good write");
    let mut buf = vec![0; 4 * BLOCK as usize];
    overlay
        .read(&base, &mut buf, BLOCK + 10, false)
        .expect("a good read");
    assert_eq!(
        base.read_calls(),
        [(BLOCK + 10, 3 * BLOCK), (4 * BLOCK, 5 * BLOCK + 10)]
    );
}

#[test]
fn cow_on_read_reads_whole_blocks_in_one_call_and_only_once() {
    let (base, overlay) = test_disk(10 * BLOCK + 5);
    let mut buf = vec![0; 2 * BLOCK as usize];
    for _ in 0..2 {
        overlay
            .read(&base, &mut buf, BLOCK + 10, true)
            .expect("a good read");
    }
    assert_eq!(base.read_calls(), [(BLOCK, 4 * BLOCK)]);
    let mut tail = [0; 3];
    overlay
        .read(&base, &mut tail, 10 * BLOCK, true)
        .expect("a good read");
    assert_eq!(base.read_calls()[1], (10 * BLOCK, 10 * BLOCK + 5));
}

#[test]
fn a_partial_write_reads_only_what_it_does_not_bring() {
    let (base, overlay) = test_disk(10 * BLOCK);
    for (offset, len) in [(0, 100), (2 * BLOCK - 100, 100), (4 * BLOCK + 1, 100)] {
        overlay
            .write(&base, &vec![1; len], offset)
            .expect("a good write");
    }
    assert_eq!(
        base.read_calls(),
        [
            (100, BLOCK),
            (BLOCK, 2 * BLOCK - 100),
            (4 * BLOCK, 5 * BLOCK)
        ]
    );
}

/// With a slow base two calls in a row take twice as long as one.
#[test]
fn parts_of_two_blocks_ask_the_base_once() {
    let (base, overlay) = test_disk(20 * BLOCK);
    let written = BLOCK + 9..2 * BLOCK + 9;
    overlay
        .write(&base, &vec![7; BLOCK as usize], BLOCK + 9)
        .expect("a good write");
    assert_eq!(base.read_calls(), [(BLOCK, 3 * BLOCK)]);
    let mut buf = vec![0; 2 * BLOCK as usize];
    overlay
        .read(&base, &mut buf, BLOCK, false)
        .expect("a good read");
    for (at, byte) in (BLOCK..).zip(&buf) {
        let expected = if written.contains(&at) {
            7
        } else {
            base_byte(at)
        };
        assert_eq!(*byte, expected, "byte {at}");
    }
    overlay
        .zero(&base, 5 * BLOCK + 1, BLOCK, DISCARD)
        .expect("a good zero");
    assert_eq!(base.read_calls()[1..], [(5 * BLOCK, 7 * BLOCK)]);
    // What is not in the base is not asked for.
    overlay
        .write(&base, &vec![7; BLOCK as usize], 7 * BLOCK - 9)
        .expect("a good write");
    assert_eq!(base.read_calls()[2..], [(8 * BLOCK - 9, 8 * BLOCK)]);
}

#[test]
fn a_cache_request_goes_to_the_base_where_the_base_has_the_bytes() {
    let (base, overlay) = test_disk(10 * BLOCK);
    overlay
        .zero(&base, 2 * BLOCK, BLOCK, Zeroing::Trim)
        .expect("a good trim");
    overlay
        .cache(&base, 10, 4 * BLOCK, false)
        .expect("a good cache");
    let caches: Vec<_> = base
        .caches
        .lock()
        .expect("no test thread died")
        .iter()
        .map(|range| (range.start, range.end))
        .collect();
    assert_eq!(caches, [(10, 2 * BLOCK), (3 * BLOCK, 4 * BLOCK + 10)]);
    assert_eq!(base.read_calls(), []);
}

#[test]
fn cow_on_cache_saves_whole_blocks_of_large_requests_too() {
    // More than is read at a time.
    let blocks = 200;
    let (base, overlay) = test_disk(blocks * BLOCK + 77);
    overlay
        .cache(&base, 1, blocks * BLOCK, true)
        .expect("a good cache");
    let copied: u64 = base
        .read_calls()
        .iter()
        .map(|(start, end)| end - start)
        .sum();
    assert_eq!(copied, blocks * BLOCK + 77);
    let calls = base.read_calls().len();
    let mut buf = vec![0; (blocks * BLOCK + 77) as usize];
    overlay
        .read(&base, &mut buf, 0, false)
        .expect("a good read");
    assert_eq!(base.read_calls().len(), calls, "all of it was saved");
    for (at, byte) in (0..).zip(&buf) {
        assert_eq!(*byte, base.byte(at), "at {at}");
    }
}
