//! What the client asks for, the same in every run.

use std::sync::OnceLock;

use crate::harness::noise;

const K: usize = 1 << 10;
pub const M: usize = 1 << 20;

/// More than one overlay file of 4 MiB, with a piece of a block at its end.
pub const SIZE: usize = 5 * M + 700;
pub const BLOCK: usize = 4 * K;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
const CACHE: u16 = 5;
pub const ZERO: u16 = 6;
pub const EXTENTS: u16 = 7;

pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;
pub const FAST: u16 = 16;

/// Bytes in some places, holes in the others.
pub fn base() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    for (turn, piece) in bytes.chunks_mut(70_000).enumerate() {
        if turn % 4 != 3 {
            piece.copy_from_slice(&noise(turn as u64 + 2, piece.len()));
        }
    }
    bytes
}

/// What a step asks for.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    pub command: u16,
    pub flags: u16,
    pub at: usize,
    pub len: usize,
    /// Of what is written; 0: zeroes.
    pub seed: u64,
    /// With cow-on-read.
    pub copies: bool,
}

pub const fn step(command: u16, flags: u16, at: usize, len: usize) -> Step {
    Step {
        command,
        flags,
        at,
        len,
        seed: 0,
        copies: false,
    }
}

const fn write(flags: u16, at: usize, len: usize, seed: u64) -> Step {
    Step {
        seed,
        ..step(WRITE, flags, at, len)
    }
}

const fn copy(at: usize, len: usize) -> Step {
    Step {
        copies: true,
        ..step(READ, 0, at, len)
    }
}

/// All that a client can ask for: whole blocks and parts of blocks, over base, data and
/// zeroes, across areas of 1 MiB and across overlay files.
pub const SCRIPT: &[Step] = &[
    write(0, 0, 16 * K, 1),
    write(0, M - 32 * K, 64 * K, 2),
    // In a block that is data, around one that is not, in two files.
    write(0, 5000, 700, 3),
    write(0, 200_100, 5000, 4),
    write(0, 4 * M - 4500, 9000, 5),
    step(WRITE, 0, 300 * K, 32 * K),
    step(WRITE, 0, 4 * K, 8 * K),
    copy(600_000, 10_000),
    copy(700 * K, 20 * K),
    step(READ, 0, 0, 40 * K),
    step(READ, 0, 4 * M - 10 * K, 20 * K),
    // What is thrown away as a whole, in pieces that grow.
    write(0, 2 * M, M, 6),
    step(TRIM, 0, 2 * M, M),
    step(ZERO, 0, M - 20_000, 40_000),
    step(ZERO, NO_HOLE, 1_200_000, 30_000),
    step(ZERO, NO_HOLE, 0, 6000),
    step(ZERO, FAST, 3 * M, 64 * K),
    step(ZERO, FAST | NO_HOLE, 3 * M + 100 * K, 64 * K),
    // The same where there are bytes.
    write(0, 4 * M + 500 * K, 64 * K, 12),
    step(ZERO, NO_HOLE, 4 * M + 500 * K, 16 * K),
    step(ZERO, FAST | NO_HOLE, 4 * M + 516 * K, 16 * K),
    step(ZERO, NO_HOLE | FUA, 4 * M + 532 * K, 16 * K),
    step(FLUSH, 0, 0, 0),
    step(CACHE, 0, 3 * M + 300 * K, 300_000),
    step(TRIM, 0, 200_000, 6000),
    step(EXTENTS, 0, 0, SIZE),
    write(FUA, 8 * K, 8 * K, 7),
    write(FUA, 8 * K + 100, 300, 8),
    step(ZERO, FUA, 4 * M - 5000, 10_000),
    step(TRIM, FUA, 0, 8 * K),
    write(0, SIZE - 5000, 5000, 9),
    step(FLUSH, 0, 0, 0),
    step(FLUSH, 0, 0, 0),
    write(0, 300 * K + 100, 5000, 10),
    write(0, 5 * M - 8 * K, 8 * K, 11),
];

/// What all steps write pieces of.
fn noise_of_all() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| noise(1, 2 * M))
}

impl Step {
    pub fn end(&self) -> usize {
        self.at + self.len
    }

    pub fn content(&self) -> Vec<u8> {
        match self.seed {
            0 => vec![0; self.len],
            seed => noise_of_all()[1000 * seed as usize..][..self.len].to_vec(),
        }
    }

    pub fn changes(&self) -> bool {
        matches!(self.command, WRITE | ZERO | TRIM)
    }

    pub fn flushes(&self) -> bool {
        self.command == FLUSH || self.flags & FUA != 0
    }

    pub fn may_store(&self) -> bool {
        self.changes() || self.copies || self.command == CACHE
    }
}
