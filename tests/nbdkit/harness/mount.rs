//! Small file systems to put overlays on, and disks served over NBD made into
//! block devices. Each goes away with its value, after a panic as well.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Mutex;
use std::time::Duration;

use tempfile::TempDir;

use super::command::{self, Outcome, command, eventually, outcome, run, spawn};
use super::python;
use super::server::Server;
use super::setup::Setup;

/// Two `mount -o loop` at once can be given the same free loop device, and one of them fails.
static LOOP_DEVICES: Mutex<()> = Mutex::new(());

/// A mounted file system. What uses it must be dropped before it.
pub struct Mount {
    point: PathBuf,
    /// Of a file system in user space; it ends when that is unmounted.
    server: Option<Child>,
    _scratch: TempDir,
}

impl Mount {
    pub fn tmpfs(size: &str) -> Mount {
        Mount::tmpfs_with(&format!("size={size}"))
    }

    fn tmpfs_with(options: &str) -> Mount {
        Mount::of("tmpfs", &["-t", "tmpfs", "-o", options])
    }

    /// A file system that gives a file 2 to 16 MiB for its first byte: "huge",
    /// "huge within size", "extsize", "bigalloc".
    pub fn of_large_units(kind: &str) -> Mount {
        match kind {
            "huge" => Mount::tmpfs_with("size=96M,huge=always"),
            "huge within size" => Mount::tmpfs_with("size=96M,huge=within_size"),
            "extsize" => {
                let mount = Mount::formatted("xfs");
                // New files inherit it.
                let point = mount.point.to_str().expect("a path of our own making");
                run(&["xfs_io", "-c", "extsize 16m", point]);
                mount
            }
            _ => Mount::formatted(kind),
        }
    }

    pub fn ramfs() -> Mount {
        Mount::of("ramfs", &["-t", "ramfs"])
    }

    /// A fresh file system in a file: "ext4", "bigalloc" (ext4), "ext3", "xfs", "btrfs".
    pub fn formatted(kind: &str) -> Mount {
        let scratch = super::scratch();
        let image = scratch.path().join("image");
        let (mkfs, megabytes): (&[&str], u64) = match kind {
            "ext4" => (&["mkfs.ext4", "-q", "-F"], 48),
            // With large clusters, newer mkfs makes an orphan file that is too big for Linux.
            "bigalloc" => (
                &[
                    "mkfs.ext4",
                    "-q",
                    "-F",
                    "-O",
                    "bigalloc,^orphan_file",
                    "-C",
                    "4194304",
                ],
                320,
            ),
            "ext3" => (&["mkfs.ext3", "-q", "-F"], 48),
            // mkfs.xfs makes nothing under 300 MB.
            "xfs" => (&["mkfs.xfs", "-q"], 320),
            "btrfs" => (&["mkfs.btrfs", "-q"], 160),
            _ => panic!("no recipe for {kind}"),
        };
        File::create(&image)
            .and_then(|file| file.set_len(megabytes << 20))
            .expect("an image file");
        let image = image.to_str().expect("a path of our own making");
        run(&[mkfs, &[image]].concat());
        Mount::at(scratch, &["-o", "loop", image])
    }

    /// The file system in a file that is there already.
    pub fn image(image: &Path) -> Mount {
        let image = image.to_str().expect("a path of our own making");
        Mount::at(super::scratch(), &["-o", "loop", image])
    }

    fn of(source: &str, options: &[&str]) -> Mount {
        Mount::at(super::scratch(), &[options, &[source]].concat())
    }

    fn at(scratch: TempDir, what: &[&str]) -> Mount {
        let point = scratch.path().join("mnt");
        fs::create_dir(&point).expect("a mount point");
        // A test that failed with the lock held has left nothing half done.
        let _one_at_a_time = LOOP_DEVICES.lock().unwrap_or_else(|held| held.into_inner());
        let mount = || outcome(command("mount").args(what).arg(&point));
        let mut ended = mount();
        for _ in 0..5 {
            // What else mounts on this machine does not ask for our lock.
            if ended.stderr.contains("failed to setup loop device") {
                std::thread::sleep(Duration::from_millis(200));
                ended = mount();
            }
        }
        let Outcome { status, stderr, .. } = ended;
        assert!(status.success(), "mount {what:?}: {status}\n{stderr}");
        assert!(mounted(&point), "{point:?} is not a mount");
        Mount {
            point,
            server: None,
            _scratch: scratch,
        }
    }

    /// A file system in user space, of so many bytes: "length", "unknown" or "data". See
    /// `fuse.py`.
    pub fn fuse(kind: &str, size: u64) -> Mount {
        let scratch = super::scratch();
        let point = scratch.path().join("mnt");
        fs::create_dir(&point).expect("a mount point");
        let script = ["-c", include_str!("fuse.py")];
        let mut python = command(python::interpreter());
        let mut server = spawn(
            python
                .args(script)
                .arg(&point)
                .args([kind, &size.to_string()]),
        );
        let ready = eventually(command::LIMIT, || {
            if let Ok(Some(status)) = server.try_wait() {
                panic!("fuse.py ended at once: {status}");
            }
            mounted(&point)
        });
        let mount = Mount {
            point,
            server: Some(server),
            _scratch: scratch,
        };
        assert!(ready, "fuse.py does not mount {kind:?}");
        mount
    }

    pub fn path(&self) -> &Path {
        &self.point
    }

    pub fn make_read_only(&self) {
        command::success(command("mount").args(["-o", "remount,ro"]).arg(&self.point));
    }

    /// How many bytes its files take, and the file system itself.
    pub fn bytes_taken(&self) -> u64 {
        let point = self.point.to_str().expect("a path of our own making");
        let said = run(&["stat", "-f", "-c", "%b %f %S", point]);
        let numbers: Vec<u64> = said
            .split_whitespace()
            .map(|number| number.parse().expect("a number"))
            .collect();
        (numbers[0] - numbers[1]) * numbers[2]
    }

    /// Takes space until no more than about this many bytes are left.
    pub fn leave_free(&self, bytes: u64) {
        let point = self.point.to_str().expect("a path of our own making");
        // "Available", not "free": btrfs keeps some of that to itself.
        let said = run(&["stat", "-f", "-c", "%a %S", point]);
        let numbers = said.split_whitespace().map(|n| n.parse::<u64>().unwrap());
        let size = numbers.product::<u64>().saturating_sub(bytes);
        let filler = self.point.join("filler");
        command::success(command("fallocate").arg(format!("-l{size}")).arg(filler));
    }

    /// Writes until nothing more goes in.
    pub fn fill(&self) {
        use std::io::Write;
        for (name, chunk) in [("big", 1 << 16), ("small", 512)] {
            let mut file = File::create(self.point.join(name)).expect("a file to fill up with");
            let chunk = vec![0xff; chunk];
            while file.write_all(&chunk).is_ok() {}
        }
    }

    /// Takes away what [`Mount::fill`] has written.
    pub fn make_room(&self) {
        for name in ["big", "small"] {
            fs::remove_file(self.point.join(name)).expect("a file that fills it up");
        }
    }

    /// How much the device below it has been given to write so far.
    pub fn bytes_written(&self) -> u64 {
        let mounts = fs::read_to_string("/proc/self/mounts").expect("Linux has it");
        let device = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|fields| Path::new(fields[1]) == self.point)
            .map(|fields| fields[0].replace("/dev/", "/sys/block/"))
            .expect("it is mounted");
        let stat = fs::read_to_string(Path::new(&device).join("stat")).expect("a loop device");
        let sectors = stat.split_whitespace().nth(6).expect("eleven numbers");
        512 * sectors.parse::<u64>().expect("a number")
    }

    /// Unmounts, and fails if that does not work: what was written is then in the image.
    pub fn unmount(self) {
        assert!(
            unmount(&["umount"], &self.point),
            "{:?} stays busy",
            self.point
        );
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if mounted(&self.point) && !unmount(&["umount"], &self.point) {
            // Detached, it ends when its last user does.
            unmount(&["umount", "-l"], &self.point);
        }
        if let Some(server) = &mut self.server {
            end(server);
        }
    }
}

/// A directory whose files may take so many bytes together, once that is set. It is in a btrfs, which has the
/// one quota that every kernel with that file system has, and that binds root as well.
pub struct Quota {
    directory: PathBuf,
    _mount: Mount,
}

impl Quota {
    pub fn new() -> Quota {
        let mount = Mount::formatted("btrfs");
        let point = mount.point.to_str().expect("a path of our own making");
        run(&["btrfs", "quota", "enable", point]);
        let quota = Quota {
            directory: mount.point.join("limited"),
            _mount: mount,
        };
        run(&["btrfs", "subvolume", "create", quota.text()]);
        quota
    }

    /// From now on.
    pub fn set(&self, bytes: u64) {
        run(&["btrfs", "qgroup", "limit", &bytes.to_string(), self.text()]);
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn text(&self) -> &str {
        self.directory.to_str().expect("a path of our own making")
    }
}

/// A file system, ext4 without a journal, on a disk that fails every write while it is told
/// to. What could not be written to it stays in the page cache until it is unmounted.
pub struct FailingDisk {
    // In the order in which they are to go away.
    mount: Option<Mount>,
    disk: NbdFuse,
    _server: Server,
    scratch: TempDir,
}

impl FailingDisk {
    pub fn new() -> FailingDisk {
        let scratch = super::scratch();
        let trigger = format!("error-file={}", Self::trigger(&scratch).display());
        // The filter under test lies below that of the errors, and is as good as any disk.
        let server = Setup::new().above("error").start(&[
            "memory",
            "48M",
            "error-pwrite=EIO",
            "error-pwrite-rate=100%",
            &trigger,
        ]);
        let disk = NbdFuse::new(&server.uri());
        let file = disk.file();
        let file = file.to_str().expect("a path of our own making");
        // A journal that can't be written to makes the file system read-only.
        run(&["mkfs.ext4", "-q", "-F", "-O", "^has_journal", file]);
        FailingDisk {
            mount: Some(Mount::image(&disk.file())),
            disk,
            _server: server,
            scratch,
        }
    }

    fn trigger(scratch: &TempDir) -> PathBuf {
        scratch.path().join("fails")
    }

    pub fn path(&self) -> &Path {
        self.mount.as_ref().expect("mounted").path()
    }

    /// From now on nothing can be written to the disk; or all can again.
    pub fn fail(&self, fails: bool) {
        let trigger = Self::trigger(&self.scratch);
        match fails {
            true => fs::write(trigger, ""),
            false => fs::remove_file(trigger),
        }
        .expect("our own file");
    }

    /// Mounts the file system anew: what is read then is what the disk has.
    pub fn forget(&mut self) {
        self.mount.take().expect("mounted").unmount();
        self.mount = Some(Mount::image(&self.disk.file()));
    }
}

/// What serves a file system ends by itself when that is unmounted.
fn end(server: &mut Child) {
    if command::wait(server, Duration::from_secs(10)).is_none() {
        command::kill_group(server);
        let _ = server.wait();
    }
}

/// An NBD export as a file, so that loop devices and fsck can have it.
pub struct NbdFuse {
    child: Child,
    point: PathBuf,
    _scratch: TempDir,
}

impl NbdFuse {
    pub fn new(uri: &str) -> NbdFuse {
        let scratch = super::scratch();
        let point = scratch.path().join("fuse");
        fs::create_dir(&point).expect("a mount point");
        let file = point.join("disk");
        let stderr = scratch.path().join("stderr");
        let to_stderr = File::create(&stderr).expect("a file for stderr");
        let mut child = spawn(command("nbdfuse").arg(&file).arg(uri).stderr(to_stderr));
        let ready = eventually(command::LIMIT, || {
            if let Ok(Some(status)) = child.try_wait() {
                let said = fs::read_to_string(&stderr).expect("its stderr");
                panic!("nbdfuse ended at once: {status}: {said}");
            }
            file.exists()
        });
        let fuse = NbdFuse {
            child,
            point,
            _scratch: scratch,
        };
        assert!(ready, "nbdfuse shows no file");
        assert!(mounted(&fuse.point), "{:?} is not a mount", fuse.point);
        fuse
    }

    pub fn file(&self) -> PathBuf {
        self.point.join("disk")
    }

    /// Unmounts and waits for nbdfuse, so that its connection is closed.
    pub fn unmount(mut self) {
        assert!(
            unmount(&["fusermount3", "-u"], &self.point),
            "{:?} stays busy",
            self.point
        );
        let ended = command::wait(&mut self.child, command::LIMIT);
        assert!(ended.is_some_and(|s| s.success()), "nbdfuse: {ended:?}");
    }
}

impl Drop for NbdFuse {
    fn drop(&mut self) {
        if mounted(&self.point) && !unmount(&["fusermount3", "-u"], &self.point) {
            unmount(&["fusermount3", "-u", "-z"], &self.point);
        }
        end(&mut self.child);
    }
}

/// A loop device lets go of its file a moment after the unmount, so busy is asked again.
fn unmount(how: &[&str], point: &Path) -> bool {
    eventually(Duration::from_secs(20), || {
        !mounted(point)
            || outcome(command(how[0]).args(&how[1..]).arg(point))
                .status
                .success()
    })
}

fn mounted(point: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mounts").expect("the table of mounts");
    let point = point.to_str().expect("a path of our own making");
    table
        .lines()
        .any(|line| line.split(' ').nth(1) == Some(point))
}
