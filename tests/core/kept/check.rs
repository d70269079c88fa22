//! What must be true of every file that a crash leaves.

use std::collections::HashSet;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::FileExt;
use std::process::Command;

use tempfile::TempDir;

use super::content::Content;
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

    /// Errors that it finds in `content`, whose tables end at `data`. It looks at
    /// nothing else, so images that differ elsewhere are shown to it once.
    fn check(&mut self, content: &Content, data: u64) -> Result<(), String> {
        let mut hasher = DefaultHasher::new();
        for sector in content.present(0..data) {
            sector.hash(&mut hasher);
        }
        if !self.seen.insert(hasher.finish()) || self.left == 0 {
            return Ok(());
        }
        self.left -= 1;
        self.shown += 1;
        match self.run(&["check"], content, data) {
            (Some(0 | 3), _) => Ok(()),
            (code, said) => Err(format!("qemu-img check ends with {code:?}: {said}")),
        }
    }

    pub fn assert_clean(&self, content: &Content, data: u64) {
        let (code, said) = self.run(&["check"], content, data);
        assert_eq!(code, Some(0), "qemu-img check: {said}");
    }

    /// What `qemu-img info` tells of an image.
    pub fn info(&self, content: &Content, data: u64) -> serde_json::Value {
        let (code, said) = self.run(&["info", "--output=json"], content, data);
        assert_eq!(code, Some(0), "qemu-img info: {said}");
        serde_json::from_str(&said).expect("JSON")
    }

    fn run(&self, words: &[&str], content: &Content, data: u64) -> (Option<i32>, String) {
        let path = self.directory.path().join("image");
        let file = File::create(&path).expect("an image file");
        file.set_len(content.size).expect("a sparse file");
        for (at, sector) in content.present(0..data) {
            file.write_all_at(sector, at).expect("room for it");
        }
        drop(file);
        let ended = Command::new("qemu-img")
            .args(words)
            .args(["-f", "qcow2"])
            .arg(&path)
            .output()
            .expect("qemu-img runs (`make deps` installs it)");
        // Not made anew the next time: some file systems write a file out at once that
        // was truncated.
        fs::remove_file(&path).expect("it is ours");
        let said = [ended.stdout, ended.stderr].concat();
        (ended.status.code(), String::from_utf8_lossy(&said).into())
    }
}

/// Looks at one file: QEMU finds no error, our own code goes on with it, and both that
/// and an independent reader find on the disk what may be there.
pub fn check(disk: &Disk, content: &Content, allowed: &Allowed<'_>) -> Result<(), String> {
    let reader = Reader::open(content)?;
    let report = reader.check();
    if !report.errors.is_empty() {
        return Err(report.errors.join("\n"));
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
            qemu.check(content, data)?;
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
