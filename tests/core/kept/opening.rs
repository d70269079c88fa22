//! Opening an image whose tables are holes for the most part, or have none, or have them
//! where the file system likes: it takes little, and finds the same.

use std::collections::BTreeMap;
use std::ops::Range;

use nbdkit_cow_filter::overlay::State;
use nbdkit_cow_filter::qcow2::file::ImageFile;
use nbdkit_cow_filter::qcow2::layout::{Entry, GuestCluster, Layout, SECTOR};

use super::content::Content;
use super::disk::{flush, layout, new_image, resume};
use super::random::Random;
use super::recorder::Recorder;

const TIB: u64 = 1 << 40;

/// A file over `content`, which tells of its holes or not.
fn file(content: &Content, tells_holes: bool) -> Recorder {
    let recorder = Recorder::holding(content.clone());
    if tells_holes {
        recorder.tell_holes();
    }
    recorder
}

fn put(file: &Recorder, bytes: &[u8], at: u64) {
    file.write_at(bytes, at).expect("no fault");
}

fn put_entry(file: &Recorder, layout: Layout, cluster: u64, (descriptor, bitmap): (u64, u64)) {
    let bytes = Entry { descriptor, bitmap }.to_bytes();
    put(file, &bytes, layout.entry_at(GuestCluster(cluster)));
}

fn put_refcount(file: &Recorder, layout: Layout, cluster: u64, refcount: u16) {
    let at = layout.refcount_at(GuestCluster(cluster));
    put(file, &refcount.to_be_bytes(), at);
}

/// Gives a cluster the refcount 1, and the entry that goes with `bitmap`.
fn put_sound(file: &Recorder, layout: Layout, cluster: u64, bitmap: u64) {
    let entry = layout.entry(GuestCluster(cluster), bitmap);
    put_entry(file, layout, cluster, (entry.descriptor, entry.bitmap));
    if entry.descriptor != 0 {
        put_refcount(file, layout, cluster, 1);
    }
}

#[test]
fn opening_reads_what_was_written_however_large_the_disk_is() {
    for size in [TIB, 1024 * TIB] {
        let block = 4096;
        let layout = layout(size, block);
        let image = file(&new_image(size, block), true);
        let last = layout.guest_clusters() - 1;
        for cluster in [0, last / 3, last] {
            put_sound(&image, layout, cluster, 1);
        }
        image.read_bytes();
        let overlay = resume(&image).expect("sound");
        // What is no hole: the pointers to tables, and the refcounts of the tables.
        let pointers = (layout.l2 - layout.l1) + (layout.refcount_blocks - layout.refcount_table);
        let stored = pointers + 2 * layout.metadata_clusters();
        let read = image.read_bytes();
        assert!(read < stored + (1 << 20), "{read} bytes of {size}");
        for cluster in [0, last / 3, last] {
            let state = |block_in| {
                let at = cluster * layout.cluster_size() + block_in * block;
                overlay.state_at(at).expect("in range")
            };
            assert_eq!((state(0), state(1)), (State::Data, State::Base));
        }
    }
}

/// Clusters of 16K: a table that is read at once is for 64 MiB of the disk.
const BLOCK: u64 = 512;
const DISK: u64 = (1 << 30) + 3 * 16 * 1024 + 512;

/// Stretches of clusters that begin and end anywhere.
fn stretches(random: &mut Random, clusters: u64) -> Vec<Range<u64>> {
    (0..6)
        .map(|_| {
            let start = random.below(clusters);
            let len = random.among(&[1, 3, 64, 1000, 5000]);
            start..clusters.min(start + len)
        })
        .collect()
}

#[test]
fn what_is_found_is_the_same_with_and_without_holes() {
    let layout = layout(DISK, BLOCK);
    let clusters = layout.guest_clusters();
    for seed in 0..12 {
        let mut random = Random::new(seed);
        let image = Recorder::holding(new_image(DISK, BLOCK));
        let mut words = BTreeMap::new();
        for stretch in stretches(&mut random, clusters) {
            for cluster in stretch {
                let bitmap = match random.below(4) {
                    0 => 0xffff_ffff,
                    1 => 0xffff_ffff << 32,
                    2 => 1 | (2 << 32),
                    _ => 0,
                };
                put_sound(&image, layout, cluster, bitmap);
                let bitmap = layout.entry(GuestCluster(cluster), bitmap).bitmap;
                words.insert(cluster, bitmap);
            }
        }
        let mut leaks = Vec::new();
        for stretch in stretches(&mut random, clusters) {
            for cluster in stretch.step_by(7) {
                if words.get(&cluster).is_none_or(|word| *word as u32 == 0) {
                    put_refcount(&image, layout, cluster, 1);
                    leaks.push(cluster);
                }
            }
        }
        assert!(!words.is_empty() && !leaks.is_empty());
        // Zeroes that take space.
        let full = random.below(clusters / 2);
        for at in [
            layout.entry_at(GuestCluster(full)),
            layout.refcount_at(GuestCluster(full)),
        ] {
            let at = at.next_multiple_of(SECTOR);
            let bytes = image.content().bytes(at..at + 100 * SECTOR);
            put(&image, &bytes, at);
        }
        for tells_holes in [false, true] {
            let image = file(&image.content(), tells_holes);
            let overlay = resume(&image).expect("sound");
            let last = words.keys().chain(&leaks).max().copied().unwrap_or(0);
            for cluster in 0..=last {
                let word = words.get(&cluster).copied().unwrap_or(0);
                for (bit, state) in [(0, State::Data), (1, State::Zero)] {
                    let at = cluster * layout.cluster_size() + bit * BLOCK;
                    if at >= DISK {
                        continue;
                    }
                    let (data, zero) = ((word >> bit) & 1, (word >> (bit + 32)) & 1);
                    let expected = match (data, zero) {
                        (1, _) => State::Data,
                        (_, 1) => State::Zero,
                        _ => State::Base,
                    };
                    let found = overlay.state_at(at).expect("in range");
                    assert_eq!(found, expected, "cluster {cluster}, {bit}, {state:?}");
                }
            }
            flush(&overlay, &image).expect("no fault");
            for cluster in &leaks {
                let at = layout.refcount_at(GuestCluster(*cluster));
                let refcount = image.content().bytes(at..at + 2);
                assert_eq!(refcount, [0, 0], "cluster {cluster} stays leaked");
            }
        }
    }
}

/// What is wrong with a cluster: its descriptor (of the right one), bitmap, and refcount.
const DAMAGE: [(&str, u64, u64, u16); 9] = [
    ("no refcount", 1, 1, 0),
    ("two references", 1, 1, 2),
    ("a reference too many for none", 0, 0, 2),
    ("zeroes, with a reference too many", 0, 1 << 32, 3),
    ("no descriptor", 0, 1, 1),
    ("no descriptor, and no refcount", 0, 1, 0),
    ("data and zeroes at once", 1, 1 | (1 << 32), 1),
    ("another place", 2, 1, 1),
    ("another place, and no data", 2, 0, 1),
];

#[test]
fn damage_is_refused_and_named_wherever_it_is() {
    let layout = layout(DISK, BLOCK);
    let clusters = layout.guest_clusters();
    for (number, (what, place, bitmap, refcount)) in DAMAGE.into_iter().enumerate() {
        // The first, in the middle of what is read at once, the last of that, the last.
        for cluster in [0, 4096 + 2000, 8191, clusters - 1] {
            let image = Recorder::holding(new_image(DISK, BLOCK));
            if number % 2 == 0 {
                // Beside others, and not alone.
                for other in (0..clusters).step_by(50).filter(|other| *other != cluster) {
                    put_sound(&image, layout, other, 1);
                }
            }
            let descriptor = match place {
                0 => 0,
                1 => layout.descriptor(GuestCluster(cluster)),
                _ => layout.descriptor(GuestCluster(cluster + 1)),
            };
            put_entry(&image, layout, cluster, (descriptor, bitmap));
            put_refcount(&image, layout, cluster, refcount);
            let said = [false, true].map(|tells_holes| {
                let opened = resume(&file(&image.content(), tells_holes));
                opened.err().map(|e| e.to_string()).unwrap_or_default()
            });
            assert_eq!(said[0], said[1], "{what}");
            let named = format!("cluster {cluster} of the disk");
            assert!(said[0].contains(&named), "{what}: {}", said[0]);
        }
    }
}

#[test]
fn nothing_may_be_said_of_clusters_that_the_disk_does_not_have() {
    let layout = layout(DISK, BLOCK);
    for beyond in [0, 60, 800] {
        for entry in [(0, 1 << 32), (1, 0), (0, 1)] {
            let cluster = layout.guest_clusters() + beyond;
            assert!(layout.entry_at(GuestCluster(cluster)) < layout.data);
            let image = Recorder::holding(new_image(DISK, BLOCK));
            put_entry(&image, layout, cluster, entry);
            for tells_holes in [false, true] {
                let refused = resume(&file(&image.content(), tells_holes)).err();
                let refused = refused.expect("not sound").to_string();
                let named = format!("cluster {cluster} of the disk");
                assert!(refused.contains(&named), "{refused}");
            }
        }
    }
}

/// The tables of a large disk are read by several threads.
#[test]
fn of_many_mistakes_the_first_is_named() {
    let (size, block) = (TIB, 4096);
    let layout = layout(size, block);
    let image = file(&new_image(size, block), true);
    let at_once = 64 * 64;
    // So much that all threads have begun when they come to the mistakes.
    for n in 0..500 {
        put_sound(&image, layout, n * at_once, 1);
    }
    // The first is the last of what is read at once, and the others the first of what others
    // read meanwhile.
    let wrong = [500 * at_once - 1, 500 * at_once, 501 * at_once];
    for cluster in &wrong {
        put_entry(&image, layout, *cluster, (0, 1));
    }
    let first = wrong.iter().min().expect("there are some");
    for _ in 0..20 {
        let refused = resume(&image).err().expect("damaged").to_string();
        let named = format!("cluster {first} of the disk");
        assert!(refused.contains(&named), "{refused}");
    }
}
