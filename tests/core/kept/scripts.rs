//! Requests, made by hand and at random.

use nbdkit_cow_filter::overlay::Zeroing;

use super::disk::{DISCARD, KEEP, Request, layout};
use super::random::Random;
use Request::{CopyingRead, Flush, Kill, Write, Zero};

/// Clusters of 16K, nine L2 tables and two refcount blocks; a part of a sector at
/// the end.
pub const SMALL_BLOCKS: (u64, u64) = ((129 << 20) + 1000, 512);
/// Clusters of 128K, and two L2 tables.
pub const LARGE_BLOCKS: (u64, u64) = ((1 << 30) + (1 << 20) + 5000, 4096);
/// As that, and two refcount blocks.
pub const HUGE: (u64, u64) = ((9 << 30) + 5000, 4096);

/// Offsets at which clusters meet whose L2 entries, or refcounts, lie in different
/// tables, and those of the disk's ends.
pub fn places((size, block): (u64, u64)) -> Vec<u64> {
    let layout = layout(size, block);
    let cluster = layout.cluster_size();
    let table = cluster / 16 * cluster;
    let counted = cluster / 2 * cluster;
    let refcounts = (1..=layout.refcount_block_count())
        .map(|n| (n * counted).saturating_sub(layout.data))
        .filter(|at| *at < size);
    // Clusters of one group, and of two.
    let near = [0, cluster, 64 * cluster];
    let tables = (1..layout.l2_tables()).map(|n| n * table);
    // The tables are alike: the first and the last will do.
    let tables: Vec<u64> = tables.collect();
    let tables = tables.first().into_iter().chain(tables.last()).copied();
    let last = size / block * block;
    near.into_iter()
        .chain(tables)
        .chain(refcounts)
        .chain([last])
        .collect()
}

fn write(at: u64, len: u64, byte: u8) -> Request {
    Write { at, len, byte }
}

fn zero(at: u64, len: u64, how: Zeroing) -> Request {
    Zero { at, len, how }
}

/// For each rule of the order of writes a script that needs it.
pub fn by_hand(disk: (u64, u64)) -> Vec<(&'static str, Vec<Request>)> {
    let (size, block) = disk;
    let cluster = 32 * block;
    let places = places(disk);
    let everywhere = |byte: u8| -> Vec<Request> {
        let at = places.iter().map(|at| at.saturating_sub(block));
        at.map(|at| write(at, (2 * block).min(size - at), byte))
            .collect()
    };
    let discarded_everywhere = || -> Vec<Request> {
        let at = places.iter().map(|at| at.saturating_sub(block));
        at.map(|at| zero(at, (2 * block).min(size - at), DISCARD))
            .collect()
    };
    vec![
        (
            "new blocks in one cluster",
            vec![write(0, block, 1), write(3 * block, 100, 2), Flush],
        ),
        (
            "clusters in all tables, in one flush, and again",
            [everywhere(1), vec![Flush], everywhere(2), vec![Flush]].concat(),
        ),
        (
            "discarded in all tables, and new data at once",
            [
                everywhere(1),
                vec![Flush],
                discarded_everywhere(),
                vec![Flush],
                everywhere(2),
                vec![Flush],
            ]
            .concat(),
        ),
        (
            "flushed, discarded, written to in part before the next flush",
            vec![
                write(cluster, 4 * block, 1),
                Flush,
                zero(cluster, 4 * block, DISCARD),
                write(cluster + block + 7, 20, 2),
                Flush,
                zero(cluster, 32 * block, DISCARD),
                Flush,
                write(cluster + 5, 20, 3),
                Flush,
            ],
        ),
        (
            "a cluster that is free and taken again beside one that is kept",
            vec![
                write(0, block, 1),
                write(cluster, block, 1),
                write(2 * cluster, block, 1),
                Flush,
                zero(cluster, block, DISCARD),
                Flush,
                write(cluster, block, 2),
                zero(0, block, DISCARD),
                Flush,
                write(0, block, 3),
                zero(cluster, block, DISCARD),
                write(cluster, 9, 4),
                Flush,
            ],
        ),
        (
            "zeroes of all kinds over the base and over data",
            vec![
                write(0, 8 * block, 1),
                Flush,
                zero(2 * block, block, KEEP),
                zero(3 * block + 9, 50, KEEP),
                zero(4 * block + 9, 50, DISCARD),
                zero(cluster, 2 * block, KEEP),
                zero(cluster + 4 * block, 2 * block, DISCARD),
                write(cluster + 8 * block, 2 * block, 0),
                zero(cluster + 12 * block + 3, 80, DISCARD),
                Flush,
                write(cluster + 4 * block + 1, 5, 2),
                write(cluster + 8 * block, block, 3),
                Flush,
            ],
        ),
        (
            "what reads save",
            vec![
                CopyingRead {
                    at: 100,
                    len: 2 * block,
                },
                write(block, 30, 1),
                Flush,
                CopyingRead {
                    at: 0,
                    len: 6 * block,
                },
                Flush,
            ],
        ),
        (
            "killed between flushes",
            vec![
                write(0, 2 * block, 1),
                write(cluster, 2 * block, 1),
                Flush,
                zero(cluster, 2 * block, DISCARD),
                write(block, 2 * block, 2),
                write(2 * cluster, block, 2),
                Kill,
                write(2 * cluster + 5, 10, 3),
                Flush,
                Kill,
                zero(0, 3 * cluster, DISCARD),
                Flush,
            ],
        ),
    ]
}

pub fn at_random(disk: (u64, u64), length: usize, random: &mut Random) -> Vec<Request> {
    // Few places, so that requests meet.
    let places = places(disk);
    let near: Vec<u64> = (0..3).map(|_| random.among(&places)).collect();
    (0..length).map(|_| one(disk, &near, random)).collect()
}

fn one((size, block): (u64, u64), near: &[u64], random: &mut Random) -> Request {
    let place = random.among(near);
    let at = (place + random.below(6) * block).saturating_sub(random.below(6) * block);
    let within = random.below(block);
    let at = (at + random.among(&[0, 0, 0, within])).min(size - 1);
    let len = match random.below(5) {
        0 => 1 + random.below(block),
        1 => block * (1 + random.below(4)),
        2 => block,
        // Often all that a cluster has.
        _ => 1 + random.below(8 * block),
    };
    let len = len.min(size - at);
    let byte = 1 + random.below(255) as u8;
    match random.below(20) {
        0..=7 => write(at, len, byte),
        8 => write(at, len, 0),
        9..=11 => zero(at, len, DISCARD),
        12 => {
            let at = at / (32 * block) * 32 * block;
            zero(at, (32 * block).min(size - at), DISCARD)
        }
        13 => zero(at, len, KEEP),
        14 => CopyingRead { at, len },
        15 if random.below(3) == 0 => Kill,
        _ => Flush,
    }
}
