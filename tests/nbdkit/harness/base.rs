//! A base file that must come out of every test as it went in.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// The promise of the filter is that the base does not change by a byte, nor in
/// its modification time: looked at when the value is dropped, which is after
/// the `Server` if that was declared later.
pub struct Base {
    path: PathBuf,
    seal: Option<Seal>,
    _directory: TempDir,
}

#[derive(PartialEq, Debug)]
struct Seal {
    size: u64,
    hash: u64,
    modified: (i64, i64),
}

impl Base {
    /// A file with these bytes.
    pub fn new(content: &[u8]) -> Base {
        Base::make(|path| fs::write(path, content).expect("write the base"))
    }

    /// A sparse file: (offset, bytes) pieces with holes around them.
    pub fn sparse(size: u64, pieces: &[(u64, &[u8])]) -> Base {
        Base::make(|path| {
            let file = File::create(path).expect("create the base");
            file.set_len(size).expect("extend the base");
            for (offset, bytes) in pieces {
                file.write_all_at(bytes, *offset).expect("write the base");
            }
            // Until the data is on the disk, ext4 may still move its borders.
            file.sync_all().expect("sync the base");
        })
    }

    /// A file that the function makes at the path it is given.
    pub fn make(make: impl FnOnce(&Path)) -> Base {
        let directory = super::scratch();
        let path = directory.path().join("disk.img");
        make(&path);
        let seal = Some(Seal::of(&path));
        Base {
            path,
            seal,
            _directory: directory,
        }
    }

    pub fn path(&self) -> &str {
        self.path.to_str().expect("a path of our own making")
    }

    pub fn directory(&self) -> &Path {
        self.path.parent().expect("a file is in a directory")
    }

    /// For the tests that are about a base which changes: it is not looked at any more.
    pub fn grow_to(&mut self, size: u64) {
        self.seal = None;
        File::options()
            .write(true)
            .open(&self.path)
            .and_then(|file| file.set_len(size))
            .expect("grow the base");
    }

    pub fn assert_unchanged(&self) {
        if let Some(seal) = &self.seal {
            assert_eq!(&Seal::of(&self.path), seal, "{:?} changed", self.path);
        }
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.assert_unchanged();
        }
    }
}

impl Seal {
    fn of(path: &Path) -> Seal {
        let file = File::open(path).expect("open the base");
        let about = file.metadata().expect("stat the base");
        Seal {
            size: about.len(),
            hash: hash(&file, about.len()),
            modified: (about.mtime(), about.mtime_nsec()),
        }
    }
}

/// Blocks of zeroes are left out, and holes are not read, so that a disk of a
/// terabyte can be sealed; where a block is counts as much as what is in it.
fn hash(file: &File, size: u64) -> u64 {
    const STEP: u64 = 1 << 20;
    let mut hasher = DefaultHasher::new();
    let mut buffer = vec![0; STEP as usize];
    let mut at = 0;
    while let Some(data) = next_data(file, at) {
        at = data / STEP * STEP;
        let length = STEP.min(size - at) as usize;
        file.read_exact_at(&mut buffer[..length], at)
            .expect("read the base");
        for (index, block) in buffer[..length].chunks(512).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                hasher.write_u64(at / 512 + index as u64);
                hasher.write(block);
            }
        }
        at += length as u64;
    }
    hasher.finish()
}

fn next_data(file: &File, from: u64) -> Option<u64> {
    let from = libc::off_t::try_from(from).expect("an offset");
    // SAFETY: lseek works on a descriptor that `file` keeps open, and touches no memory of ours.
    let found = unsafe { libc::lseek(file.as_raw_fd(), from, libc::SEEK_DATA) };
    // Nothing but the end of the file makes SEEK_DATA fail here.
    u64::try_from(found).ok()
}
