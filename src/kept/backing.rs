//! The base of an image, as the image names it: what to record, and whether what is
//! recorded is the base that is served.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{self, Path, PathBuf};

use super::{Kept, Served, fingerprint};
use crate::base::Base;
use crate::error::{Error, Result};
use crate::qcow2::header::{Header, MAX_BACKING_NAME, Mtime, Sample};
use crate::qcow2::layout::SECTOR;

/// What QEMU is to find the base by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// A file's absolute path.
    File(PathBuf),
    /// Anything else: a URI, or another name with a protocol.
    Name(OsString),
}

impl Backing {
    /// Takes a name as QEMU does: one with a colon before the first slash has a
    /// protocol, all others are paths.
    pub fn parse(name: &OsStr) -> Self {
        let bytes = name.as_bytes();
        let end = bytes.iter().position(|b| *b == b'/').unwrap_or(bytes.len());
        if bytes[..end].contains(&b':') {
            Backing::Name(name.to_owned())
        } else {
            Backing::File(absolute(Path::new(name)))
        }
    }

    pub fn as_os_str(&self) -> &OsStr {
        match self {
            Backing::File(path) => path.as_os_str(),
            Backing::Name(name) => name,
        }
    }
}

/// nbdkit changes its directory to `/` when it goes into the background.
pub fn absolute(path: &Path) -> PathBuf {
    // It fails for an empty path, or where there is no current directory: opening
    // the file will tell.
    path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

impl Kept {
    /// The recorded name must be that of the base, and the base should not have
    /// changed since.
    pub(super) fn check_backing(&self, header: &Header) -> Result<()> {
        let recorded = OsStr::from_bytes(&header.backing);
        let recorded_file = match Backing::parse(recorded) {
            Backing::File(_) => Some(self.path.directory().join(recorded)),
            Backing::Name(_) => None,
        };
        let Some(backing) = &self.backing else {
            // Any disk of the same size would pass, and look damaged under the image.
            let name = recorded_file.as_deref().unwrap_or(Path::new(recorded));
            return Err(self.path.refused(format!(
                "nothing says that this is the disk that it was made for: \
                 if it is, give its name with cow-backing={}",
                name.display()
            )));
        };
        let is_same = match (backing, &recorded_file) {
            (Backing::File(ours), Some(recorded)) => is_same_file(ours, recorded),
            (Backing::Name(ours), None) => ours == recorded,
            _ => false,
        };
        if !is_same {
            let recorded = recorded_file.as_deref().unwrap_or(Path::new(recorded));
            return Err(self.path.refused(format!(
                "its backing file is {0}, not {1} (if {0} is what is served, give \
                 cow-backing={0}; if it was renamed or moved, tell the image with: \
                 qemu-img rebase -u -F raw -b NAME)",
                recorded.display(),
                Path::new(backing.as_os_str()).display()
            )));
        }
        // The size of the export itself is not known before a client has chosen it. It may
        // be that a filter makes more of a shorter file.
        if let Backing::File(path) = backing {
            let (_, size) = self.open_backing(path)?;
            if size > header.layout.disk_size() {
                // (What QEMU may have written is not known yet either.)
                self.expect_made_for(size, header.layout.disk_size(), true)?;
            }
        }
        let now = recorded_file.as_deref().and_then(mtime_of);
        let was_modified = matches!((header.mtime, now), (Some(then), Some(now)) if then != now);
        if was_modified {
            log::warn!(
                "the base {} was modified since {} was made: if its content is another, \
                 the blocks that were not written to have changed under it",
                Path::new(recorded).display(),
                self.path.path().display()
            );
        }
        Ok(())
    }

    /// The name of the base as QEMU is to find it: relative to the directory of the
    /// image if it lies there too, so that the two can be moved together.
    pub(super) fn recorded_name(&self, backing: &Backing) -> Result<Vec<u8>> {
        let name = match backing {
            Backing::Name(name) => name.clone().into_vec(),
            Backing::File(path) => {
                let metadata = fs::metadata(path).map_err(|e| {
                    let path = path.display();
                    self.path
                        .failed(e, &format!("looking at {path} (see cow-backing) for"))
                })?;
                let kind = metadata.file_type();
                if !kind.is_file() && !kind.is_block_device() {
                    return Err(self.path.refused(format!(
                        "its backing file {} is no file and no block device: \
                         give its name with cow-backing=",
                        path.display()
                    )));
                }
                match (path.parent(), path.file_name()) {
                    (Some(parent), Some(name)) if is_same_file(parent, self.path.directory()) => {
                        // QEMU takes what is before a colon for a protocol.
                        let has_colon = name.as_bytes().contains(&b':');
                        let prefix = if has_colon { "./" } else { "" };
                        [prefix.as_bytes(), name.as_bytes()].concat()
                    }
                    _ => path.clone().into_os_string().into_vec(),
                }
            }
        };
        if name.is_empty() || name.len() > MAX_BACKING_NAME {
            return Err(self.path.refused(format!(
                "the name of its backing file has {} bytes, and must have 1 to {MAX_BACKING_NAME}",
                name.len()
            )));
        }
        Ok(name)
    }

    /// `has_content`: as far as is known, something was written to the image.
    pub(super) fn expect_made_for(&self, size: u64, overlay: u64, has_content: bool) -> Result<()> {
        if overlay == size {
            return Ok(());
        }
        let hint = if !has_content {
            // A client of another export may only have looked.
            " (nothing was written to it so far: if that is still so when nbdkit has \
              ended, it can be removed, and is made anew)"
                .to_string()
        } else if size == overlay.next_multiple_of(SECTOR) {
            format!(
                " (qemu-img commit makes it a whole number of sectors: \
                 cut it with truncate -s {overlay})"
            )
        } else {
            String::new()
        };
        Err(self.path.refused(format!(
            "it was made for a base of {overlay} bytes, but this one has {size}{hint}"
        )))
    }

    /// The backing file, and its size.
    pub(super) fn open_backing(&self, path: &Path) -> Result<(File, u64)> {
        // (A block device has its size at its end.)
        open_to_read(path)
            .and_then(|mut file| {
                let size = file.seek(SeekFrom::End(0))?;
                Ok((file, size))
            })
            .map_err(|e| {
                let path = path.display();
                self.path
                    .failed(e, &format!("asking the size of {path} for"))
            })
    }

    /// What the clients see must be what QEMU will find under the recorded name. QEMU
    /// finds zeroes beyond the end of a shorter file, and nothing of a longer one.
    pub(super) fn expect_size(&self, path: &Path, size: u64) -> Result<()> {
        let (_, found) = self.open_backing(path)?;
        if found <= size {
            return Ok(());
        }
        self.refuse_size(path, found, size)
    }

    fn refuse_size<T>(&self, path: &Path, found: u64, size: u64) -> Result<T> {
        self.path.refuse(format!(
            "the export has {size} bytes, but its backing file {} has {found}: \
             give the name of what is exported with cow-backing=",
            path.display()
        ))
    }

    /// The fingerprint of `base`. EINVAL if QEMU would find other bytes under the name of
    /// the backing file than the clients see.
    pub(super) fn fingerprint_of(&self, base: &impl Base) -> Result<Vec<Sample>> {
        let size = base.size();
        let Some(Backing::File(path)) = &self.backing else {
            return Ok(fingerprint::take(base, size));
        };
        let (file, end) = self.open_backing(path)?;
        let samples = fingerprint::take(base, end);
        let is_within = |at: u64| fingerprint::range_at(at, size).end <= end;
        if end < size && samples.last().is_none_or(|last| is_within(last.offset)) {
            // Zeroes could have been read.
            return self.refuse_size(path, end, size);
        }
        let path = path.display();
        let read = |buf: &mut [u8], at| {
            fingerprint::read_continued(&file, buf, at)
                .map_err(|e| Error::io(e, format!("reading {path}")))
        };
        match fingerprint::first_difference(&samples, size, |_| Ok(true), read)? {
            None => Ok(samples),
            Some(at) if is_within(at) => self.path.refuse(format!(
                "what is served is not what its backing file {path} has at offset {at}: a filter \
                 below changes it, or it is another export: give the name of what is served \
                 with cow-backing="
            )),
            Some(at) => self.path.refuse(format!(
                "its backing file {path} has {end} bytes, but what is served is not those and \
                 zeroes behind them: it has others at offset {at}: give the name of what is \
                 served with cow-backing="
            )),
        }
    }

    /// Whether `base` is that of the image, as far as its fingerprint tells. EINVAL if it is
    /// not. When it is taken, and which of it is compared: see [`fingerprint`].
    pub(super) fn recognise(&self, served: &mut Served, base: &impl Base) -> Result<()> {
        let Served {
            overlay, header, ..
        } = served;
        if header.fingerprint().is_empty() {
            return Ok(());
        }
        if overlay.is_untouched() || header.samples.is_empty() {
            let samples = self.fingerprint_of(base)?;
            if samples != header.samples {
                let is_trusted =
                    !overlay.is_untouched() && !fingerprint::in_base(&samples, overlay)?.is_empty();
                let new = Header {
                    samples,
                    mtime: self.base_mtime(),
                    ..header.clone()
                };
                overlay.store().image().record_fingerprint(&new)?;
                *header = new;
                if is_trusted {
                    log::warn!(
                        "the disk that is served is taken for the one below {}: \
                         nothing is recorded to compare it with",
                        self.path.path().display()
                    );
                }
            }
            return Ok(());
        }
        let is_compared = |range| overlay.is_base(range);
        let read = |buf: &mut [u8], at| base.read(buf, at);
        let differs =
            fingerprint::first_difference(&header.samples, base.size(), is_compared, read)?;
        let Some(at) = differs else {
            return Ok(());
        };
        self.path.refuse(format!(
            "what is served is not the disk that it was made for, or that disk was changed: at \
             offset {at} it has other bytes. Serve that disk as it was. (If it was changed on \
             purpose: qemu-img convert -O raw {} NEW makes a disk of the two as they are now.)",
            self.path.path().display()
        ))
    }

    /// Forgets the samples of blocks that were written to. If `qemu-img commit` brings them
    /// to the base and empties the image, they are *base* again, and have other bytes.
    pub(super) fn forget_written(served: &mut Served) -> Result<()> {
        let Served { overlay, header } = served;
        let samples = fingerprint::in_base(&header.samples, overlay)?;
        if samples != header.samples {
            header.samples = samples;
            overlay.store().image().record_fingerprint(header)?;
        }
        Ok(())
    }

    /// That of the backing file, where it is one.
    pub(super) fn base_mtime(&self) -> Option<Mtime> {
        match &self.backing {
            Some(Backing::File(path)) => mtime_of(path),
            _ => None,
        }
    }
}

/// Does not wait for a program that writes, if it is a pipe.
pub(super) fn open_to_read(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}

/// Whether two names are those of one file.
fn is_same_file(a: &Path, b: &Path) -> bool {
    let id = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    a == b || id(a).is_some_and(|a| id(b) == Some(a))
}

/// That of a regular file; the node of a device does not show when the device was
/// written to.
fn mtime_of(path: &Path) -> Option<Mtime> {
    fs::metadata(path)
        .ok()
        .filter(Metadata::is_file)
        .map(|m| Mtime {
            seconds: m.mtime(),
            nanoseconds: m.mtime_nsec() as u32,
        })
}
