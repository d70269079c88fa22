//! What a run of nbdkit begins with.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::disk::{Expected, Model, Session};
use super::script::{SIZE, base};
use crate::harness::command::{command, success};
use crate::harness::nbd::Client;
use crate::harness::server::Refusal;
use crate::harness::{Base, Server, Setup, scratch};

/// Which overlay nbdkit starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Temporary,
    /// An image that the first client makes.
    New,
    /// An image that has content, of a run that did not end well.
    Resumed,
    /// An image to which QEMU has written.
    Foreign,
}

/// An image to begin with, and what it has.
struct Image {
    path: PathBuf,
    bytes: Vec<u8>,
}

/// What all cases share.
pub struct Ground {
    base: Base,
    bytes: Vec<u8>,
    resumed: Image,
    foreign: Image,
    _directory: TempDir,
}

/// The files of a case.
pub struct Files {
    directory: TempDir,
    /// What must be there at the end.
    expected: Vec<&'static str>,
}

impl Files {
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn assert_nothing_left(&self) {
        let entries = fs::read_dir(self.path("disk")).expect("our own directory");
        let left: Vec<_> = entries
            .map(|entry| entry.expect("a file").file_name())
            .collect();
        assert_eq!(left, self.expected, "what is beside the image");
    }
}

impl Ground {
    pub fn new() -> Ground {
        let directory = scratch();
        let image = |name: &str| Image {
            path: directory.path().join(name),
            bytes: Vec::new(),
        };
        let mut ground = Ground {
            base: Base::new(&base()),
            bytes: base(),
            resumed: image("resumed"),
            foreign: image("foreign"),
            _directory: directory,
        };
        let files = ground.files(Kind::New);
        let server = serves(ground.serve(Kind::New, &files, &[]));
        let mut model = ground.model(Kind::New);
        let client = Client::connect(&server.socket()).expect("a client");
        let expected = Expected::nothing();
        let mut session = Session::new(client, &mut model, &expected, &files.path("copy"));
        session.run();
        session.flush();
        drop(session);
        // So it has the mark of a run.
        server.kill();
        copy(&files.path("disk/diff.qcow2"), &ground.resumed.path);
        ground.resumed.bytes = model.bytes().to_vec();
        copy(&files.path("disk/diff.qcow2"), &ground.foreign.path);
        success(
            command("qemu-io")
                .args(["-c", "write -P 9 256k 700k", "-c", "write -P 8 3700k 50k"])
                .args(["-c", "discard 2M 256k"])
                .arg(&ground.foreign.path),
        );
        ground.foreign.bytes = content(&ground.foreign.path);
        ground
    }

    pub fn files(&self, kind: Kind) -> Files {
        let directory = scratch();
        let disk = directory.path().join("disk");
        fs::create_dir(&disk).expect("a directory for the image");
        let image = disk.join("diff.qcow2");
        match kind {
            Kind::Temporary | Kind::New => {}
            Kind::Resumed => copy(&self.resumed.path, &image),
            Kind::Foreign => copy(&self.foreign.path, &image),
        }
        let expected = match kind {
            Kind::Temporary => vec![],
            _ => vec!["diff.qcow2"],
        };
        Files {
            directory,
            expected,
        }
    }

    pub fn model(&self, kind: Kind) -> Model {
        match kind {
            Kind::Temporary | Kind::New => Model::new(self.bytes.clone(), false),
            Kind::Resumed => Model::new(self.resumed.bytes.clone(), true),
            Kind::Foreign => Model::new(self.foreign.bytes.clone(), true),
        }
    }

    pub fn serve(&self, kind: Kind, files: &Files, under: &[&str]) -> Result<Server, Refusal> {
        let copy = format!("cow-on-read={}", text(&files.path("copy")));
        let image = format!("cow-overlay={}", text(&files.path("disk/diff.qcow2")));
        let mut plugin = vec![
            "file",
            self.base.path(),
            "cow-block-size=4096",
            "cow-on-cache=true",
            &copy,
        ];
        let mut setup = Setup::new().option("-t1").under(under);
        if kind == Kind::Temporary {
            // So that the disk takes two files.
            setup = setup.file_size_limit(4 << 20);
        } else {
            plugin.push(&image);
        }
        setup.try_start(&plugin)
    }
}

/// What QEMU reads from an image.
pub fn content(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("raw");
    let convert = ["convert", "-f", "qcow2", "-O", "raw"];
    success(command("qemu-img").args(convert).arg(image).arg(&raw));
    let mut bytes = fs::read(&raw).expect("what was converted");
    fs::remove_file(&raw).expect("our own file");
    // QEMU knows whole sectors only.
    bytes.truncate(SIZE);
    bytes
}

fn copy(from: &Path, to: &Path) {
    success(command("cp").arg("--sparse=always").arg(from).arg(to));
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path of our own making")
}

/// An nbdkit in which nothing is wrong.
pub fn serves(server: Result<Server, Refusal>) -> Server {
    server.unwrap_or_else(|refusal| {
        let Refusal { status, stderr } = refusal;
        panic!("nbdkit ended: {status}\n{stderr}")
    })
}
