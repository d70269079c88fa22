//! What must be true of every file that a crash leaves.

use std::collections::HashSet;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::slice;

use tempfile::TempDir;

use super::content::{Content, SECTOR, Sector};
use super::crash::{Allowed, Bound, base_sector, explore};
use super::disk::{BACKING, Disk, resume, sector};
use super::random::Random;
use super::reader::Reader;
use super::recorder::Recorder;

/// Has `qemu-img check` look at images.
pub struct Qemu {
    directory: TempDir,
    seen: HashSet<u64>,
    /// How many images it is still shown.
    left: usize,
    pub shown: usize,
}

impl Qemu {
    pub fn new(most: usize) -> Self {
        let directory = tempfile::tempdir_in("/var/tmp").expect("a directory");
        File::create(directory.path().join(BACKING)).expect("a backing file");
        Qemu {
            directory,
            seen: HashSet::new(),
            left: most,
            shown: 0,
        }
    }

    /// Errors that it finds in `content`, whose tables lie in `tables`. It looks at
    /// nothing else, so images that differ elsewhere are shown to it once.
    pub fn check(&mut self, content: &Content, tables: &[Range<u64>]) -> Result<(), String> {
        let mut hasher = DefaultHasher::new();
        content.size.hash(&mut hasher);
        for sector in present(content, tables) {
            sector.hash(&mut hasher);
        }
        if !self.seen.insert(hasher.finish()) || self.left == 0 {
            return Ok(());
        }
        self.left -= 1;
        self.shown += 1;
        match self.run(&["check", "-f", "qcow2"], content, tables) {
            (Some(0 | 3), _) => Ok(()),
            (code, said) => Err(format!("qemu-img check ends with {code:?}: {said}")),
        }
    }

    pub fn assert_clean(&self, content: &Content, data: u64) {
        let (code, said) = self.run(
            &["check", "-f", "qcow2"],
            content,
            slice::from_ref(&(0..data)),
        );
        assert_eq!(code, Some(0), "qemu-img check: {said}");
    }

    /// What `qemu-img info` tells of an image.
    pub fn info(&self, content: &Content, data: u64) -> serde_json::Value {
        let words = ["info", "--output=json", "-f", "qcow2"];
        let (code, said) = self.run(&words, content, slice::from_ref(&(0..data)));
        assert_eq!(code, Some(0), "qemu-img info: {said}");
        serde_json::from_str(&said).expect("JSON")
    }

    /// That the disk in `content` has the bytes of `disk`, over a base of zeroes.
    pub fn compare(&self, content: &Content, disk: &Content) -> Result<(), String> {
        let name = "disk";
        let path = self.write(name, disk, slice::from_ref(&(0..disk.size)));
        let words = ["compare", "-f", "raw", "-F", "qcow2", name];
        let (code, said) = self.run(&words, content, slice::from_ref(&(0..content.size)));
        fs::remove_file(path).expect("it is ours");
        match code {
            Some(0) => Ok(()),
            code => Err(format!("qemu-img compare ends with {code:?}: {said}")),
        }
    }

    /// Makes a file of what lies in `ranges`.
    fn write(&self, name: &str, content: &Content, ranges: &[Range<u64>]) -> PathBuf {
        let path = self.directory.path().join(name);
        let file = File::create(&path).expect("a file");
        file.set_len(content.size).expect("a sparse file");
        for (at, sector) in present(content, ranges) {
            let len = (content.size - at).min(SECTOR) as usize;
            file.write_all_at(&sector[..len], at).expect("room for it");
        }
        path
    }

    fn run(
        &self,
        words: &[&str],
        content: &Content,
        tables: &[Range<u64>],
    ) -> (Option<i32>, String) {
        let path = self.write("image", content, tables);
        let ended = Command::new("qemu-img")
            .args(words)
            .arg("image")
            .current_dir(self.directory.path())
            .output()
            .expect("qemu-img runs (`make deps` installs it)");
        // Not made anew the next time: some file systems write a file out at once that
        // was truncated.
        fs::remove_file(&path).expect("it is ours");
        let said = [ended.stdout, ended.stderr].concat();
        (ended.status.code(), String::from_utf8_lossy(&said).into())
    }
}

fn present<'a>(
    content: &'a Content,
    ranges: &'a [Range<u64>],
) -> impl Iterator<Item = (u64, &'a Sector)> {
    ranges
        .iter()
        .flat_map(|range| content.present(range.clone()))
}

/// Looks at one file: QEMU finds no error, our own code goes on with it, and both that
/// and an independent reader find on the disk what may be there.
pub fn check(disk: &Disk, content: &Content, allowed: &Allowed<'_>) -> Result<(), String> {
    let reader = Reader::open(content)?;
    let report = reader.check();
    let errors = report.all_errors();
    if !errors.is_empty() {
        return Err(errors);
    }
    if let Some(block) = reader.subclusters().find(|block| !allowed.touches(*block)) {
        return Err(format!("block {block}, which nobody touched, has changed"));
    }
    let overlay = resume(&Recorder::holding(content.clone())).map_err(|e| e.to_string())?;
    for number in allowed.numbers() {
        let theirs = reader
            .sector(number)
            .unwrap_or_else(|| base_sector(&disk.base, number));
        allowed.expect(number, &theirs)?;
        if sector(&disk.base, &overlay, number) != theirs {
            return Err(format!("sector {number} is read in two ways"));
        }
    }
    Ok(())
}

/// Looks at the files that crashes could leave of all that was recorded of `disk`.
pub fn check_all(disk: &Disk, bound: Bound, random: &mut Random, qemu: &mut Qemu) {
    check_with(disk, bound, random, qemu, |_| 0, &mut |_, _| {});
}

/// As [`check_all`], with the owners of sectors, and has `each` look at them too.
pub fn check_with<'a>(
    disk: &'a Disk,
    bound: Bound,
    random: &mut Random,
    qemu: &mut Qemu,
    owner: impl Fn(u64) -> u64,
    each: &mut dyn FnMut(&Content, &Allowed<'a>),
) -> usize {
    let data = disk.layout().data;
    let mut count = 0;
    explore(
        &disk.start,
        disk.allowed_at_start(),
        &disk.recorder.events(),
        bound,
        random,
        owner,
        &mut |content, allowed| {
            count += 1;
            each(content, allowed);
            qemu.check(content, slice::from_ref(&(0..data)))?;
            check(disk, content, allowed)
        },
    );
    count
}

/// After a flush: neither an error nor a leak, and the disk as the model has it.
pub fn assert_settled(disk: &Disk, qemu: &Qemu) {
    let content = disk.recorder.content();
    let report = Reader::open(&content).expect("an image").check();
    assert_eq!(report, Default::default());
    qemu.assert_clean(&content, disk.layout().data);
    disk.assert_as_model();
    let again = resume(&Recorder::holding(content)).expect("resumable");
    for (number, expected) in &disk.model {
        let found = sector(&disk.base, &again, *number);
        assert!(found == **expected, "sector {number}, resumed");
    }
}
