//! Images of other programs that are made ours, crashed at every step of it.

use super::check::Qemu;
use super::content::{Content, SECTOR};
use super::foreign::{Foreign, data};
use super::moved::{at_random, by_hand};
use super::random::Random;
use super::reader::Reader;

/// What the disk in `image` holds, over a base of zeroes.
fn disk(image: &Foreign) -> Content {
    let mut disk = Content::default();
    disk.size = image.layout().virtual_size();
    let per_cluster = image.cluster_size() / SECTOR;
    for (guest, cluster) in &image.clusters {
        for sector in 0..per_cluster {
            let number = guest * per_cluster + sector;
            let bit = sector * SECTOR / image.block;
            if (cluster.bitmap >> bit) & 1 != 0 && number * SECTOR < disk.size {
                disk.write(&data(number), number * SECTOR);
            }
        }
    }
    disk
}

/// Else the tests that begin with them would show nothing.
#[test]
fn qemu_takes_the_images_for_what_they_are_meant_to_be() {
    let mut qemu = Qemu::new(usize::MAX);
    let mut random = Random::new(1);
    let random = (0..60).map(|_| ("at random", at_random(&mut random)));
    for (name, image) in by_hand().into_iter().chain(random) {
        let content = image.content();
        let reader = Reader::open(&content).expect(name);
        let mut report = reader.check();
        assert_eq!(report.uncopied.len(), image.uncopied.len(), "{name}");
        report.uncopied.clear();
        if image.is_dirty {
            report.miscounted.clear();
        }
        assert_eq!(report.all_errors(), "", "{name}: {image:?}");
        let leaks: Vec<u64> = image.leaks.iter().copied().collect();
        assert!(image.is_dirty || report.leaks == leaks, "{name}: {image:?}");
        // QEMU takes a missing bit for an error, and refcounts that are wrong.
        if image.uncopied.is_empty() && !image.is_dirty {
            let checked = qemu.check(&content, &reader.metadata());
            checked.unwrap_or_else(|e| panic!("{name}: {e}: {image:?}"));
        }
        let compared = qemu.compare(&content, &disk(&image));
        compared.unwrap_or_else(|e| panic!("{name}: {e}: {image:?}"));
    }
}
