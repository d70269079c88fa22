//! Full file systems, and a quota: 16 clients at once write until nothing more goes in,
//! trim, and go on.
//!
//! Each client has a region of the disk for itself and a model of it. So after each
//! request it is known what that region must hold, whatever the others do: what was
//! acknowledged, and of each block of a failed request the old bytes or the new.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use crate::harness::command::{LIMIT, command, eventually, outcome};
use crate::harness::mount::{Mount, NbdFuse, Quota};
use crate::harness::nbd::{Client, Request};
use crate::harness::{Base, Server, Setup, noise, run};
use crate::kept::{check, check_after_a_crash};

const WRITERS: u64 = 16;
const REGION: u64 = 4 << 20;
/// Less than half of the disk goes into it.
const ROOM: u64 = 24 << 20;
const BLOCK: u64 = 4096;
/// Behind the regions the disk is empty. A block of the file system has the tables of
/// so much of the disk: each block here that is changed first needs space for new tables.
const FAR: u64 = 32 << 20;
const FAR_PLACES: u64 = 8;
const DISK: u64 = WRITERS * REGION + WRITERS * FAR_PLACES * FAR;

/// NBD has one error for a full file system and for a quota.
const ENOSPC: u32 = 28;

/// Where the overlay is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Overlay {
    Temporary,
    Kept,
}

struct Disk<'a> {
    base: Base,
    directory: &'a Path,
    overlay: Overlay,
}

impl Disk<'_> {
    fn image(&self) -> PathBuf {
        self.directory.join("diff.qcow2")
    }

    fn serve(&self) -> Server {
        let block = format!("cow-block-size={BLOCK}");
        let image = format!("cow-overlay={}", self.image().display());
        let mut plugin = vec!["file", self.base.path(), &block];
        match self.overlay {
            Overlay::Temporary => Setup::new().tmpdir(self.directory).start(&plugin),
            Overlay::Kept => {
                plugin.push(&image);
                Setup::new().start(&plugin)
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Change {
    Write,
    Zero,
    ZeroNoHole,
    Trim,
}

struct Writer {
    client: Client,
    /// Where its region begins.
    start: u64,
    /// What the region must hold.
    content: Vec<u8>,
    random: u64,
    at_quota: bool,
    /// The next place of its own behind the regions.
    far: u64,
}

impl Writer {
    fn new(number: u64, server: &Server, base: &[u8]) -> Writer {
        let start = number * REGION;
        Writer {
            client: Client::connect(&server.socket()).expect("a connection"),
            start,
            content: base[start as usize..(start + REGION) as usize].to_vec(),
            random: number + 1,
            at_quota: false,
            far: WRITERS * REGION + number * FAR_PLACES * FAR,
        }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random = self
            .random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.random >> 33) % limit
    }

    /// A range of the region that no block divides.
    fn place(&mut self) -> (u64, u64) {
        let length = match self.below(3) {
            0 => 1 + self.below(3000),
            1 => 1 + self.below(100_000),
            _ => 1 + self.below(8) * BLOCK,
        };
        (self.below(REGION - length), length)
    }

    fn found(&mut self, at: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        let answer = self.client.read(self.start + at, &mut bytes);
        answer.expect("an answer").expect("a good read");
        bytes
    }

    /// Makes a request, and looks at what it has done. True if it did not fail.
    fn change(&mut self, change: Change, at: u64, length: u64) -> bool {
        let new = match change {
            Change::Write => noise(self.below(1 << 30), length as usize),
            _ => vec![0; length as usize],
        };
        let (offset, len) = (self.start + at, length as u32);
        let request = match change {
            Change::Write => Request::Write { offset, data: &new },
            Change::Zero => Request::Zero {
                offset,
                length: len,
            },
            Change::ZeroNoHole => Request::ZeroNoHole {
                offset,
                length: len,
            },
            Change::Trim => Request::Trim {
                offset,
                length: len,
            },
        };
        let answer = self.client.ask(request).expect("an answer");
        let found = self.found(at, length);
        if let Err(errno) = answer {
            assert_eq!(errno, ENOSPC, "{change:?}");
        }
        let end = at + length;
        for block in (at / BLOCK * BLOCK..end).step_by(BLOCK as usize) {
            let (low, high) = (block.max(at), (block + BLOCK).min(end));
            let part = (low - at) as usize..(high - at) as usize;
            let (found, new) = (&found[part.clone()], &new[part]);
            let old = &self.content[low as usize..high as usize];
            // A trim leaves the parts of a block of the base alone.
            let is_whole = high - low == BLOCK;
            let must_be_new = answer.is_ok() && (is_whole || change != Change::Trim);
            assert!(
                found == new || (!must_be_new && found == old),
                "{change:?} of {length} bytes at {offset}, {answer:?}: wrong bytes in the block at {}",
                self.start + block
            );
        }
        self.content[at as usize..end as usize].copy_from_slice(&found);
        answer.is_ok()
    }

    /// A full file system never makes a flush fail of what was acknowledged. But where a
    /// quota is used up, btrfs refuses at times what has its space.
    fn flush(&mut self) {
        let answer = self.client.ask(Request::Flush).expect("an answer");
        let is_refused = self.at_quota && answer == Err(ENOSPC);
        assert!(answer.is_ok() || is_refused, "{answer:?} to a flush");
    }

    /// Zeroes a block for which an image has no tables yet. Where there is no space for them
    /// that fails, and not the flush that would write them.
    fn zero_far_away(&mut self) {
        let answer = self.client.ask(Request::Zero {
            offset: self.far,
            length: BLOCK as u32,
        });
        let answer = answer.expect("an answer");
        assert!(matches!(answer, Ok(()) | Err(ENOSPC)), "{answer:?}");
        self.far += FAR;
        self.flush();
    }

    /// Writes until nothing more goes in, and on.
    fn fill(&mut self) {
        let mut refused = 0;
        for turn in 0..4000 {
            let (at, length) = self.place();
            let change = match self.below(8) {
                0 => Change::ZeroNoHole,
                _ => Change::Write,
            };
            refused += u32::from(!self.change(change, at, length));
            if refused == 6 {
                for _ in 0..FAR_PLACES / 2 {
                    self.zero_far_away();
                }
                return;
            }
            if turn % 32 == 0 {
                self.flush();
            }
        }
        panic!("the file system did not fill up");
    }

    /// All kinds of changes, of which some find space and others do not.
    fn go_on(&mut self) {
        for _ in 0..30 {
            let (at, length) = self.place();
            let change = match self.below(6) {
                0 => Change::Zero,
                1 => Change::ZeroNoHole,
                2 => Change::Trim,
                _ => Change::Write,
            };
            self.change(change, at, length);
        }
        self.flush();
    }

    fn compare(&mut self) {
        let found = self.found(0, REGION);
        let wrong = found.iter().zip(&self.content).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "in the region at {}", self.start);
    }
}

/// All of them at once.
fn each(writers: &mut [Writer], work: impl Fn(&mut Writer) + Sync) {
    thread::scope(|scope| {
        for writer in writers {
            scope.spawn(|| work(writer));
        }
    });
}

fn fills_up(directory: &Path, overlay: Overlay, quota: Option<&Quota>) {
    let content = noise(1, (WRITERS * REGION) as usize);
    let disk = Disk {
        base: Base::sparse(DISK, &[(0, &content)]),
        directory,
        overlay,
    };
    let server = disk.serve();
    let mut writers: Vec<_> = (0..WRITERS)
        .map(|number| Writer::new(number, &server, &content))
        .collect();
    let allow = |writers: &mut [Writer], bytes: u64, at_quota: bool| {
        if let Some(quota) = quota {
            quota.set(bytes);
            for writer in writers {
                writer.at_quota = at_quota;
            }
        }
    };
    allow(&mut writers, ROOM, true);
    each(&mut writers, Writer::fill);
    each(&mut writers, Writer::compare);
    // Space that is given back is there for the next write, whoever comes first.
    let trim = |writer: &mut Writer| assert!(writer.change(Change::Trim, 0, REGION / 2));
    each(&mut writers, trim);
    if quota.is_some() {
        // No hole could be made until now. The next request that trims has them made.
        allow(&mut writers, ROOM + ROOM / 2, true);
        each(&mut writers, trim);
        let image = || fs::metadata(disk.image()).map_or(0, |image| image.blocks() * 512);
        let stored = || server.overlay_bytes() + image();
        let is_given_back = eventually(LIMIT, || stored() <= ROOM / 4 * 3);
        assert!(is_given_back, "{} bytes are still stored", stored());
    }
    each(&mut writers, |writer| {
        for place in (0..REGION / 8).step_by(64 << 10) {
            assert!(writer.change(Change::Write, place, 64 << 10), "no space");
        }
    });
    each(&mut writers, Writer::go_on);
    each(&mut writers, Writer::fill);
    each(&mut writers, Writer::compare);
    if overlay == Overlay::Temporary {
        return;
    }
    // All of it was flushed, so a crash changes nothing.
    allow(&mut writers, 8 * ROOM, false);
    each(&mut writers, Writer::flush);
    server.kill();
    check_after_a_crash(&disk.image());
    let server = disk.serve();
    for writer in &mut writers {
        writer.client = Client::connect(&server.socket()).expect("a connection");
    }
    each(&mut writers, Writer::compare);
    each(&mut writers, Writer::go_on);
    each(&mut writers, Writer::compare);
    drop(writers);
    server.stop();
    check(&disk.image());
}

fn on_formatted(kind: &str) {
    for overlay in [Overlay::Temporary, Overlay::Kept] {
        let mount = Mount::formatted(kind);
        mount.leave_free(ROOM);
        // What the file system is filled with is beside it.
        let directory = mount.path().join("overlays");
        fs::create_dir(&directory).expect("a directory");
        fills_up(&directory, overlay, None);
    }
}

#[test]
fn sixteen_writers_on_a_full_ext4_lose_nothing() {
    on_formatted("ext4");
}

#[test]
fn sixteen_writers_on_a_full_xfs_lose_nothing() {
    on_formatted("xfs");
}

#[test]
fn sixteen_writers_on_a_full_btrfs_lose_nothing() {
    on_formatted("btrfs");
}

#[test]
fn sixteen_writers_on_a_full_tmpfs_lose_nothing() {
    for overlay in [Overlay::Temporary, Overlay::Kept] {
        fills_up(Mount::tmpfs(&ROOM.to_string()).path(), overlay, None);
    }
}

/// The file system has space, but this directory may have no more of it: EDQUOT.
///
/// Where a quota is used up, btrfs refuses even to make a hole: what is trimmed comes back
/// only when somebody has given a little more.
#[test]
fn sixteen_writers_at_a_quota_lose_nothing() {
    for overlay in [Overlay::Temporary, Overlay::Kept] {
        let quota = Quota::new();
        fills_up(quota.directory(), overlay, Some(&quota));
    }
}

/// The file of this number in the guest.
fn guest_file(guest: &Mount, number: u64) -> (PathBuf, Vec<u8>) {
    let path = guest.path().join(format!("file-{number}"));
    (path, noise(number, 512 << 10))
}

/// Creates that file; when this does not fail, it is on the guest's disk.
fn store(guest: &Mount, number: u64) -> std::io::Result<()> {
    let (path, bytes) = guest_file(guest, number);
    let mut file = File::create(path)?;
    file.write_all(&bytes)?;
    file.sync_all()
}

/// The first `count` files are as they were created.
fn expect_files(guest: &Mount, count: u64) {
    for number in 0..count {
        let (path, bytes) = guest_file(guest, number);
        assert!(fs::read(path).expect("a file") == bytes, "file {number}");
    }
}

/// A guest's file system, with a journal, has no more space below it than for a part of
/// what goes into it.
///
/// Its blocks are of 4K and its files small, so that FUSE makes one request of each write:
/// of a write that was stored in part, Linux tells the guest that all of it was.
fn a_guest_survives(overlay: Overlay) {
    let host = Mount::formatted("ext4");
    host.leave_free(16 << 20);
    let directory = host.path().join("overlays");
    fs::create_dir(&directory).expect("a directory");
    let disk = Disk {
        base: Base::make(|path| {
            let file = File::create(path).expect("create the base");
            file.set_len(128 << 20).expect("extend the base");
            let path = path.to_str().expect("a path of our own making");
            run(&["mkfs.ext4", "-q", "-F", "-b", "4096", path]);
        }),
        directory: &directory,
        overlay,
    };
    let server = disk.serve();

    let fuse = NbdFuse::new(&server.uri());
    let guest = Mount::image(&fuse.file());
    let stored = (0..128).take_while(|number| store(&guest, *number).is_ok());
    let stored = stored.count() as u64;
    assert!((1..128).contains(&stored), "{stored} files found space");
    fs::remove_file(host.path().join("filler")).expect("make space");
    guest.unmount();
    fuse.unmount();

    let fuse = NbdFuse::new(&server.uri());
    let file = fuse.file();
    let file = file.to_str().expect("a path of our own making");
    // Status 1: it has mended something, such as the note that there was an error.
    let mended = outcome(command("e2fsck").args(["-f", "-y", file]));
    let code = mended.status.code();
    assert!(matches!(code, Some(0 | 1)), "{code:?}: {}", mended.stdout);
    run(&["e2fsck", "-fn", file]);
    let guest = Mount::image(&fuse.file());
    let more = stored + 16;
    for number in stored..more {
        store(&guest, number).expect("there is space now");
    }
    expect_files(&guest, more);
    guest.unmount();
    run(&["e2fsck", "-fn", file]);
    fuse.unmount();
    if overlay == Overlay::Temporary {
        server.stop();
        return;
    }
    // What the guest has synced is in the image.
    server.kill();
    check_after_a_crash(&disk.image());
    let server = disk.serve();
    let fuse = NbdFuse::new(&server.uri());
    let guest = Mount::image(&fuse.file());
    expect_files(&guest, more);
    guest.unmount();
    fuse.unmount();
    server.stop();
    check(&disk.image());
}

#[test]
fn a_guest_on_a_full_ext4_survives() {
    a_guest_survives(Overlay::Temporary);
}

#[test]
fn a_guest_whose_image_is_on_a_full_ext4_survives() {
    a_guest_survives(Overlay::Kept);
}
