//! Images as version 1.0 has made them, byte by byte: they must open for ever.
//!
//! Each file in `version-1` is one. Its first line is the length of the image. Each of the
//! others is a sector that is not all zeroes: its offset and its bytes, `HH*N` for N equal
//! ones; zeroes at the end of a sector are left out. Numbers before a blank or a line's
//! end are hexadecimal, N is decimal.
//!
//! The base of all of them is [`base_byte`], modified at [`MODIFIED`].

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::small::{read_all_by_qemu, serve};
use super::{attempt, check, text};
use crate::harness::{Base, noise, run};

const M: usize = 1 << 20;

/// In seconds since 1970.
const MODIFIED: &str = "@1700000000";

/// The length of the header extension "nbco", which tells the versions apart.
const EXTENSION_LEN: u32 = 32;

fn base_byte(offset: usize) -> u8 {
    (offset / 512 % 251 + 1) as u8
}

/// An image, and what was written to it: (offset, length, byte).
struct Made {
    image: &'static str,
    disk_size: usize,
    written: Vec<(usize, usize, u8)>,
}

/// Of these requests, in blocks of `b` bytes: a write of 7, of 9, of 11 to parts of a block
/// and to whole ones; zeroes; a flush; a trim of the second cluster; a flush.
fn mixed(image: &'static str, disk_size: usize, b: usize) -> Made {
    Made {
        image,
        disk_size,
        written: vec![
            (100_000, 5000, 7),
            (40 * b, 2 * b, 9),
            (8 * b, 3 * b, 0),
            (130 * b + 100, 700, 11),
            (32 * b, 32 * b, 0),
        ],
    }
}

#[test]
fn blocks_of_512() {
    assert_goes_on(&mixed(include_str!("version-1/blocks-of-512.txt"), M, 512));
}

#[test]
fn blocks_of_4k() {
    let image = include_str!("version-1/blocks-of-4096.txt");
    assert_goes_on(&mixed(image, 5 * M, 4096));
}

#[test]
fn a_disk_of_an_odd_size() {
    assert_goes_on(&Made {
        image: include_str!("version-1/odd-size.txt"),
        disk_size: 300_001,
        written: vec![(100_000, 5000, 7), (299_900, 101, 8)],
    });
}

#[test]
fn an_image_to_which_nothing_was_written() {
    assert_goes_on(&Made {
        image: include_str!("version-1/untouched.txt"),
        disk_size: M,
        written: vec![],
    });
}

/// nbdkit was killed in a flush, between the refcounts and the L2 entries: a second write,
/// of 5000 bytes at 600000, has left a cluster that is counted and not used.
#[test]
fn a_crash_in_a_flush() {
    assert_goes_on(&Made {
        image: include_str!("version-1/leak.txt"),
        disk_size: M,
        written: vec![(100_000, 5000, 7)],
    });
}

/// These have no fingerprint of their base: any disk of the size is taken for it.
#[test]
fn no_base_is_taken_for_another() {
    let base = Base::make(|path| {
        fs::write(path, noise(1, 5 * M)).unwrap();
        run(&["touch", "-d", MODIFIED, text(path)]);
    });
    let overlay = base.directory().join("diff.qcow2");
    unpack(include_str!("version-1/blocks-of-4096.txt"), &overlay);
    read_all_by_qemu(base.directory(), "diff.qcow2");
    let server = serve(base.path(), text(&overlay));
    let read_by_qemu = base.directory().join("read.raw");
    let compare = "same(read(h), open(ARGS[0], 'rb').read())";
    server.nbdsh_with(&[text(&read_by_qemu)], compare);
    assert_eq!(server.stop_and_tell(), "");
    assert_eq!(extension_len(&overlay), EXTENSION_LEN);
}

/// Every byte is right, for us and for QEMU, before and after more was written.
fn assert_goes_on(made: &Made) {
    let mut expected: Vec<_> = (0..made.disk_size).map(base_byte).collect();
    let base = Base::make(|path| {
        fs::write(path, &expected).unwrap();
        run(&["touch", "-d", MODIFIED, text(path)]);
    });
    let overlay = base.directory().join("diff.qcow2");
    unpack(made.image, &overlay);
    assert_eq!(extension_len(&overlay), EXTENSION_LEN);
    let leaks = attempt(&["qemu-img", "check", text(&overlay)]);
    assert!(
        matches!(leaks.status.code(), Some(0 | 3)),
        "{}",
        leaks.stdout
    );
    for &(offset, len, byte) in &made.written {
        expected[offset..][..len].fill(byte);
    }

    let more = [(0, 600, 21), (200_000, 70_000, 22), (104_000, 10_000, 0)];
    let model = base.directory().join("expected.raw");
    for round in 0..2 {
        assert!(read_all_by_qemu(base.directory(), "diff.qcow2")[..made.disk_size] == expected);
        fs::write(&model, &expected).unwrap();
        let server = serve(base.path(), text(&overlay));
        let compare = "same(read(h), open(ARGS[0], 'rb').read())";
        server.nbdsh_with(&[text(&model)], compare);
        if round == 0 {
            for (offset, len, byte) in more {
                let [offset, len, byte] = [offset, len, byte].map(|n: usize| n.to_string());
                server.nbdsh_with(
                    &[&offset, &len, &byte],
                    "at, length, byte = map(int, ARGS); h.pwrite(bytes([byte]) * length, at)",
                );
            }
            server.nbdsh("h.flush()");
            for (offset, len, byte) in more {
                expected[offset..][..len].fill(byte as u8);
            }
        }
        assert_eq!(server.stop_and_tell(), "");
        check(&overlay);
        assert_eq!(extension_len(&overlay), EXTENSION_LEN, "it stays as it is");
    }
}

fn unpack(image: &str, path: &Path) {
    let hex = |digits: &str| u64::from_str_radix(digits, 16).expect("hexadecimal");
    let mut lines = image.lines();
    let file = File::create(path).unwrap();
    file.set_len(hex(lines.next().expect("a length"))).unwrap();
    for line in lines {
        let mut words = line.split(' ');
        let offset = hex(words.next().expect("an offset"));
        let mut sector = Vec::new();
        for word in words {
            let (digits, count) = word.split_once('*').unwrap_or((word, "1"));
            let bytes: Vec<_> = (0..digits.len())
                .step_by(2)
                .map(|at| hex(&digits[at..at + 2]) as u8)
                .collect();
            sector.extend(bytes.repeat(count.parse().expect("a number")));
        }
        file.write_all_at(&sector, offset).unwrap();
    }
}

/// The length of the data of "nbco", as the file has it.
fn extension_len(overlay: &Path) -> u32 {
    let bytes = fs::read(overlay).unwrap();
    let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let mut at = number(100) as usize;
    while number(at) != u32::from_be_bytes(*b"nbco") {
        assert_ne!(number(at), 0, "there is no such extension");
        at += 8 + number(at + 4).next_multiple_of(8) as usize;
    }
    number(at + 4)
}
