//! The base, the image beside it, and the bytes that the disk must have.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use super::random::Random;
use crate::harness::command::outcome;
use crate::harness::qemu::Qemu;
use crate::harness::{noise, run_in, scratch};
use crate::kept::text;

/// What the image is called in its directory.
pub const IMAGE: &str = "diff.qcow2";
const SECTOR: usize = 512;

/// What `qemu-img check` may find.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Flaws {
    None,
    /// Whoever wrote to it was killed.
    Leaks,
    /// The same, when refcounts were lazy.
    WrongRefcounts,
}

pub struct Disk {
    directory: TempDir,
    /// The name of the base in there.
    pub base: String,
    /// The exact size of the disk.
    pub size: u64,
    pub block: u64,
    /// As QEMU sees the disk: whole sectors.
    pub content: Vec<u8>,
    /// What may have been stored after `content`, or not: (offset, bytes). Each sector has
    /// all of it or nothing.
    pub in_flight: Vec<(usize, Vec<u8>)>,
    /// QEMU was killed: a sector that was in flight may have anything, as QEMU reads it.
    /// (A new block of which a part was stored can have zeroes in the rest.)
    pub is_torn: bool,
    pub flaws: Flaws,
    layout: Option<Layout>,
    seed: u64,
    notes: Vec<String>,
}

/// What the filter never changes once an image is made.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    length: u64,
    /// Fields of the header: all but the name of the base and what may be set in the
    /// compatible features.
    header: Vec<Vec<u8>>,
}

impl Drop for Disk {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.directory.disable_cleanup(true);
            eprintln!(
                "the seed is {}, with blocks of {}; what there is, is in {}\n{}",
                self.seed,
                self.block,
                self.directory.path().display(),
                self.notes.join("\n")
            );
        }
    }
}

impl Disk {
    pub fn new(size: u64, block: u64, seed: u64) -> Disk {
        let directory = scratch();
        let base = "disk.img".to_string();
        let mut random = Random::new(!seed);
        let mut content = vec![0; size.next_multiple_of(SECTOR as u64) as usize];
        for number in 0..size / 400_000 {
            let length = random.below(200_000) as usize;
            let start = random.below(size - length as u64) as usize;
            content[start..start + length].copy_from_slice(&noise(number + 1, length));
        }
        let disk = Disk {
            directory,
            base,
            size,
            block,
            content,
            in_flight: Vec::new(),
            is_torn: false,
            flaws: Flaws::None,
            layout: None,
            seed,
            notes: vec![format!("{size} bytes")],
        };
        disk.write_sparse(&disk.base, &disk.content[..size as usize]);
        disk
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }

    pub fn image(&self) -> PathBuf {
        self.path(IMAGE)
    }

    pub fn cluster(&self) -> u64 {
        32 * self.block
    }

    pub fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// Makes a file that has holes where the bytes are zeroes.
    pub fn write_sparse(&self, name: &str, bytes: &[u8]) {
        let file = File::create(self.path(name)).expect("create a file");
        file.set_len(bytes.len() as u64).expect("extend it");
        for (number, piece) in bytes.chunks(65_536).enumerate() {
            if piece.iter().any(|byte| *byte != 0) {
                file.write_all_at(piece, number as u64 * 65_536)
                    .expect("write it");
            }
        }
    }

    /// What a write changes in the model.
    pub fn set(&mut self, start: usize, bytes: &[u8]) {
        self.content[start..start + bytes.len()].copy_from_slice(bytes);
    }

    /// Offset and length of something on the disk: anywhere, often on a border, now and
    /// then at its end.
    pub fn span(&self, random: &mut Random, unit: u64) -> (u64, u64) {
        let (block, cluster) = (self.block, self.cluster());
        let longest = [700, 40 * block, 3 * cluster, 200_000][random.below(4) as usize];
        let length = (1 + random.below(longest)).min(self.size / 2);
        let border = random.among(&[1, 512, block, cluster]).max(unit);
        let length = length.next_multiple_of(random.among(&[1, block]).max(unit));
        let start = if random.below(12) == 0 {
            self.size - length
        } else {
            random.below(self.size - length)
        };
        (start / border * border, length)
    }

    /// Bytes for a write: now and then zeroes.
    pub fn bytes(&self, random: &mut Random, length: u64) -> Vec<u8> {
        if random.below(12) == 0 {
            vec![0; length as usize]
        } else {
            noise(random.next(), length as usize)
        }
    }

    pub fn has_lazy_refcounts(&self) -> bool {
        // Byte 80 to 87: the compatible features, of which this is the lowest bit.
        self.header()[87] & 1 != 0
    }

    /// The bits of a refcount are two to this power.
    pub fn refcount_order(&self) -> u8 {
        self.header()[99]
    }

    fn header(&self) -> Vec<u8> {
        let mut header = vec![0; 112];
        File::open(self.image())
            .and_then(|image| image.read_exact_at(&mut header, 0))
            .expect("the header");
        header
    }

    /// The image is sound, as far as it can be, and QEMU reads what the model has.
    pub fn check_with(&mut self, qemu: &Qemu) {
        let directory = self.directory().to_path_buf();
        let check = ["check", "-f", "qcow2", IMAGE];
        let ended = outcome(qemu.command("qemu-img").args(check).current_dir(&directory));
        let code = ended.status.code();
        let found = match code {
            Some(0) => Some(Flaws::None),
            Some(3) => Some(Flaws::Leaks),
            Some(2) => Some(Flaws::WrongRefcounts),
            _ => None,
        };
        assert!(
            found.is_some_and(|found| found <= self.flaws),
            "{code:?} where {:?} is allowed: {}{}",
            self.flaws,
            ended.stdout,
            ended.stderr
        );
        let convert = [
            "qemu-img", "convert", "-f", "qcow2", "-O", "raw", IMAGE, "read.raw",
        ];
        qemu.run_in(&directory, &convert);
        let read = fs::read(self.path("read.raw")).expect("the converted image");
        self.settle(&read);
    }

    /// Takes what was read for what the disk has, where it may be so.
    pub fn settle(&mut self, read: &[u8]) {
        assert_eq!(read.len(), self.content.len());
        let mut new = self.content.clone();
        let is_torn = std::mem::take(&mut self.is_torn);
        for (start, bytes) in self.in_flight.drain(..) {
            let range = start..start + bytes.len();
            let may_be = if is_torn {
                &read[range.clone()]
            } else {
                &bytes
            };
            new[range].copy_from_slice(may_be);
        }
        if read == self.content {
            return;
        }
        let mut wrong = Vec::new();
        for start in (0..read.len()).step_by(SECTOR) {
            let range = start..start + SECTOR;
            if read[range.clone()] == self.content[range.clone()] {
                continue;
            }
            if read[range.clone()] == new[range.clone()] {
                self.content[range.clone()].copy_from_slice(&new[range]);
            } else {
                wrong.push(start);
            }
        }
        assert!(
            wrong.is_empty(),
            "{} sectors are wrong, from {} to {}",
            wrong.len(),
            wrong[0],
            wrong[wrong.len() - 1]
        );
    }

    /// After a clean end of the filter: sound, without leaks, and everything at the place
    /// where the filter puts it.
    pub fn assert_at_home(&mut self) {
        let qemu = &Qemu::all()[0];
        self.flaws = Flaws::None;
        self.check_with(qemu);

        let header = self.header();
        // Up to the name of the base; what follows, up to the compatible features; the
        // width of refcounts and the length of the header.
        let header = [0..8, 20..80, 96..104].map(|range| header[range].to_vec());
        let layout = Layout {
            length: fs::metadata(self.image()).expect("the image").len(),
            header: header.to_vec(),
        };
        let data = layout.length - self.size.next_multiple_of(self.cluster());
        match &self.layout {
            None => self.layout = Some(layout),
            Some(first) => assert_eq!(&layout, first, "the layout is another one"),
        }

        let said = qemu.run_in(
            self.directory(),
            &["qemu-img", "map", "--output=json", IMAGE],
        );
        let entries: Value = serde_json::from_str(&said).expect("JSON");
        for entry in entries.as_array().expect("a list") {
            if entry["depth"] == 0 && entry["data"] == true {
                let start = entry["start"].as_u64().expect("a number");
                assert_eq!(entry["offset"], data + start, "{start} is not at its place");
            }
        }
    }

    /// The base has the bytes of the disk: they were committed.
    pub fn assert_committed(&self) {
        let base = self.path(&self.base);
        // As the manual says: QEMU makes it a whole number of sectors.
        File::options()
            .write(true)
            .open(&base)
            .and_then(|file| file.set_len(self.size))
            .expect("cut the base");
        let base = fs::read(base).expect("the base");
        assert!(
            base == self.content[..self.size as usize],
            "the base is not what was committed"
        );
    }

    /// Puts a copy of the image aside, to be looked at when what comes next fails.
    pub fn keep_copy(&self) {
        let words = [
            "cp",
            "--sparse=always",
            "--reflink=auto",
            IMAGE,
            "before.qcow2",
        ];
        run_in(self.directory(), &words);
    }

    pub fn image_text(&self) -> String {
        text(&self.image()).to_string()
    }
}
