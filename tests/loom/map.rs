//! Leaves and nodes of the block map that serve another part of the disk, beside readers
//! that take no lock.

use std::ops::Range;

use loom::model::Builder;
use loom::sync::Arc;
use loom::thread;

use nbdkit_cow_filter::block::BlockNum;
use nbdkit_cow_filter::overlay::{BlockMap, State};

/// What a leaf has, as small as they are here; and a node above leaves.
const LEAF: u64 = 64;
const NODE: u64 = 2 * LEAF;

fn range(blocks: Range<u64>) -> Range<BlockNum> {
    BlockNum(blocks.start)..BlockNum(blocks.end)
}

fn state(map: &BlockMap, block: u64) -> State {
    map.state(BlockNum(block)).expect("in range")
}

/// All of `part`, of which a block was data, becomes zeroes, and its memory serves `data`
/// of another part. Meanwhile a reader looks at `zero`. Only the orders in which threads are
/// stopped that could go on no more than twice: there are too many others.
fn check(part: Range<u64>, written: u64, data: u64, zero: u64) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(move || {
        let map = BlockMap::new(BlockNum(4 * LEAF));
        map.set_zero(&range(0..4 * LEAF)).expect("in range");
        map.set_data(&range(written..written + 1))
            .expect("in range");
        let map = Arc::new(map);
        // Nothing of it is stored any more: a reader finds zeroes, now and later.
        map.set_zero(&range(part.clone())).expect("in range");
        map.set_given_back(&range(part.clone())).expect("in range");
        let writer = {
            let (map, part) = (Arc::clone(&map), part.clone());
            thread::spawn(move || {
                map.prune(&range(part));
                map.set_data(&range(data..data + 1)).expect("in range");
            })
        };
        assert_eq!(state(&map, zero), State::Zero);
        writer.join().expect("no panic");
        assert_eq!(state(&map, data), State::Data);
        assert_eq!(state(&map, written), State::Zero);
    });
}

/// The block that the reader looks at has the place, in its leaf, of the one that becomes
/// data in the other.
#[test]
fn a_leaf_that_serves_another_part_is_not_taken_for_the_old_one() {
    check(0..LEAF, 5, LEAF + 6, 6);
}

/// The node above two others comes back as one of those: what it points to is on another
/// level now.
#[test]
fn a_node_does_not_serve_another_level() {
    const UPPER: u64 = 2 * NODE;
    let mut builder = Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(|| {
        let map = BlockMap::new(BlockNum(2 * UPPER));
        let all = range(0..2 * UPPER);
        map.set_zero(&all).expect("in range");
        // The other half has its upper node, and lacks one below that.
        let there = UPPER + NODE;
        map.set_data(&range(there..there + 1)).expect("in range");
        map.set_data(&range(5..6)).expect("in range");
        map.set_zero(&range(0..UPPER)).expect("in range");
        map.set_given_back(&range(0..UPPER)).expect("in range");
        let map = Arc::new(map);
        let writer = {
            let map = Arc::clone(&map);
            thread::spawn(move || {
                map.prune(&range(0..UPPER));
                map.set_data(&range(UPPER..UPPER + 1)).expect("in range");
            })
        };
        assert_eq!(state(&map, 6), State::Zero);
        writer.join().expect("no panic");
    });
}

#[test]
fn a_node_that_serves_another_part_is_not_taken_for_the_old_one() {
    check(0..NODE, 5, NODE + 6, 6);
}
