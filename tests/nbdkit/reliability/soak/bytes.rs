//! What bytes a disk may hold: models of any size, and the judgement of what was found.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

pub const PAGE: u64 = 64 << 10;

/// Who has written a byte is in its upper three bits, and 0 there is the base.
const TAG_SHIFT: u32 = 5;
pub const TAGS: u8 = 7;

/// Of a region's number. Neighbours have different ones.
pub fn tag_of(region: usize) -> u8 {
    (region % usize::from(TAGS)) as u8 + 1
}

pub fn tag(byte: u8) -> u8 {
    byte >> TAG_SHIFT
}

/// A number that looks random, and is the same each time.
pub fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b.wrapping_add(0x632b_e59b_d9b4_e019);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What a request puts into a range.
#[derive(Clone, Debug)]
pub enum Content {
    Zeroes,
    /// Bytes that follow from where they are, so that one in a wrong place is seen.
    Pattern {
        tag: u8,
        generation: u64,
    },
    /// What was found on the disk, from this offset on.
    Found {
        bytes: Arc<Vec<u8>>,
        origin: u64,
    },
}

impl Content {
    /// The bytes at `at` and behind it.
    pub fn fill(&self, at: u64, out: &mut [u8]) {
        match self {
            Content::Zeroes => out.fill(0),
            Content::Found { bytes, origin } => {
                let from = (at - origin) as usize;
                out.copy_from_slice(&bytes[from..from + out.len()]);
            }
            Content::Pattern { tag, generation } => {
                let mut done = 0;
                while done < out.len() {
                    let here = at + done as u64;
                    let word = pattern_word(*tag, *generation, here / 8).to_le_bytes();
                    let part = &word[(here % 8) as usize..];
                    let length = part.len().min(out.len() - done);
                    out[done..done + length].copy_from_slice(&part[..length]);
                    done += length;
                }
            }
        }
    }
}

fn pattern_word(tag: u8, generation: u64, word: u64) -> u64 {
    const EACH_BYTE: u64 = 0x0101_0101_0101_0101;
    // Some have zeroes in between, of blocks and of parts of blocks.
    if generation % 5 == 0 && mix(generation, word / 512) % 3 == 0 {
        return 0;
    }
    // Never a zero, also in the base.
    (mix(generation, word) & (EACH_BYTE * 0x1e))
        | EACH_BYTE
        | (EACH_BYTE * u64::from(tag << TAG_SHIFT))
}

/// The bytes of a disk of any size, most of which are zeroes.
#[derive(Clone, Default)]
pub struct Sparse {
    pages: BTreeMap<u64, Box<[u8]>>,
}

impl Sparse {
    pub fn read(&self, at: u64, out: &mut [u8]) {
        for piece in pages(at..at + out.len() as u64) {
            let to = &mut out[(piece.start - at) as usize..(piece.end - at) as usize];
            match self.pages.get(&(piece.start / PAGE)) {
                Some(page) => {
                    let from = (piece.start % PAGE) as usize;
                    to.copy_from_slice(&page[from..from + to.len()]);
                }
                None => to.fill(0),
            }
        }
    }

    pub fn get(&self, range: &Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.read(range.start, &mut bytes);
        bytes
    }

    pub fn write(&mut self, range: &Range<u64>, content: &Content) {
        if matches!(content, Content::Zeroes) {
            return self.clear(range);
        }
        for piece in pages(range.clone()) {
            let page = self.pages.entry(piece.start / PAGE).or_insert_with(zeroes);
            let from = (piece.start % PAGE) as usize;
            let length = (piece.end - piece.start) as usize;
            content.fill(piece.start, &mut page[from..from + length]);
        }
    }

    /// Takes time by what is there, not by the length: a trim may be of gigabytes.
    fn clear(&mut self, range: &Range<u64>) {
        for number in self.used(range) {
            let page = number * PAGE..(number + 1) * PAGE;
            let part = page.start.max(range.start)..page.end.min(range.end);
            if part == page {
                self.pages.remove(&number);
            } else if let Some(bytes) = self.pages.get_mut(&number) {
                bytes[(part.start - page.start) as usize..(part.end - page.start) as usize].fill(0);
            }
        }
    }

    /// The numbers of the pages that may have something else than zeroes.
    pub fn used(&self, range: &Range<u64>) -> Vec<u64> {
        if range.is_empty() {
            return Vec::new();
        }
        let numbers = range.start / PAGE..=(range.end - 1) / PAGE;
        self.pages
            .range(numbers)
            .map(|(number, _)| *number)
            .collect()
    }
}

fn zeroes() -> Box<[u8]> {
    vec![0; PAGE as usize].into_boxed_slice()
}

/// A range, cut at the borders of pages.
pub fn pages(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let piece = at..range.end.min((at / PAGE + 1) * PAGE);
        at = piece.end;
        (!piece.is_empty()).then_some(piece)
    })
}

/// A change that may be on the disk.
#[derive(Clone, Debug)]
pub struct Change {
    pub range: Range<u64>,
    pub content: Content,
    /// Nothing that is older can be there.
    pub certain: bool,
    /// What was there before all changes can't be there.
    pub happened: bool,
}

/// Bytes that can't be there.
#[derive(Debug)]
pub struct Wrong {
    pub offset: u64,
    pub got: Vec<u8>,
    /// Any of these would be right.
    pub expected: Vec<Vec<u8>>,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "offset {}: got {:02x?}, expected", self.offset, self.got)?;
        let mut join = "";
        for expected in &self.expected {
            write!(f, "{join} {expected:02x?}")?;
            join = " or";
        }
        Ok(())
    }
}

/// Looks whether `found`, at `start`, is what was there `before` or what one of the
/// `changes` has put there, which are in their order.
///
/// In each `unit` of the disk a change is there as a whole or not at all; 1 where the
/// changes are still under way.
pub fn judge(
    found: &[u8],
    start: u64,
    before: &[u8],
    changes: &[Change],
    unit: u64,
) -> Result<(), Wrong> {
    let end = start + found.len() as u64;
    let mut cuts = vec![start, end];
    if !changes.is_empty() && unit > 1 {
        cuts.extend((start / unit + 1..=(end - 1) / unit).map(|number| number * unit));
    }
    for change in changes {
        cuts.push(change.range.start.clamp(start, end));
        cuts.push(change.range.end.clamp(start, end));
    }
    cuts.sort_unstable();
    cuts.dedup();
    for pair in cuts.windows(2) {
        let part = (pair[0] - start) as usize..(pair[1] - start) as usize;
        let found = &found[part.clone()];
        let mut candidates = Vec::new();
        let mut is_new = false;
        for change in changes {
            if change.range.start <= pair[0] && pair[1] <= change.range.end {
                if change.certain {
                    candidates.clear();
                }
                is_new |= change.certain || change.happened;
                let mut bytes = vec![0; found.len()];
                change.content.fill(pair[0], &mut bytes);
                candidates.push(bytes);
            }
        }
        if !is_new {
            candidates.push(before[part].to_vec());
        }
        let is_right = |at: usize| candidates.iter().any(|bytes| bytes[at] == found[at]);
        let wrong = if candidates.iter().any(|bytes| bytes == found) {
            None
        } else if unit > 1 {
            // The first byte of none, or where the one that is like it longest ends.
            let alike = |bytes: &Vec<u8>| (0..found.len()).find(|at| bytes[*at] != found[*at]);
            candidates.iter().filter_map(alike).max()
        } else {
            (0..found.len()).find(|at| !is_right(*at))
        };
        if let Some(at) = wrong {
            let some = |bytes: &[u8]| bytes[at..bytes.len().min(at + 16)].to_vec();
            return Err(Wrong {
                offset: pair[0] + at as u64,
                got: some(found),
                expected: candidates.iter().map(|bytes| some(bytes)).collect(),
            });
        }
    }
    Ok(())
}
