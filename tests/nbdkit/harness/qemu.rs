//! The versions of QEMU whose tools are there, and the guest: see packaging/qemu.sh and
//! packaging/guest.sh.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::command::{command, success};

/// The tools of one version of QEMU.
pub struct Qemu {
    /// Where they were unpacked; None for those of the system.
    place: Option<PathBuf>,
}

impl Qemu {
    /// The system's, and 7.2 if `make deps` has found one.
    pub fn all() -> &'static [Qemu] {
        static FOUND: OnceLock<Vec<Qemu>> = OnceLock::new();
        FOUND.get_or_init(|| {
            let other = unpacked("qemu-7.2/usr/bin/qemu-img");
            let place = other.map(|program| root_of(&program));
            let mut all = vec![Qemu { place: None }];
            all.extend(place.map(|place| Qemu { place: Some(place) }));
            all
        })
    }

    /// For messages.
    pub fn name(&self) -> &'static str {
        match self.place {
            None => "the system's QEMU",
            Some(_) => "QEMU 7.2",
        }
    }

    /// One of its programs.
    pub fn command(&self, program: &str) -> Command {
        match &self.place {
            None => command(program),
            Some(place) => own(place, program),
        }
    }

    /// Runs one of its programs in a directory; it must succeed. Gives its standard output.
    pub fn run_in(&self, directory: &Path, words: &[&str]) -> String {
        success(
            self.command(words[0])
                .args(&words[1..])
                .current_dir(directory),
        )
    }

    /// As [`Qemu::run_in`], with a script for the shell, which finds these programs first.
    pub fn run_script(&self, directory: &Path, script: &str) -> String {
        let mut shell = command("sh");
        if let Some(place) = &self.place {
            let mut path = place.join("usr/bin:").into_os_string();
            path.push(std::env::var_os("PATH").unwrap_or_default());
            path.push(":/usr/sbin:/sbin:/usr/bin:/bin");
            shell
                .env("PATH", path)
                .env("LD_LIBRARY_PATH", libraries(place));
        }
        success(shell.args(["-ec", script]).current_dir(directory))
    }
}

/// The emulator, with a kernel and an initial file system whose shell runs the script that
/// is on the second disk. It needs no file of the system's.
#[cfg(target_arch = "x86_64")]
pub fn guest() -> Command {
    const EMULATOR: &str = "qemu-system-x86_64";
    let kernel = unpacked("guest/vmlinuz")
        .expect("no target/guest/vmlinuz: `make deps` puts there what boots a guest");
    let place = kernel.parent().expect("a file is in a directory");
    let mut guest = if place.join("usr/bin").join(EMULATOR).is_file() {
        let mut guest = own(place, EMULATOR);
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            guest.arg("-L").arg(place.join(firmware));
        }
        guest
    } else {
        command(EMULATOR)
    };
    guest
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        // On every machine the same, and in a chroot.
        .args(["-accel", "tcg", "-m", "192"])
        .args(["-display", "none", "-serial", "stdio"])
        // A message of the kernel could come in the middle of what the script says.
        .args(["-append", "console=ttyS0 panic=-1 quiet loglevel=0"])
        .arg("-kernel")
        .arg(&kernel)
        .arg("-initrd")
        .arg(place.join("initramfs"));
    guest
}

/// A program that was unpacked with the libraries that the system did not have.
fn own(place: &Path, program: &str) -> Command {
    let mut own = command(place.join("usr/bin").join(program));
    own.env("LD_LIBRARY_PATH", libraries(place));
    own
}

fn libraries(place: &Path) -> OsString {
    let machine = format!("{}-linux-gnu", std::env::consts::ARCH);
    let mut list = place.join("usr/lib").join(&machine).into_os_string();
    list.push(":");
    list.push(place.join("lib").join(&machine));
    list
}

/// A file below the target directory, if it is there.
fn unpacked(path: &str) -> Option<PathBuf> {
    let executable = std::env::current_exe().expect("the path of this executable");
    executable
        .ancestors()
        .map(|directory| directory.join(path))
        .find(|path| path.is_file())
}

/// The directory that has `usr/bin/PROGRAM`.
fn root_of(program: &Path) -> PathBuf {
    let root = program.ancestors().nth(3);
    root.expect("three names in the path").to_path_buf()
}
