//! What is compared, and how each is started.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::command::{self, command};
use super::filters::{of_nbdkit, ours};
use super::server::{Server, socket_in};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum System {
    Ours,
    /// nbdkit with its file plugin and nothing else: what the others are measured by.
    NoFilter,
    /// The C filter that nbdkit ships, at its default block size of 64K.
    CDefault,
    /// The same with 4K blocks.
    C4K,
    /// `qemu-nbd --snapshot`.
    Qemu,
    /// This filter with `cow-overlay`.
    Kept,
    /// qemu-nbd on a qcow2 image over the disk, with clusters and subclusters of the
    /// sizes that [`System::Kept`] has.
    QemuKept,
}

impl System {
    pub const ALL: [System; 5] = [
        System::Ours,
        System::NoFilter,
        System::CDefault,
        System::C4K,
        System::Qemu,
    ];

    /// What is compared where the overlay is kept, in the order of that table's columns.
    pub const KEPT: [System; 3] = [System::Kept, System::Ours, System::QemuKept];

    /// What a request of a rate costs the processor: all of them, and this filter with an
    /// overlay that is kept.
    pub const CHARGED: [System; 6] = [
        System::Ours,
        System::NoFilter,
        System::Kept,
        System::CDefault,
        System::C4K,
        System::Qemu,
    ];

    /// The same in the order of that table's columns.
    pub const COMPARED_AND_KEPT: [System; 5] = [
        System::Ours,
        System::Kept,
        System::CDefault,
        System::C4K,
        System::Qemu,
    ];

    /// All but "no filter", in the order of the table's columns.
    pub const COMPARED: [System; 4] = [System::Ours, System::CDefault, System::C4K, System::Qemu];

    pub fn name(self) -> &'static str {
        match self {
            System::Ours => "this filter",
            System::NoFilter => "no filter",
            System::CDefault => "C filter",
            System::C4K => "C filter, 4K blocks",
            System::Qemu => "qemu-nbd --snapshot",
            System::Kept => "cow-overlay",
            System::QemuKept => "qemu-nbd, qcow2",
        }
    }
}

/// What is to be served.
#[derive(Clone)]
pub struct Setup {
    plugin: Vec<String>,
    disk: Option<PathBuf>,
    /// "No filter" serves a fresh sparse file of the disk's size instead of the
    /// disk: it is going to be written to.
    fresh: bool,
    delay: bool,
    /// Whether the server keeps to itself where the disk has holes.
    dense: bool,
    /// The image that is to be gone on with, in place of a new one.
    image: Option<PathBuf>,
    /// Runs the server under this command.
    pub under: Vec<String>,
}

impl Setup {
    /// A file, to be read.
    pub fn disk(path: &Path) -> Setup {
        Setup {
            plugin: vec!["file".into(), format!("file={}", path.display())],
            disk: Some(path.into()),
            fresh: false,
            delay: false,
            dense: false,
            image: None,
            under: Vec::new(),
        }
    }

    /// A plugin of nbdkit's and its parameters; qemu-nbd can't serve that.
    pub fn plugin(words: &[&str]) -> Setup {
        Setup {
            plugin: words.iter().map(ToString::to_string).collect(),
            disk: None,
            fresh: false,
            delay: false,
            dense: false,
            image: None,
            under: Vec::new(),
        }
    }

    pub fn written(self) -> Setup {
        Setup {
            fresh: true,
            ..self
        }
    }

    /// Each read of the disk takes 5 ms.
    pub fn slow(self) -> Setup {
        Setup {
            delay: true,
            ..self
        }
    }

    /// For the systems that keep their overlay: they go on with this image.
    pub fn resuming(self, image: &Path) -> Setup {
        Setup {
            image: Some(image.into()),
            ..self
        }
    }

    /// Starts a server with its overlay below `place`, and waits until a client
    /// has connected.
    pub fn start(&self, system: System, place: &Path) -> Result<Server, String> {
        let own = tempfile::Builder::new()
            .prefix("server.")
            .tempdir_in(place)
            .map_err(|error| format!("no directory for a server: {error}"))?;
        let mut below = None;
        let mut command = if system == System::Qemu {
            let mut image = self.disk.clone().ok_or("serves files only")?;
            if self.delay {
                let disk = Setup {
                    fresh: false,
                    // qemu asks for holes before each read. The disk has none, and to
                    // find that out takes tmpfs longer than the delay takes.
                    dense: true,
                    ..self.clone()
                };
                let server = disk.start(System::NoFilter, place)?;
                image = server.uri().into();
                below = Some(Box::new(server));
            }
            let from = ["--snapshot", "-f", "raw"];
            self.qemu(&from, &image, own.path())
        } else if system == System::QemuKept {
            let image = match &self.image {
                Some(image) => image.clone(),
                None => self.new_image(own.path())?,
            };
            self.qemu(&["-f", "qcow2"], &image, own.path())
        } else {
            self.nbdkit(system, own.path())?
        };
        command.env("TMPDIR", own.path());
        Server::start(command, own, below)
    }

    fn nbdkit(&self, system: System, own: &Path) -> Result<Command, String> {
        let mut words = self.under.clone();
        words.extend(["nbdkit", "-f", "-U"].map(String::from));
        words.push(socket_in(own).display().to_string());
        if !self.under.is_empty() {
            // Below perf it is no child of ours. Elsewhere this would make of the
            // signal at our end one that it may take its time over.
            words.push("--exit-with-parent".into());
        }
        let filter = match system {
            System::Ours | System::Kept => Some(ours()),
            System::CDefault | System::C4K => Some(of_nbdkit()?),
            System::NoFilter | System::Qemu | System::QemuKept => None,
        };
        words.extend(filter.map(|filter| format!("--filter={filter}")));
        if self.dense {
            words.push("--filter=noextents".into());
        }
        if self.delay {
            words.push("--filter=delay".into());
        }
        match &self.disk {
            Some(disk) if self.fresh && system == System::NoFilter => {
                let fresh = own.join("fresh");
                sparse(&fresh, size_of(disk)?)?;
                words.extend(["file".into(), format!("file={}", fresh.display())]);
            }
            _ => words.extend(self.plugin.iter().cloned()),
        }
        if system == System::C4K {
            words.push("cow-block-size=4096".into());
        }
        if system == System::Kept {
            let image = self.image.clone().unwrap_or_else(|| image_in(own));
            words.push(format!("cow-overlay={}", image.display()));
        }
        if self.delay {
            words.push("delay-read=5ms".into());
        }
        Ok(command_of(&words))
    }

    fn qemu(&self, from: &[&str], image: &Path, own: &Path) -> Command {
        let mut words = self.under.clone();
        words.extend(["qemu-nbd", "--persistent"].map(String::from));
        words.extend(from.iter().map(ToString::to_string));
        words.extend(["-e", "8", "-k"].map(String::from));
        words.push(socket_in(own).display().to_string());
        words.push(image.display().to_string());
        command_of(&words)
    }

    /// An image of qemu's over the disk, with subclusters of 4K as ours has.
    fn new_image(&self, own: &Path) -> Result<PathBuf, String> {
        let image = image_in(own);
        let disk = self.disk.as_ref().ok_or("serves files only")?;
        let mut create = command("qemu-img");
        create
            .args(["create", "-q", "-f", "qcow2", "-F", "raw"])
            .args(["-o", "extended_l2=on,cluster_size=128k", "-b"])
            .args([disk, &image]);
        command::run(&mut create, command::LIMIT)?;
        Ok(image)
    }
}

fn command_of(words: &[String]) -> Command {
    let mut command = command(&words[0]);
    command.args(&words[1..]);
    command
}

fn image_in(own: &Path) -> PathBuf {
    own.join("diff.qcow2")
}

/// A sparse file of this many bytes.
pub fn sparse(path: &Path, size: u64) -> Result<(), String> {
    File::create(path)
        .and_then(|file| file.set_len(size))
        .map_err(|error| format!("no sparse file of {size} bytes: {error}"))
}

fn size_of(path: &Path) -> Result<u64, String> {
    fs::metadata(path)
        .map(|about| about.len())
        .map_err(|error| format!("the disk: {error}"))
}
