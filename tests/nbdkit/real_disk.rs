//! A kernel's own file system on the served disk, with thousands of files.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::harness::mount::{Mount, NbdFuse};
use crate::harness::{Base, Server, noise, run, scratch};

/// A tree with files of every size up to a few hundred kilobytes, empty ones,
/// links and deep directories; the same every time.
fn plant(root: &Path) {
    for number in 0..4000_u64 {
        let directory = root.join(format!("d{}/e{}", number % 23, number % 7));
        fs::create_dir_all(&directory).unwrap();
        let random = u64::from_le_bytes(noise(number, 8).try_into().unwrap());
        let size = match number % 50 {
            0 => random % 400_000,
            1 => 0,
            _ => random % 9_000,
        };
        let file = directory.join(format!("file-{number}"));
        fs::write(&file, noise(number, size as usize)).unwrap();
        if number % 100 == 3 {
            symlink(&file, directory.join(format!("symbolic-{number}"))).unwrap();
            fs::hard_link(&file, directory.join(format!("hard-{number}"))).unwrap();
        }
    }
}

fn assert_same_tree(left: &Path, right: &Path) {
    let (left, right) = (left.to_str().unwrap(), right.to_str().unwrap());
    run(&["diff", "-r", "--no-dereference", left, right]);
}

fn a_tree_survives(parameters: &[&str]) {
    let files = scratch();
    let tree = files.path().join("tree");
    fs::create_dir(&tree).unwrap();
    plant(&tree);
    let base = Base::make(|path| {
        let file = fs::File::create(path).unwrap();
        file.set_len(256 << 20).unwrap();
        run(&["mkfs.ext4", "-q", "-F", path.to_str().unwrap()]);
    });
    let server = Server::start(&[&["file", base.path()], parameters].concat());

    let fuse = NbdFuse::new(&server.uri());
    let disk = Mount::image(&fuse.file());
    let copy = disk.path().join("tree");
    run(&["cp", "-a", tree.to_str().unwrap(), copy.to_str().unwrap()]);
    // Deleted and moved as well, in the copy and in the original.
    for root in [&tree, &copy] {
        fs::remove_dir_all(root.join("d5")).unwrap();
        fs::rename(root.join("d6"), root.join("d0/moved")).unwrap();
        fs::write(root.join("d7/e0/new"), noise(1, 3_000_000)).unwrap();
    }
    // Makes ext4 send what it has to trim.
    run(&["fstrim", disk.path().to_str().unwrap()]);
    disk.unmount();
    fuse.unmount();

    let fuse = NbdFuse::new(&server.uri());
    run(&["e2fsck", "-fn", fuse.file().to_str().unwrap()]);
    let disk = Mount::image(&fuse.file());
    assert_same_tree(&tree, &disk.path().join("tree"));
    disk.unmount();
    fuse.unmount();
    server.stop();
    base.assert_unchanged();
}

#[test]
fn a_tree_of_thousands_of_files_survives() {
    a_tree_survives(&[]);
}

#[test]
fn a_tree_of_thousands_of_files_survives_blocks_of_64k_that_reads_fill() {
    a_tree_survives(&["cow-block-size=64K", "cow-on-read=true"]);
}
