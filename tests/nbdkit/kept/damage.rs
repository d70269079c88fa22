//! Damaged images: each is refused in a sentence and left as it is, or what is wrong
//! with it does no harm.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use super::{Disk, Seal, assert_says, check, text};
use crate::harness::{Setup, run, scratch};

/// Where things lie in the image, by its own header.
struct Image {
    disk: Disk,
    bytes: Vec<u8>,
    /// What is in the disk.
    content: Vec<u8>,
    directory: TempDir,
}

impl Image {
    fn new(block: u64) -> Image {
        let disk = Disk::new(600_000, block);
        let server = disk.serve();
        // The first cluster has blocks of all kinds, and so has the second.
        let code = r#"
            cluster = 32 * disk.block
            for start in [0, cluster]:
                disk.write(start + 3 * disk.block, noise(2 * disk.block, start))
                disk.trim(start + 6 * disk.block, start + 9 * disk.block)
            disk.check().save()
        "#;
        disk.client(&server, 1, code);
        server.stop();
        disk.assert_sound();
        let bytes = fs::read(disk.overlay()).unwrap();
        let mut content = fs::read(disk.model()).unwrap();
        content.truncate(600_000);
        Image {
            disk,
            bytes,
            content,
            directory: scratch(),
        }
    }

    fn number(&self, at: u64, length: u64) -> u64 {
        let bytes = &self.bytes[at as usize..(at + length) as usize];
        bytes.iter().fold(0, |n, byte| (n << 8) | u64::from(*byte))
    }

    fn pointer(&self, at: u64) -> u64 {
        self.number(at, 8) & !(1 << 63)
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("damaged.qcow2")
    }

    /// The name, offset and length of everything that has a meaning of its own.
    fn fields(&self) -> Vec<(String, u64, u64)> {
        let header = [
            ("magic", 0, 4),
            ("version", 4, 4),
            ("backing_file_offset", 8, 8),
            ("backing_file_size", 16, 4),
            ("cluster_bits", 20, 4),
            ("size", 24, 8),
            ("crypt_method", 32, 4),
            ("l1_size", 36, 4),
            ("l1_table_offset", 40, 8),
            ("refcount_table_offset", 48, 8),
            ("refcount_table_clusters", 56, 4),
            ("nb_snapshots", 60, 4),
            ("snapshots_offset", 64, 8),
            ("incompatible_features", 72, 8),
            ("compatible_features", 80, 8),
            ("autoclear_features", 88, 8),
            ("refcount_order", 96, 4),
            ("header_length", 100, 4),
            ("compression_type", 104, 1),
            ("padding", 105, 7),
            ("format type", 112, 4),
            ("format length", 116, 4),
            ("format", 120, 3),
            ("our type", 128, 4),
            ("our length", 132, 4),
            ("our disk size", 136, 8),
            ("our seconds", 144, 8),
            ("our nanoseconds", 152, 4),
            ("our flag", 156, 4),
            ("our export", 160, 8),
            ("our mark", 168, 4),
            ("our samples", 172, 4),
            ("our samples", 176, 8),
            ("our samples", 184, 8),
            ("our samples", 192, 8),
            ("our samples", 200, 8),
            ("end type", 432, 4),
            ("end length", 436, 4),
            ("backing name", 440, 8),
        ];
        let (l1, table) = (self.pointer(40), self.pointer(48));
        let (l2, blocks) = (self.pointer(l1), self.pointer(table));
        let cluster = 32 * self.disk.block;
        let first_data = self.pointer(l2) / cluster;
        let mut fields: Vec<_> = header
            .map(|(name, at, length)| (name.to_string(), at, length))
            .into();
        let mut table_of = |name: &str, at: u64, length, numbers: &[u64]| {
            for number in numbers {
                fields.push((format!("{name} {number}"), at + length * number, length));
            }
        };
        table_of("refcount table", table, 8, &[0, 1]);
        table_of("L1", l1, 8, &[0, 1]);
        // Of the header, the tables, the data, clusters without data, and what
        // does not exist.
        let last = self.bytes.len() as u64 / cluster;
        let counted = [
            0,
            1,
            first_data - 1,
            first_data,
            first_data + 1,
            first_data + 2,
            last,
        ];
        table_of("refcount", blocks, 2, &counted);
        table_of("L2 descriptor and bitmap", l2, 8, &[0, 1, 2, 3, 4, 5]);
        let beyond = 2 * (last - first_data);
        table_of("L2 beyond", l2, 8, &[beyond, beyond + 1]);
        fields
    }

    /// Serves the damaged bytes. `None`: refused as it should be; else what nbdkit read.
    fn serve(&self, damaged: &[u8], what: &str) -> Option<Vec<u8>> {
        let path = self.path();
        // A new file: nothing of the last one's times.
        let _ = fs::remove_file(&path);
        fs::write(&path, damaged).unwrap();
        let before = Seal::of(&path);
        let read = self.directory.path().join("read.raw");
        let kept = format!("cow-overlay={}", text(&path));
        // It records a base beside it, so it has to be told which one that is.
        let link = self.directory.path().join("disk.img");
        if !link.exists() {
            fs::hard_link(self.disk.base.path(), &link).unwrap();
        }
        let copy = format!("nbdcopy \"$uri\" {}", text(&read));
        let served = Setup::new().run(&["file", text(&link), &kept], &copy);
        let said = format!("{}{}", served.stdout, served.stderr);
        assert!(!said.contains("internal error"), "{what}: {said}");
        if served.status.success() {
            return Some(fs::read(&read).unwrap());
        }
        assert_eq!(served.status.code(), Some(1), "{what}: {said}");
        let errors = said
            .lines()
            .filter(|line| line.contains("error: ") && !line.contains("warning"));
        let errors: Vec<_> = errors.collect();
        assert_eq!(errors.len(), 1, "{what}: {said}");
        assert_says(errors[0], &[text(&path), "can't be used"]);
        // "What and where": more than that it did not work.
        let reason = errors[0]
            .split("can't be used: ")
            .nth(1)
            .unwrap_or_default();
        assert!(reason.len() > 15, "{what}: {said}");
        assert_eq!(Seal::of(&path), before, "{what}: {said}");
        None
    }

    /// What QEMU reads of the damaged bytes.
    fn qemu(&self, damaged: &[u8]) -> Vec<u8> {
        let path = self.directory.path().join("qemu.qcow2");
        fs::write(&path, damaged).unwrap();
        let raw = self.directory.path().join("qemu.raw");
        let convert = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw"];
        run(&[&convert[..], &[text(&path), text(&raw)]].concat());
        let mut bytes = fs::read(raw).unwrap();
        bytes.truncate(self.content.len());
        bytes
    }
}

/// What a bitmap says is what there is, for QEMU as well, and so is what a table says that
/// nothing leads to.
const CHANGES_CONTENT: [&str; 2] = ["bitmap", "L1 0"];

/// Nobody can tell that these are not as they were, or QEMU leaves such things itself. The rest
/// does not touch the disk's content.
const MAY_BE_RESUMED: [&str; 14] = [
    "l1_size",
    "incompatible_features",
    "compatible_features",
    "our seconds",
    "our nanoseconds",
    "our flag",
    "our export",
    "our mark",
    "our samples",
    "end type",
    "L1 0",
    "L1 1",
    "refcount of a cluster without data",
    "bitmap",
];

fn every_field_of_an_image(block: u64) {
    let image = Image::new(block);
    let (l1, table) = (image.pointer(40), image.pointer(48));
    let (l2, blocks) = (image.pointer(l1), image.pointer(table));
    let first_data = image.pointer(l2) / (32 * block);
    let mut resumed = BTreeSet::new();
    let mut refused = 0;
    for (name, at, length) in image.fields() {
        let was = image.number(at, length);
        let all = u64::MAX >> (64 - 8 * length);
        for value in [0, all, was.wrapping_add(1) & all, was.wrapping_sub(1) & all] {
            if value == was {
                continue;
            }
            let mut damaged = image.bytes.clone();
            let place = at as usize..(at + length) as usize;
            damaged[place].copy_from_slice(&value.to_be_bytes()[8 - length as usize..]);
            let what = format!("{name} (at {at:#x}): {value:#x}, not {was:#x}");
            let Some(read) = image.serve(&damaged, &what) else {
                refused += 1;
                continue;
            };
            let kind = match at {
                _ if at >= blocks && at < l1 && (at - blocks) / 2 > first_data => {
                    "refcount of a cluster without data"
                }
                _ if at >= l2 && at % 16 == 8 => "bitmap",
                _ => &name,
            };
            assert!(read == image.qemu(&damaged), "a wrong read with {what}");
            assert!(MAY_BE_RESUMED.contains(&kind), "resumed with {what}");
            if !CHANGES_CONTENT.contains(&kind) {
                assert!(read == image.content, "other bytes with {what}");
                check(&image.path());
            }
            resumed.insert(kind.to_string());
        }
    }
    // That the list is no longer than it has to be.
    assert_eq!(resumed, MAY_BE_RESUMED.map(str::to_string).into());
    assert!(refused > 100, "only {refused} were refused");
}

#[test]
fn every_field_of_an_image_with_blocks_of_512() {
    every_field_of_an_image(512);
}

#[test]
fn every_field_of_an_image_with_blocks_of_4k() {
    every_field_of_an_image(4096);
}

#[test]
fn a_truncated_image_is_refused_and_a_longer_one_is_not() {
    let image = Image::new(512);
    let (l1, table) = (image.pointer(40), image.pointer(48));
    let (l2, blocks) = (image.pointer(l1), image.pointer(table));
    let (data, end) = (image.pointer(l2), image.bytes.len() as u64);
    // The last of the second cluster that has data.
    let last_block = data + 32 * 512 + 4 * 512;
    let name_end = image.number(8, 8) + image.number(16, 4);
    let places = [
        112,
        136,
        168,
        name_end,
        16 << 10,
        table,
        blocks,
        l1,
        l2,
        data,
        last_block,
        end,
    ];
    let lengths: BTreeSet<u64> = places
        .into_iter()
        .flat_map(|place| [place - 1, place])
        .collect();
    let shortest = [0, 1, 3, 4, 8, 72];
    for length in shortest
        .into_iter()
        .chain(lengths)
        .filter(|length| *length < end)
    {
        let damaged = &image.bytes[..length as usize];
        let what = format!("{length} bytes of {end}");
        match image.serve(damaged, &what) {
            // Nothing was in what was cut off.
            Some(read) => assert!(length > last_block && read == image.content, "{what}"),
            None => assert!(length <= last_block, "refused with {what}"),
        }
    }
    let longer = [&image.bytes[..], &[7; 70_000]].concat();
    assert!(
        image
            .serve(&longer, "70000 bytes more")
            .is_some_and(|read| read == image.content)
    );
}
