//! Images of every awkward size, as QEMU and the next process find them.

use super::check::{Qemu, assert_settled};
use super::disk::{DISCARD, Disk, KEEP, Request, layout, new_image};

/// Sizes of disks about where something begins or ends.
fn sizes(block: u64) -> Vec<u64> {
    let cluster = 32 * block;
    let table = cluster / 16 * cluster;
    let mut sizes = vec![0, 1, 511, 512, 513];
    for edge in [block, cluster, 2 * cluster, table] {
        sizes.extend([edge - 1, edge, edge + 1, edge + block]);
    }
    sizes
}

#[test]
fn qemu_finds_new_images_of_every_size_clean_and_as_large_as_the_disk() {
    let qemu = Qemu::new(0);
    for block in [512, 4096, 65536] {
        for size in sizes(block) {
            let layout = layout(size, block);
            let image = new_image(size, block);
            qemu.assert_clean(&image, layout.data);
            let info = qemu.info(&image, layout.data);
            assert_eq!(info["virtual-size"], size.next_multiple_of(512));
            assert_eq!(info["cluster-size"], 32 * block);
            assert_eq!(info["backing-filename"], super::disk::BACKING);
            assert_eq!(info["format-specific"]["data"]["extended-l2"], true);
        }
    }
}

#[test]
fn images_of_every_size_are_resumed_as_they_were() {
    let qemu = Qemu::new(0);
    for block in [512, 4096, 65536] {
        for size in sizes(block) {
            let mut disk = Disk::new(size, block);
            let last = size.saturating_sub(1);
            let cluster = 32 * block;
            let before = (last / cluster * cluster).saturating_sub(block);
            for (at, len) in [(0, 1), (before, 2 * block), (last, 1)] {
                let len = len.min(size - at.min(size));
                let (at, byte) = (at.min(size), 7);
                disk.run(&[Request::Write { at, len, byte }, Request::Flush]);
                disk.run(&[Request::Kill]);
                assert_settled(&disk, &qemu);
            }
            let len = size.min(cluster);
            let at = size - len;
            for how in [DISCARD, KEEP] {
                disk.run(&[
                    Request::Zero { at, len, how },
                    Request::Flush,
                    Request::Kill,
                ]);
                assert_settled(&disk, &qemu);
            }
        }
    }
}
