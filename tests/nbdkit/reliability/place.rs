//! Overlays of each kind, where they lie, and what an nbdkit that serves them has open.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::harness::command::{LIMIT, eventually};
use crate::harness::mount::Mount;
use crate::harness::{Server, Setup, run, scratch};

/// Of the overlays that the tests use; small, so that a request has many.
pub const BLOCK: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Temporary,
    /// Each connection has its own.
    Connection,
    Kept,
}

/// A directory for overlays of one kind, and for an image.
pub struct Place {
    kind: Kind,
    path: PathBuf,
    _scratch: Option<TempDir>,
}

impl Place {
    pub fn new(kind: Kind) -> Place {
        let scratch = scratch();
        Place::make(kind, scratch.path().into(), Some(scratch))
    }

    pub fn on(mount: &Mount, kind: Kind) -> Place {
        Place::make(kind, mount.path().into(), None)
    }

    fn make(kind: Kind, path: PathBuf, scratch: Option<TempDir>) -> Place {
        fs::create_dir(path.join("overlays")).expect("a directory for overlays");
        Place {
            kind,
            path,
            _scratch: scratch,
        }
    }

    pub fn image(&self) -> PathBuf {
        self.path.join("diff.qcow2")
    }

    pub fn serve(&self, setup: Setup, plugin: &[&str]) -> Server {
        let block = format!("cow-block-size={BLOCK}");
        let overlay = format!("cow-overlay={}", self.image().display());
        let more: &[&str] = match self.kind {
            Kind::Temporary => &[],
            Kind::Connection => &["cow-scope=connection"],
            // Of a plugin without a file.
            Kind::Kept if plugin[0] != "file" => &[&overlay, "cow-backing=nbd:localhost:1"],
            Kind::Kept => &[&overlay],
        };
        setup
            .tmpdir(&self.path.join("overlays"))
            .start(&[plugin, &[&block], more].concat())
    }

    /// After a clean end.
    pub fn assert_sound(&self) {
        if self.kind == Kind::Kept {
            let image = self.image();
            // The base need not be one that QEMU can open.
            let image = format!(
                r#"json:{{"driver": "qcow2", "backing": null,
                    "file": {{"driver": "file", "filename": "{}"}}}}"#,
                image.display()
            );
            run(&["qemu-img", "check", "-q", &image]);
        }
    }
}

/// What an nbdkit has.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    pub threads: usize,
    pub files: usize,
    /// Memory that is no file's, in bytes.
    pub memory: u64,
}

impl Figures {
    pub fn of(server: &Server) -> Figures {
        let proc = PathBuf::from(format!("/proc/{}", server.pid()));
        let count = |name: &str| fs::read_dir(proc.join(name)).expect("nbdkit's").count();
        Figures {
            threads: count("task"),
            files: count("fd"),
            memory: anonymous_memory(&proc),
        }
    }

    /// When all clients have gone: beside the main thread there are those of the filter,
    /// which have names of their own.
    pub fn when_idle(server: &Server) -> Figures {
        let is_idle = || threads_of_nbdkit(server.pid()) == 1;
        assert!(eventually(LIMIT, is_idle), "{:?}", Figures::of(server));
        Figures::of(server)
    }

    /// Waits until the threads and the files are as many as they were.
    pub fn expect_again(self, server: &Server) {
        let mut now = self;
        let is_same = eventually(LIMIT, || {
            now = Figures::of(server);
            now.threads == self.threads && now.files == self.files
        });
        assert!(is_same, "{now:?}, and before {self:?}");
    }
}

fn threads_of_nbdkit(pid: u32) -> usize {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("nbdkit's threads");
    let names = tasks.flatten().map(|task| {
        // One that has just ended has none.
        fs::read_to_string(task.path().join("comm")).unwrap_or_default()
    });
    names.filter(|name| !name.starts_with("cow-")).count()
}

fn anonymous_memory(proc: &Path) -> u64 {
    let status = fs::read_to_string(proc.join("status")).expect("nbdkit's status");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let kilobytes = kilobytes.expect("kilobytes").trim().parse::<u64>();
    kilobytes.expect("a number") << 10
}
