//! Where the requests of a client go.

use std::ops::Range;

use super::client::Client;
use crate::harness::nbd::{CMD_WRITE, header};

impl Client<'_> {
    /// A place where bytes are written in this region.
    pub fn somewhere(&mut self) -> u64 {
        let spots = self.disk.spots(self.region.number);
        let spot = &spots[self.random.below(spots.len() as u64) as usize];
        spot.start + self.random.below(spot.end - spot.start)
    }

    /// A range in a spot of this region: of any alignment, of sectors or of blocks.
    pub fn place(&mut self) -> Range<u64> {
        let block = self.mix.block;
        let start = match self.random.once_in(20) {
            true => self.somewhere(),
            false => self.focus + self.random.below(8 * block),
        };
        let length = match self.random.below(100) {
            0..50 => 1 + self.random.below(4096),
            50..80 => block * (1 + self.random.below(3)),
            80..97 => 1 + self.random.below(64 << 10),
            _ => 1 + self.random.below(self.mix.longest),
        };
        let unit = self.random.of(&[1, 512, block]);
        let start = start / unit * unit;
        let length = length
            .next_multiple_of(unit)
            .min(self.mix.longest.max(block));
        let spots = self.disk.spots(self.region.number);
        let spot = spots.iter().find(|spot| spot.contains(&start));
        match spot {
            Some(spot) => start..(start + length).min(spot.end),
            None => 0..0,
        }
    }

    /// Much of the region, or all of it.
    pub fn large(&mut self) -> Range<u64> {
        let region = self.region.range.clone();
        let start = region.start + self.random.below(region.end - region.start);
        let longest = ((4u64 << 30) - 1).min(region.end - start);
        let length = match self.random.once_in(20) {
            true => longest,
            false => 1 + self.random.below(longest / 8),
        };
        start..start + length
    }

    /// Anywhere in the region.
    pub fn elsewhere(&mut self) -> Range<u64> {
        let region = self.region.range.clone();
        let start = region.start + self.random.below(region.end - region.start);
        start..(start + self.mix.longest).min(region.end)
    }

    /// A range that begins in the region of another client, or reaches into one.
    pub fn of_others(&mut self) -> Range<u64> {
        let region = self.region.range.clone();
        let length = 1 + self.random.below(self.mix.longest);
        let start = match self.random.below(3) {
            0 => region.start.saturating_sub(self.random.below(length)),
            1 => region.end.saturating_sub(self.random.below(length)),
            _ => {
                let other = self.random.below(self.mix.regions as u64) as usize;
                let spots = self.disk.spots(other);
                let spot = &spots[self.random.below(spots.len() as u64) as usize];
                spot.start + self.random.below(spot.end - spot.start)
            }
        };
        start..(start + length).min(self.disk.size)
    }

    /// The bytes of a request of which not all are going to be sent.
    pub fn any_write(&mut self) -> Vec<u8> {
        let range = self.place();
        let length = (range.end - range.start) as u32;
        let cookie = self.tick();
        let mut message = header(CMD_WRITE, 0, cookie, range.start, length).to_vec();
        message.resize(message.len() + length as usize, 0xff);
        message
    }
}
