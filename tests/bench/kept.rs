//! The overlay that is kept: what flushes cost, saving a diff, going on with one.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nbdkit_cow_filter::block::BlockSize;
use nbdkit_cow_filter::kept::KeptStore;
use nbdkit_cow_filter::overlay::Overlay;
use nbdkit_cow_filter::qcow2::file::ImageFile;
use nbdkit_cow_filter::qcow2::header::Header;
use nbdkit_cow_filter::qcow2::image::Image;
use nbdkit_cow_filter::qcow2::layout::Layout;

use super::command::{self, command};
use super::driver::Nothing;
use super::fio::Job;
use super::lab::{DISK, Lab, MEMORY, scratch};
use super::nbd::Request;
use super::processor::{self, scattered};
use super::runner::{self, Cell, Effort, Failure, Kind, Measured, Row};
use super::server::Server;
use super::systems::{Setup, System, sparse};

pub const BLOCK: u64 = 4096;

/// It takes a minute and more; that it is not done by then says enough.
const REBASE: Duration = Duration::from_secs(15);

pub fn all(effort: &Effort) -> Result<Vec<Row>, String> {
    let mut rows = flushes(MEMORY, effort)?;
    if !effort.quick {
        rows.extend(flushes(DISK, effort)?);
    }
    rows.push(save(effort)?);
    for place in [MEMORY, DISK] {
        rows.push(move_home(place, effort)?);
    }
    rows.extend(first_connection(effort)?);
    Ok(rows)
}

/// 4K random writes with a flush after every so many.
fn flushes(place: &str, effort: &Effort) -> Result<Vec<Row>, String> {
    let lab = Lab::new(place, effort)?;
    let loads = [(0, "never"), (32, "32"), (1, "1")].map(|(flush_every, name)| {
        let job = Job {
            flush_every,
            ..lab.job("randwrite", BLOCK, 16)
        };
        let how_often = match flush_every {
            0 => "no flush".into(),
            1 => "a flush after every one".into(),
            many => format!("a flush after every {many}"),
        };
        let title = format!("4K random write, 16 in flight, {how_often}");
        let mut load = lab.load(&format!("kept-{name}"), &title, job);
        load.systems = vec![System::Kept, System::NoFilter, System::QemuKept];
        if flush_every == 0 {
            // With flushes there is nothing to compare with: it keeps nothing.
            load.systems.push(System::Ours);
        }
        load
    });
    let mut rates: Vec<_> = loads.iter().map(|load| lab.rate(load)).collect();
    for cell in &mut rates {
        cell.rounds = effort.rounds;
    }
    let mut rows = runner::run(rates);
    rows.extend(processor::rows(&lab, &loads)?);
    Ok(rows)
}

/// What 1 % of `size` bytes is in pieces of so many, and where they are: everywhere.
fn one_percent(size: u64, piece: u64) -> impl Iterator<Item = u64> {
    let pieces = size / piece;
    (0..pieces / 100).map(move |index| scattered(index, pieces) * piece)
}

/// What is written at once before a diff is saved. (In pieces of 4K, each of which costs
/// it a cluster, qemu-img would make an image of 10G.)
const PIECE: u64 = 64 << 10;

/// From the last acknowledged write until the diff is a file that can be used.
fn save(effort: &Effort) -> Result<Row, String> {
    let scratch = scratch(DISK)?;
    let place = scratch.path();
    let size = if effort.quick { 1 << 30 } else { 64 << 30 };
    let disk = place.join("disk.img");
    sparse(&disk, size)?;
    let setup = Setup::disk(&disk);
    let data = [0x5a; PIECE as usize];
    let measure = |system| -> Measured {
        let mut server = setup.start(system, place)?;
        let mut client = server.client()?;
        let writes = one_percent(size, PIECE).map(|offset| Request::Write {
            offset,
            data: &data,
        });
        let written = client.all(writes, 16);
        written.map_err(|error| server.explain(error.to_string()))?;
        drop(client);
        if system == System::Kept {
            return Ok(server.stop().as_secs_f64());
        }
        let rebased = rebase(&server, &disk, place).map_err(Failure::NotAsked)?;
        Ok(rebased.as_secs_f64())
    };
    let gigabytes = size >> 30;
    let cell = Cell {
        id: "kept-save".into(),
        title: format!("saving the diff of a sparse {gigabytes}G disk, 1 % of it written, on disk"),
        kind: Kind::Amount("s"),
        rounds: effort.rounds,
        systems: vec![System::Kept, System::Ours],
        measure: Box::new(measure),
    };
    Ok(runner::run_one(cell))
}

/// The way to a diff for an overlay that is not kept, while nbdkit still runs.
fn rebase(server: &Server, disk: &Path, place: &Path) -> Result<Duration, String> {
    let diff = place.join("rebased.qcow2");
    let start = Instant::now();
    let served = format!("nbd:unix:{}", server.socket().display());
    let mut create = command("qemu-img");
    create
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &served])
        .arg(&diff);
    command::run(&mut create, command::LIMIT)?;
    let mut rebase = command("qemu-img");
    rebase
        .args(["rebase", "-f", "qcow2", "-F", "raw", "-b"])
        .args([disk, &diff]);
    command::run(&mut rebase, REBASE)?;
    let took = start.elapsed();
    std::fs::remove_file(&diff).map_err(|error| format!("the diff: {error}"))?;
    Ok(took)
}

/// Start-up with an image to which qemu has written, beside a copy of the same image. Both
/// end when what they have written is on the disk.
fn move_home(place: &str, effort: &Effort) -> Result<Row, String> {
    let on_disk = place == DISK;
    let scratch = scratch(place)?;
    let place = scratch.path();
    let size = if effort.quick { 128 << 20 } else { 1 << 30 };
    let disk = place.join("disk.img");
    sparse(&disk, 2 * size)?;
    let image = place.join("by-qemu.qcow2");
    write_by_qemu(&disk, &image, size)?;
    let copy = place.join("copy.qcow2");
    let setup = Setup::disk(&disk).resuming(&copy);
    let cell = Cell {
        id: if on_disk {
            "disk-kept-move"
        } else {
            "kept-move"
        }
        .into(),
        title: format!(
            "start-up with an image to which qemu wrote {} MiB{} (no filter: a copy of it)",
            size >> 20,
            if on_disk { ", on disk" } else { "" }
        ),
        kind: Kind::Amount("s"),
        rounds: effort.rounds,
        systems: vec![System::Kept, System::NoFilter],
        measure: Box::new(|system| {
            let copied = copy_and_sync(&image, &copy)?;
            let took = match system {
                System::Kept => setup.start(system, place)?.start_up,
                _ => copied,
            };
            std::fs::remove_file(&copy).map_err(|error| format!("the copy: {error}"))?;
            Ok(took.as_secs_f64())
        }),
    };
    Ok(runner::run_one(cell))
}

/// An image of ours, to which qemu has written from the second cluster on, in order: it
/// puts each cluster into the place of the one before.
fn write_by_qemu(disk: &Path, image: &Path, size: u64) -> Result<(), String> {
    let place = image.parent().expect("a file in a directory");
    Setup::disk(disk)
        .resuming(image)
        .start(System::Kept, place)?
        .stop();
    let mut write = command("qemu-io");
    for megabyte in 0..size >> 20 {
        let at = (megabyte << 20) + 32 * BLOCK;
        write.args(["-c", &format!("write -q -P {} {at} 1M", megabyte % 255 + 1)]);
    }
    command::run(write.args(["-f", "qcow2"]).arg(image), command::LIMIT)?;
    Ok(())
}

fn copy_and_sync(from: &Path, to: &Path) -> Result<Duration, String> {
    let start = Instant::now();
    let mut copy = command("cp");
    copy.args(["--sparse=auto", "--reflink=never"])
        .args([from, to]);
    command::run(&mut copy, command::LIMIT)?;
    File::open(to)
        .and_then(|file| file.sync_all())
        .map_err(|error| format!("syncing the copy: {error}"))?;
    Ok(start.elapsed())
}

/// What it takes to know the base by its samples, which are read one after the other. An
/// overlay that is temporary has none.
fn first_connection(effort: &Effort) -> Result<Vec<Row>, String> {
    let scratch = scratch(MEMORY)?;
    let place = scratch.path();
    let disk = place.join("disk.img");
    sparse(&disk, 1 << 40)?;
    let image = place.join("diff.qcow2");
    let made = Setup::disk(&disk).resuming(&image);
    let server = made.start(System::Kept, place)?;
    let data = [0x5a; BLOCK as usize];
    let write = Request::Write {
        offset: BLOCK,
        data: &data,
    };
    let written = server.client()?.all([write], 1);
    written.map_err(|error| format!("an image: {error}"))?;
    server.stop();

    let slow = Setup::disk(&disk).slow();
    let rows = [
        ("kept-made-slow", "a new image", slow.clone()),
        (
            "kept-resume-slow",
            "an image that was written to",
            slow.resuming(&image),
        ),
    ];
    let cells = rows.map(|(id, what, setup)| Cell {
        id: id.into(),
        title: format!("start-up with {what}, 1T disk, each read of which takes 5 ms"),
        kind: Kind::Amount("ms"),
        rounds: effort.rounds,
        systems: vec![System::Kept, System::Ours],
        measure: Box::new(move |system| {
            let server = setup.start(system, place)?;
            Ok(server.start_up.as_secs_f64() * 1e3)
        }),
    });
    Ok(runner::run(cells.into()))
}

/// Makes an image as nbdkit would leave it after writing to 1 % of the disk, but for
/// the 10G of data, which a start does not look at.
pub fn make_image(path: &Path, size: u64) -> nbdkit_cow_filter::error::Result<()> {
    let block_size = BlockSize::new(BLOCK).expect("a power of two");
    let layout = Layout::new(size, block_size)?;
    let header = Header::new(layout, b"disk.img".to_vec(), None);
    let file = File::create_new(path)
        .and_then(|_| File::options().read(true).write(true).open(path))
        .map_err(|error| nbdkit_cow_filter::error::Error::io(error, "making the image"))?;
    let file = TablesOnly {
        file,
        data: header.layout.data,
    };
    let image = Image::create(file, path, &header)?;
    let overlay = Overlay::new(size, block_size, KeptStore::new(image, false));
    let (base, bytes) = (Nothing(size), [0x5a; BLOCK as usize]);
    for offset in one_percent(size, BLOCK) {
        overlay.write(&base, &bytes, offset)?;
    }
    overlay.flush()
}

/// An image's file without the data.
struct TablesOnly {
    file: File,
    data: u64,
}

impl ImageFile for TablesOnly {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.file.set_size(size)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if offset >= self.data {
            return Ok(());
        }
        self.file.write_at(buf, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn write_synced(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_synced(buf, offset)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.file.punch(offset, len)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.file.zero_range(offset, len)
    }
}
