//! The disk of a round, and its regions: each is written to by one client, which so knows
//! every byte of it. Blocks at a border belong to two of them.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::bytes::{Change, Content, PAGE, Sparse, Wrong, judge, pages, tag, tag_of};
use super::mix::{Kind, Mix, Random};

const MIB: u64 = 1 << 20;

/// What does not change in a round.
pub struct Disk {
    pub size: u64,
    base: Sparse,
    /// From the start of a region to that of the next one.
    stride: u64,
    /// Where bytes are written in each region. What is between is a hole in the base, and
    /// stays zeroes.
    spots: Vec<Vec<Range<u64>>>,
}

impl Disk {
    pub fn new(mix: &Mix, random: &mut Random) -> Disk {
        let count = mix.regions as u64;
        // Odd, so that no border is that of a block.
        let stride = (mix.size / count) | 1;
        let spots: Vec<_> = (0..count)
            .map(|number| spots(range_of(number, stride, mix.size, count), random))
            .collect();
        let mut base = Sparse::default();
        for (number, page) in spots.iter().flatten().cloned().flat_map(pages).enumerate() {
            let content = Content::Pattern {
                tag: 0,
                generation: mix.seed.wrapping_add(number as u64),
            };
            // Every fourth one is a hole.
            if !random.once_in(4) {
                base.write(&page, &content);
            }
        }
        Disk {
            size: mix.size,
            base,
            stride,
            spots,
        }
    }

    pub fn regions(&self, mix: &Mix) -> Vec<Region> {
        let count = self.spots.len();
        (0..count)
            .map(|number| {
                let range = range_of(number as u64, self.stride, self.size, count as u64);
                Region {
                    number,
                    touched: self.base.used(&range).into_iter().collect(),
                    now: self.part(&range),
                    kept: mix.is_kept().then(|| Kept {
                        safe: self.part(&range),
                        since: Vec::new(),
                    }),
                    range,
                }
            })
            .collect()
    }

    /// What the base has in a range.
    pub fn part(&self, range: &Range<u64>) -> Sparse {
        let mut part = Sparse::default();
        for number in self.base.used(range) {
            let page = number * PAGE..(number + 1) * PAGE;
            let bytes = self.base.get(&page).into();
            let origin = page.start;
            part.write(&page, &Content::Found { bytes, origin });
        }
        part
    }

    pub fn spots(&self, region: usize) -> &[Range<u64>] {
        &self.spots[region]
    }

    pub fn make_base(&self, path: &Path) -> io::Result<()> {
        let file = File::create(path)?;
        file.set_len(self.size)?;
        for number in self.base.used(&(0..self.size)) {
            let page = number * PAGE..((number + 1) * PAGE).min(self.size);
            file.write_all_at(&self.base.get(&page), page.start)?;
        }
        file.sync_all()
    }

    /// Looks whether the base is as it was made.
    pub fn look_at_base(&self, path: &Path) -> Result<(), String> {
        let file = File::open(path).map_err(|error| error.to_string())?;
        for number in self.base.used(&(0..self.size)) {
            let page = number * PAGE..((number + 1) * PAGE).min(self.size);
            let mut found = vec![0; (page.end - page.start) as usize];
            file.read_exact_at(&mut found, page.start)
                .map_err(|error| error.to_string())?;
            if found != self.base.get(&page) {
                return Err(format!("the base has changed between {page:?}"));
            }
        }
        Ok(())
    }

    /// Looks at bytes whose owners are others: each must be the base's, a zero, or one
    /// that its owner may have written.
    pub fn judge_others(&self, found: &[u8], start: u64, kind: Kind) -> Result<(), Wrong> {
        let base = self.base.get(&(start..start + found.len() as u64));
        let is_right = |at: usize| {
            let (byte, base) = (found[at], base[at]);
            let owner = ((start + at as u64) / self.stride) as usize;
            // Nobody sees what is written over another connection.
            let is_written = kind != Kind::PerConnection
                && (byte == 0 || tag(byte) == tag_of(owner.min(self.spots.len() - 1)));
            byte == base || is_written
        };
        match (0..found.len()).find(|at| !is_right(*at)) {
            None => Ok(()),
            Some(at) => Err(Wrong {
                offset: start + at as u64,
                got: found[at..found.len().min(at + 16)].to_vec(),
                expected: vec![base[at..found.len().min(at + 16)].to_vec()],
            }),
        }
    }
}

fn range_of(number: u64, stride: u64, size: u64, count: u64) -> Range<u64> {
    let end = match number + 1 == count {
        true => size,
        false => (number + 1) * stride,
    };
    number * stride..end
}

/// All of a small region; of a large one its ends and a few places between.
fn spots(region: Range<u64>, random: &mut Random) -> Vec<Range<u64>> {
    let length = region.end - region.start;
    if length <= 64 * MIB {
        return std::iter::once(region).collect();
    }
    let part = length / 4;
    let between = (0..4).map(|number| {
        let start = region.start + number * part + MIB + random.below(part - 3 * MIB);
        start..start + MIB
    });
    let ends = [
        region.start..region.start + MIB / 2,
        region.end - MIB / 2..region.end,
    ];
    ends.into_iter().chain(between).collect()
}

/// What one client knows of its part of the disk.
pub struct Region {
    pub number: usize,
    pub range: Range<u64>,
    /// What clients see.
    pub now: Sparse,
    /// The pages that may ever have had bytes.
    pub touched: BTreeSet<u64>,
    kept: Option<Kept>,
}

/// What an overlay that is kept has after a crash.
struct Kept {
    /// At the last flush.
    safe: Sparse,
    /// What may be there of what came later, in the order in which it took effect.
    since: Vec<Since>,
}

struct Since {
    id: u64,
    change: Change,
    /// When it was known what became of it.
    done: Option<u64>,
    /// It was done as a whole, and so is there after a flush.
    as_a_whole: bool,
}

impl Region {
    pub fn touch(&mut self, range: &Range<u64>) {
        self.touched
            .extend(pages(range.clone()).map(|page| page.start / PAGE));
    }

    /// Where it is worth while to look, in pieces.
    pub fn pieces(&self) -> Vec<Range<u64>> {
        const LONGEST: u64 = 4 * PAGE;
        let mut pieces: Vec<Range<u64>> = Vec::new();
        for number in &self.touched {
            let start = (number * PAGE).max(self.range.start);
            let end = ((number + 1) * PAGE).min(self.range.end);
            match pieces.last_mut() {
                Some(last) if last.end == start && end - last.start <= LONGEST => last.end = end,
                _ => pieces.push(start..end),
            }
        }
        pieces.retain(|piece| !piece.is_empty());
        pieces
    }

    /// A change is on its way.
    pub fn issued(&mut self, id: u64, change: &Change) {
        if !matches!(change.content, Content::Zeroes) {
            self.touch(&change.range);
        }
        if let Some(kept) = &mut self.kept {
            kept.since.push(Since {
                id,
                change: change.clone(),
                done: None,
                as_a_whole: false,
            });
        }
    }

    /// A change was answered with success. `whole` is the part of it that is known to be
    /// done; with `safe` it is on the disk.
    pub fn done(&mut self, id: u64, time: u64, whole: Range<u64>, safe: bool) {
        let Some(kept) = &mut self.kept else { return };
        let Some(at) = kept.since.iter().position(|since| since.id == id) else {
            return;
        };
        if !whole.is_empty() {
            let change = Change {
                range: whole,
                certain: safe,
                ..kept.since[at].change.clone()
            };
            let as_a_whole = Since {
                id,
                change,
                done: Some(time),
                as_a_whole: true,
            };
            kept.since.insert(at + 1, as_a_whole);
        }
    }

    /// It is known of all of a change what became of it.
    pub fn settled(&mut self, id: u64, time: u64) {
        let Some(kept) = &mut self.kept else { return };
        // What was found has its own time: one that is written over would come back in `safe`.
        let mut in_doubt = kept.since.iter_mut().filter(|since| !since.as_a_whole);
        if let Some(since) = in_doubt.find(|since| since.id == id) {
            since.done = Some(time);
        }
    }

    /// A change was refused, and has changed nothing.
    pub fn refused(&mut self, id: u64) {
        if let Some(kept) = &mut self.kept {
            kept.since.retain(|since| since.id != id);
        }
    }

    /// What became of a change that may or may not have been done.
    pub fn found(&mut self, id: u64, time: u64, range: &Range<u64>, bytes: Vec<u8>) {
        self.touch(range);
        let content = Content::Found {
            bytes: bytes.into(),
            origin: range.start,
        };
        self.now.write(range, &content);
        if let Some(kept) = &mut self.kept {
            let change = Change {
                range: range.clone(),
                content,
                certain: false,
                happened: false,
            };
            kept.since.push(Since {
                id,
                change,
                done: Some(time),
                as_a_whole: true,
            });
        }
    }

    /// A flush was answered that was asked for at this time.
    pub fn flushed(&mut self, asked: u64) {
        let Some(Kept { safe, since }) = &mut self.kept else {
            return;
        };
        since.retain(|since| {
            let is_safe = since.done.is_some_and(|done| done < asked);
            if is_safe && since.as_a_whole {
                safe.write(&since.change.range, &since.change.content);
            }
            !is_safe
        });
    }

    /// Looks at what a crash has left, in a file that has the disk, and goes on from that.
    pub fn look_after_a_crash(&mut self, disk: &File) -> Result<(), Wrong> {
        let pieces = self.pieces();
        let Some(kept) = &mut self.kept else {
            return Ok(());
        };
        for piece in pieces {
            let near =
                |change: &Change| change.range.start < piece.end && piece.start < change.range.end;
            let changes = kept.since.iter().map(|since| &since.change);
            let changes: Vec<_> = changes.filter(|change| near(change)).cloned().collect();
            let bytes = read(disk, &piece);
            judge(&bytes, piece.start, &kept.safe.get(&piece), &changes, 512)?;
            let content = Content::Found {
                bytes: bytes.into(),
                origin: piece.start,
            };
            self.now.write(&piece, &content);
            kept.safe.write(&piece, &content);
        }
        kept.since.clear();
        Ok(())
    }

    /// Looks whether a file that has the disk has all that clients have seen.
    pub fn look_after_an_end(&mut self, disk: &File) -> Result<(), Wrong> {
        for piece in self.pieces() {
            let bytes = read(disk, &piece);
            judge(&bytes, piece.start, &self.now.get(&piece), &[], 1)?;
        }
        if let Some(kept) = &mut self.kept {
            kept.safe = self.now.clone();
            kept.since.clear();
        }
        Ok(())
    }
}

/// A raw image of QEMU's ends with a whole sector.
fn read(disk: &File, range: &Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    disk.read_exact_at(&mut bytes, range.start)
        .expect("the disk as QEMU sees it");
    bytes
}

mod tests {
    use super::*;

    /// A fast zero that is refused is known by what was found of those that it has met.
    #[test]
    fn what_was_found_stays_older_than_what_came_next() {
        let range = 0..512;
        let mut region = Region {
            number: 0,
            range: range.clone(),
            now: Sparse::default(),
            touched: BTreeSet::new(),
            kept: Some(Kept {
                safe: Sparse::default(),
                since: Vec::new(),
            }),
        };
        let change = |generation| Change {
            range: range.clone(),
            content: Content::Pattern { tag: 1, generation },
            certain: false,
            happened: false,
        };
        region.issued(1, &change(1));
        region.refused(1);
        region.found(1, 2, &range, vec![7; 512]);
        region.issued(3, &change(3));
        region.done(3, 4, range.clone(), false);
        region.settled(3, 4);
        region.settled(1, 6);
        region.flushed(5);
        region.flushed(7);
        let mut written = vec![0; 512];
        change(3).content.fill(0, &mut written);
        let kept = region.kept.expect("it is kept");
        assert!(kept.since.is_empty());
        assert!(kept.safe.get(&range) == written, "the older one is back");
    }
}
