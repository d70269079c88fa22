//! What the fuzzer's bytes mean: a disk, and steps. Every step takes as many
//! bytes as any other, so that most of what the fuzzer does to its input changes
//! one step, or moves whole ones.

use nbdkit_cow_filter::overlay::Zeroing;

use crate::qemu::{Change, Metadata};

const STEP_LEN: usize = 16;

/// Longer inputs take too long for what they find.
const MAX_STEPS: usize = 48;

pub struct Script {
    /// Bytes in a block.
    pub block: u64,
    /// The disk's size in bytes.
    pub size: u64,
    pub can_punch: bool,
    pub can_zero_range: bool,
    pub steps: Vec<Step>,
}

/// Bytes of the disk, to be fitted to its size.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    flags: u8,
    len: u16,
    at: u32,
}

#[derive(Debug, Clone, Copy)]
pub enum Step {
    Read {
        place: Place,
        copy: bool,
    },
    Write {
        place: Place,
        seed: u8,
    },
    Zero {
        place: Place,
        how: Zeroing,
    },
    Cache {
        place: Place,
        copy: bool,
    },
    Extents {
        place: Place,
    },
    Flush,
    /// Ends, and begins anew.
    Reopen,
    /// Ends without a flush.
    Kill,
    Edit(Edit),
}

/// A change to the file while no overlay uses it.
#[derive(Debug, Clone, Copy)]
pub enum Edit {
    /// Of up to eight bytes at `at` of `part`.
    Number {
        part: Part,
        at: u64,
        width: u8,
        how: How,
        value: u64,
    },
    /// As QEMU changes it.
    Qemu(Change),
    /// A whole and right L2 entry with that bitmap, and its refcount.
    Entry {
        cluster: u64,
        bitmap: u64,
    },
    /// The header of an image for another disk.
    Header {
        block: u64,
        size: u64,
        also_length: bool,
    },
    Length {
        len: u64,
    },
}

#[derive(Debug, Clone, Copy)]
pub enum How {
    Set,
    Xor,
    Add,
}

#[derive(Debug, Clone, Copy)]
pub enum Part {
    Header,
    RefcountTable,
    RefcountBlocks,
    L1,
    L2,
    Data,
}

/// Small ones more often: they have the smaller tables.
fn block_size(choice: u8) -> u64 {
    const SHIFTS: [u8; 16] = [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 3, 3, 4, 5, 6, 7];
    512 << SHIFTS[usize::from(choice % 16)]
}

/// Most disks are small, some have several L2 tables.
fn disk_size(block: u64, choice: u8, number: u32) -> u64 {
    let cluster = 32 * block;
    let number = u64::from(number);
    match choice % 8 {
        0 => number * block % (3 * cluster * (cluster / 16)) + number % 3,
        1..4 => number % (100 * cluster),
        _ => number % (3 * cluster),
    }
}

impl Script {
    /// `None` if there are not bytes enough.
    pub fn parse(data: &[u8]) -> Option<Script> {
        let (head, steps) = data.split_first_chunk::<8>()?;
        let block = block_size(head[0]);
        let number = u32::from_le_bytes(head[4..].try_into().expect("4 bytes"));
        Some(Script {
            block,
            size: disk_size(block, head[1], number),
            can_punch: head[2] & 1 == 0,
            can_zero_range: head[2] & 2 == 0,
            steps: steps
                .chunks_exact(STEP_LEN)
                .take(MAX_STEPS)
                .map(|bytes| step(bytes.try_into().expect("16 bytes")))
                .collect(),
        })
    }
}

fn step(bytes: &[u8; STEP_LEN]) -> Step {
    let [kind, flags, len @ ..] = bytes;
    let len = u16::from_le_bytes([len[0], len[1]]);
    let at = u32::from_le_bytes(bytes[4..8].try_into().expect("4 bytes"));
    let value = u64::from_le_bytes(bytes[8..].try_into().expect("8 bytes"));
    let place = Place {
        flags: *flags,
        len,
        at,
    };
    let bit = |n: u32| (value >> n) & 1 != 0;
    match kind % 16 {
        0 => Step::Read {
            place,
            copy: bit(0),
        },
        1..4 => Step::Write {
            place,
            seed: value as u8,
        },
        4 => Step::Zero {
            place,
            how: Zeroing::Trim,
        },
        5 => Step::Zero {
            place,
            how: Zeroing::Zero {
                may_trim: bit(0),
                fast: bit(1),
            },
        },
        6 => Step::Cache {
            place,
            copy: bit(0),
        },
        7 => Step::Extents { place },
        8 => Step::Flush,
        9 => Step::Reopen,
        10 => Step::Kill,
        11 => Step::Edit(Edit::Entry {
            cluster: u64::from(at),
            bitmap: value,
        }),
        12 => Step::Edit(Edit::Header {
            block: block_size(*flags),
            size: value >> (len % 64),
            also_length: at & 1 != 0,
        }),
        13 => Step::Edit(Edit::Length {
            len: value >> (len % 64),
        }),
        15 => Step::Edit(Edit::Qemu(change(*flags, len, at, value))),
        _ => Step::Edit(Edit::Number {
            part: part(*flags),
            at: match flags & 8 {
                0 => near_start(part(*flags), at),
                _ => u64::from(at),
            },
            width: 1 << (len % 4),
            how: match len / 4 % 4 {
                0 => How::Xor,
                1 => How::Add,
                _ => How::Set,
            },
            value,
        }),
    }
}

fn change(flags: u8, len: u16, at: u32, value: u64) -> Change {
    let guest = u64::from(at);
    match flags % 16 {
        0..5 => Change::Write {
            guest,
            blocks: value as u32,
        },
        5 => Change::Zero {
            guest,
            keeps: len & 1 != 0,
        },
        6..9 => Change::Move {
            which: guest,
            from: value,
        },
        9 | 10 => Change::Swap {
            which: [guest, value],
        },
        11 | 12 => Change::MoveTable {
            table: match len % 4 {
                0 => Metadata::L1,
                1 => Metadata::L2(guest),
                2 => Metadata::RefcountTable,
                _ => Metadata::RefcountBlock(guest),
            },
            from: value,
        },
        13 => Change::Amend {
            refcount_order: at % 7,
        },
        14 => Change::Empty,
        _ => Change::Lazy {
            is_dirty: len & 1 != 0,
        },
    }
}

/// Where the header has its fields, and the tables what is of use.
fn near_start(part: Part, at: u32) -> u64 {
    match part {
        Part::Header => u64::from(at % 64) * 4,
        _ => u64::from(at % 256),
    }
}

fn part(choice: u8) -> Part {
    match choice % 8 {
        0..3 => Part::Header,
        3 => Part::RefcountTable,
        4 => Part::RefcountBlocks,
        5 => Part::L1,
        6 => Part::L2,
        _ => Part::Data,
    }
}

impl Place {
    /// Offset and length in a disk of `size` bytes.
    pub fn fit(self, size: u64, block: u64) -> (u64, u64) {
        let unit = if self.flags & 1 != 0 { block } else { 1 };
        let at = u64::from(self.at) * unit % (size + 1);
        let at = if self.flags & 2 != 0 {
            at / block * block
        } else {
            at
        };
        let len = match (self.flags >> 2) & 3 {
            0 | 1 => u64::from(self.len),
            2 => (u64::from(self.len) % 5) * block,
            // A leaf of the block map has 2048 blocks.
            _ => (u64::from(self.len) % 6000) * block,
        };
        (at, len.min(size - at))
    }

    /// As [`Place::fit`], short enough for a buffer.
    pub fn fit_buffer(self, size: u64, block: u64) -> (u64, u64) {
        let (at, len) = self.fit(size, block);
        (at, len.min(256 << 10))
    }
}
