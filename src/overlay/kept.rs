//! The overlay that one can keep: a qcow2 image in place of files without a name.
//!
//! There is one, for one export. It is opened, and found fit, before any client
//! connects, so that what is wrong is told at start; an image that does not exist
//! yet is made as soon as the size of the disk is known.

use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::sys::resource::{Resource, getrlimit};

use super::directory::Directory;
use super::store::Files;
use super::{Overlay, Store};
use crate::block::{BlockNum, BlockSize, ByteRange};
use crate::config::{Backing, Config, ScopeKind};
use crate::error::{Error, Result};
use crate::qcow2::file::ImageFile;
use crate::qcow2::header::{Header, MAX_BACKING_NAME, Mtime};
use crate::qcow2::image::{CLUSTERS_PER_GROUP, Image};
use crate::qcow2::layout::{BLOCKS_PER_CLUSTER, GuestCluster, Layout};
use crate::qcow2::lock::lock_for_writing;

const BLOCKS_PER_GROUP: u64 = BLOCKS_PER_CLUSTER * CLUSTERS_PER_GROUP;

/// A store in a qcow2 image.
pub struct KeptStore<F> {
    image: Image<F>,
    can_zero_range: bool,
}

impl<F: ImageFile> KeptStore<F> {
    pub fn new(image: Image<F>, can_zero_range: bool) -> Self {
        KeptStore {
            image,
            can_zero_range,
        }
    }

    pub fn image(&self) -> &Image<F> {
        &self.image
    }

    /// `range` in the file; it lies within the disk.
    fn host(&self, offset: u64, len: u64) -> Result<u64> {
        let layout = self.image.layout();
        ByteRange::checked(offset, len, layout.disk_size())?;
        Ok(layout.data + offset)
    }

    fn error(&self, source: io::Error, tried: &str, offset: u64, len: u64) -> Error {
        let path = self.image.path().display();
        Error::io(
            source,
            format!("{tried} the overlay {path} ({len} bytes at offset {offset} of the disk)"),
        )
    }
}

impl<F: ImageFile> Store for KeptStore<F> {
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let len = buf.len() as u64;
        self.image
            .file()
            .read_at(buf, self.host(offset, len)?)
            .map_err(|e| self.error(e, "reading", offset, len))
    }

    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        let len = buf.len() as u64;
        self.image
            .file()
            .write_at(buf, self.host(offset, len)?)
            .map_err(|e| self.error(e, "writing to", offset, len))
    }

    fn punch(&self, range: ByteRange) -> Result<bool> {
        self.image
            .file()
            .punch(self.host(range.start, range.len())?, range.len())
            .map_err(|e| self.error(e, "punching a hole in", range.start, range.len()))
    }

    fn zero_range(&self, range: ByteRange) -> Result<bool> {
        if !self.can_zero_range {
            return Ok(false);
        }
        self.image
            .file()
            .zero_range(self.host(range.start, range.len())?, range.len())
            .map_err(|e| self.error(e, "zeroing", range.start, range.len()))
    }

    fn can_zero_range(&self) -> bool {
        self.can_zero_range
    }

    fn publish(
        &self,
        blocks: &Range<BlockNum>,
        change: impl Fn(&Range<BlockNum>) -> Result<bool>,
    ) -> Result<()> {
        let mut at = blocks.start.0;
        while at < blocks.end.0 {
            let end = blocks
                .end
                .0
                .min((at / BLOCKS_PER_GROUP + 1) * BLOCKS_PER_GROUP);
            let clusters = GuestCluster(at / BLOCKS_PER_CLUSTER)
                ..GuestCluster(end.div_ceil(BLOCKS_PER_CLUSTER));
            self.image
                .publish(clusters, || change(&(BlockNum(at)..BlockNum(end))))?;
            at = end;
        }
        Ok(())
    }

    fn flush(&self, word: &dyn Fn(u64) -> u64) -> Result<()> {
        self.image.flush(&|cluster: GuestCluster| word(cluster.0))
    }
}

impl<F: ImageFile> Overlay<KeptStore<F>> {
    /// The overlay that an image holds; `wrap` makes a store of it. The errors are
    /// those of [`Image::load`].
    pub fn resume(image: Image<F>, can_zero_range: bool) -> Result<Self> {
        let layout = image.layout();
        let store = KeptStore::new(image, can_zero_range);
        let overlay = Overlay::new(layout.disk_size(), layout.block_size(), store);
        // A crash leaves bytes that no flush has told of, and a failed write too: what
        // is discarded from now on gives their space back.
        overlay.has_strays.store(true, Ordering::Relaxed);
        overlay
            .store
            .image
            .load(|group, words| overlay.map.load(group * CLUSTERS_PER_GROUP, words))?;
        Ok(overlay)
    }
}

/// What `cow-overlay` asks for; see the module's documentation.
pub struct Kept {
    path: PathBuf,
    block_size: Option<BlockSize>,
    /// The base's name, if one was given or can be told from the parameters.
    backing: Option<Backing>,
    overlay: OnceLock<Arc<Overlay<Files>>>,
    /// The export that it belongs to: that of the first connection. Outermost
    /// lock, held while an image is made.
    export: Mutex<Option<CString>>,
}

impl Kept {
    /// Opens the image at `path` if there is one, else looks whether one can be made.
    pub fn start(path: &Path, config: &Config) -> Result<Self> {
        if config.scope == ScopeKind::Connection {
            return Err(Error::new(
                libc::EINVAL,
                "cow-scope=connection can't be used with cow-overlay: \
                 one file can't keep an overlay for every connection",
            ));
        }
        if let Some(block_size) = config.block_size {
            // For the message alone: the size of the disk is not known yet.
            Layout::new(0, block_size)?;
        }
        let kept = Kept {
            path: path.to_owned(),
            block_size: config.block_size,
            backing: config.backing(),
            overlay: OnceLock::new(),
            export: Mutex::default(),
        };
        match File::options().read(true).write(true).open(path) {
            Ok(file) => kept.set(kept.resume(file)?),
            Err(e) if e.kind() == io::ErrorKind::NotFound => kept.expect_makeable()?,
            Err(e) => return Err(kept.failed(e, "opening it")),
        }
        Ok(kept)
    }

    fn set(&self, overlay: Overlay<Files>) {
        // Called once, at start or under the lock of `export`.
        let _ = self.overlay.set(Arc::new(overlay));
    }

    fn failed(&self, source: io::Error, tried: &str) -> Error {
        Error::io(
            source,
            format!("cow-overlay={}: {tried}", self.path.display()),
        )
    }

    fn refused(&self, what: impl std::fmt::Display) -> Error {
        Error::new(
            libc::EINVAL,
            format!("cow-overlay={} can't be used: {what}", self.path.display()),
        )
    }

    /// Locks `file` as QEMU does, so that no other program writes to it.
    fn lock(&self, file: &File) -> Result<()> {
        match lock_for_writing(file) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::new(
                libc::EBUSY,
                format!(
                    "cow-overlay={} is in use by another program (nbdkit, qemu, qemu-img)",
                    self.path.display()
                ),
            )),
            Err(e) => Err(self.failed(e, "locking it")),
        }
    }

    fn resume(&self, file: File) -> Result<Overlay<Files>> {
        let metadata = file
            .metadata()
            .map_err(|e| self.failed(e, "looking at it"))?;
        if !metadata.is_file() {
            return Err(self.refused("it is no regular file"));
        }
        self.lock(&file)?;
        let (image, header) = Image::open(file, &self.path)?;
        let layout = header.layout;
        if self
            .block_size
            .is_some_and(|size| size != layout.block_size())
        {
            return Err(self.refused(format!(
                "it has blocks of {}: leave cow-block-size out, or give that",
                layout.block_size()
            )));
        }
        self.check_backing(&header)?;
        self.expect_allowed(layout)?;
        let can_zero_range = Directory::try_out(self.directory().to_owned())
            .is_ok_and(|directory| directory.can_zero_range());
        let overlay = Overlay::resume(image, can_zero_range)?;
        log::debug!(
            "cow-overlay={}: goes on with a disk of {} bytes in blocks of {}",
            self.path.display(),
            layout.disk_size(),
            layout.block_size()
        );
        Ok(overlay.map_store(Files::Kept))
    }

    /// The recorded name must be that of the base, and the base should not have
    /// changed since.
    fn check_backing(&self, header: &Header) -> Result<()> {
        let recorded = OsStr::from_bytes(&header.backing);
        let recorded_file = match Backing::parse(recorded) {
            Backing::File(_) => Some(self.directory().join(recorded)),
            Backing::Name(_) => None,
        };
        let is_same = match (&self.backing, &recorded_file) {
            (None, _) => true,
            (Some(Backing::File(ours)), Some(recorded)) => is_same_file(ours, recorded),
            (Some(Backing::Name(ours)), None) => ours == recorded,
            _ => false,
        };
        if !is_same {
            let ours = self
                .backing
                .as_ref()
                .map_or(OsStr::new(""), Backing::as_os_str);
            return Err(self.refused(format!(
                "its backing file is {}, not {} (if the base was renamed or moved, tell the \
                 image with: qemu-img rebase -u -F raw -b NAME)",
                Path::new(recorded).display(),
                Path::new(ours).display()
            )));
        }
        // The export's own size is not known before nbdkit is in the background.
        if let Some(Backing::File(path)) = &self.backing {
            self.expect_made_for(self.size_of(path)?, header.layout.disk_size())?;
        }
        let now = recorded_file.as_deref().and_then(mtime_of);
        let was_modified = matches!((header.mtime, now), (Some(then), Some(now)) if then != now);
        if was_modified {
            log::warn!(
                "the base {} was modified since {} was made: if its content is another, \
                 the blocks that were not written to have changed under it",
                Path::new(recorded).display(),
                self.path.display()
            );
        }
        Ok(())
    }

    /// Finds out what the file system of the image can do.
    fn try_directory(&self) -> Result<Directory> {
        let directory = self.directory();
        Directory::try_out(directory.to_owned()).map_err(|e| {
            let tried = format!("making a sparse file in {}", directory.display());
            self.failed(e, &tried)
        })
    }

    fn directory(&self) -> &Path {
        // Absolute, so there is one, except for "/", which is no regular file.
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Looks, before nbdkit goes into the background, whether the image will find its
    /// place, as far as that can be told.
    fn expect_makeable(&self) -> Result<()> {
        if self.path.is_symlink() {
            return Err(self.refused("it is a symbolic link to a file that does not exist"));
        }
        let Some(backing) = &self.backing else {
            return Err(self
                .refused("the name of its backing file is not known: give it with cow-backing="));
        };
        self.recorded_name(backing)?;
        let directory = self.try_directory()?;
        if let Backing::File(path) = backing {
            // It has to have the size of the export.
            let layout = Layout::new(self.size_of(path)?, self.block_size_in(&directory))?;
            self.expect_allowed(layout)?;
            tempfile::tempfile_in(self.directory())
                .and_then(|file| file.set_len(layout.end))
                .map_err(|e| self.failed(e, &format!("making it {} bytes long", layout.end)))?;
        }
        Ok(())
    }

    fn block_size_in(&self, directory: &Directory) -> BlockSize {
        self.block_size
            .unwrap_or_else(|| directory.default_block_size())
    }

    /// Beyond the limit of `ulimit -f` the system does not answer a write with an
    /// error but ends the process by SIGXFSZ.
    fn expect_allowed(&self, layout: Layout) -> Result<()> {
        let limit = getrlimit(Resource::RLIMIT_FSIZE);
        let (limit, _) = limit.map_err(|e| self.failed(e.into(), "asking for ulimit -f"))?;
        if layout.end <= limit {
            return Ok(());
        }
        Err(Error::new(
            libc::EFBIG,
            format!(
                "cow-overlay={} can't be used: it takes a file of {} bytes, \
                 but the limit on the size of a file (ulimit -f) is {limit}",
                self.path.display(),
                layout.end
            ),
        ))
    }

    /// The name of the base as QEMU is to find it: relative to the directory of the
    /// image if it lies there too, so that the two can be moved together.
    fn recorded_name(&self, backing: &Backing) -> Result<Vec<u8>> {
        let name = match backing {
            Backing::Name(name) => name.clone().into_vec(),
            Backing::File(path) => {
                let metadata = fs::metadata(path).map_err(|e| {
                    Error::io(
                        e,
                        format!(
                            "cow-overlay={}: its backing file {} (see cow-backing)",
                            self.path.display(),
                            path.display()
                        ),
                    )
                })?;
                let kind = metadata.file_type();
                if !kind.is_file() && !kind.is_block_device() {
                    return Err(self.refused(format!(
                        "its backing file {} is no file and no block device: \
                         give its name with cow-backing=",
                        path.display()
                    )));
                }
                match (path.parent(), path.file_name()) {
                    (Some(parent), Some(name)) if is_same_file(parent, self.directory()) => {
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
            return Err(self.refused(format!(
                "the name of its backing file has {} bytes, and must have 1 to {MAX_BACKING_NAME}",
                name.len()
            )));
        }
        Ok(name)
    }

    /// Takes note that the base has `size` bytes; makes the image if there is none.
    pub fn prepare(&self, size: u64) -> Result<()> {
        drop(self.prepared(self.export(), size)?);
        Ok(())
    }

    fn prepared<'a>(
        &'a self,
        export: MutexGuard<'a, Option<CString>>,
        size: u64,
    ) -> Result<MutexGuard<'a, Option<CString>>> {
        if let Some(Backing::File(path)) = &self.backing {
            self.expect_size(path, size)?;
        }
        let overlay = match self.overlay.get() {
            Some(overlay) => overlay.size(),
            None => {
                self.set(self.make(size)?);
                size
            }
        };
        self.expect_made_for(size, overlay)?;
        Ok(export)
    }

    fn expect_made_for(&self, size: u64, overlay: u64) -> Result<()> {
        if overlay == size {
            return Ok(());
        }
        Err(self.refused(format!(
            "it was made for a base of {overlay} bytes, but this one has {size}"
        )))
    }

    fn size_of(&self, path: &Path) -> Result<u64> {
        // (A block device has its size at its end.)
        File::open(path)
            .and_then(|mut file| file.seek(SeekFrom::End(0)))
            .map_err(|e| self.failed(e, &format!("asking the size of {}", path.display())))
    }

    /// What the clients see must be what QEMU will find under the recorded name.
    fn expect_size(&self, path: &Path, size: u64) -> Result<()> {
        let found = self.size_of(path)?;
        if found == size {
            return Ok(());
        }
        Err(self.refused(format!(
            "the export has {size} bytes, but its backing file {} has {found}: \
             give the name of what is exported with cow-backing=",
            path.display()
        )))
    }

    /// Makes the image under another name, and gives it its own when all of it is
    /// on the disk: a crash leaves either none or a whole one.
    fn make(&self, size: u64) -> Result<Overlay<Files>> {
        let directory = self.try_directory()?;
        let block_size = self.block_size_in(&directory);
        let Some(backing) = &self.backing else {
            return Err(self.refused("the name of its backing file is not known"));
        };
        let header = Header {
            layout: Layout::new(size, block_size)?,
            backing: self.recorded_name(backing)?,
            mtime: match backing {
                Backing::File(path) => mtime_of(path),
                Backing::Name(_) => None,
            },
        };
        self.expect_allowed(header.layout)?;
        let failed = |e| self.failed(e, "making it");
        let named = tempfile::Builder::new()
            .prefix(".cow-overlay-")
            .tempfile_in(self.directory())
            .map_err(failed)?;
        let file = named.as_file().try_clone().map_err(failed)?;
        // The umask may have taken some of it away.
        file.set_permissions(Permissions::from_mode(0o600))
            .map_err(failed)?;
        self.lock(&file)?;
        let image = Image::create(file, &self.path, &header)?;
        named.as_file().sync_all().map_err(failed)?;
        named
            .persist_noclobber(&self.path)
            .map_err(|e| failed(e.error))?;
        File::open(self.directory())
            .and_then(|directory| directory.sync_all())
            .map_err(|e| self.failed(e, "syncing its directory"))?;
        log::debug!(
            "cow-overlay={}: made for a disk of {size} bytes in blocks of {block_size}",
            self.path.display()
        );
        let store = Files::Kept(KeptStore::new(image, directory.can_zero_range()));
        Ok(Overlay::new(size, block_size, store))
    }

    /// The overlay for a connection to `export`, whose base has `size` bytes. EINVAL
    /// for any other export than the first, or another size.
    pub fn connect(&self, export: &CStr, size: u64) -> Result<Arc<Overlay<Files>>> {
        let mut first = self.export();
        if let Some(first) = first.as_deref().filter(|first| *first != export) {
            return Err(self.refused(format!(
                "it keeps what is written to export {first:?}, and can't keep export {export:?} too"
            )));
        }
        first = self.prepared(first, size)?;
        first.get_or_insert_with(|| export.to_owned());
        let overlay = self.overlay.get().expect("set by `prepared`");
        Ok(Arc::clone(overlay))
    }

    fn export(&self) -> MutexGuard<'_, Option<CString>> {
        self.export.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last flush, when all clients are gone.
    pub fn finish(&self) -> Result<()> {
        let Some(overlay) = self.overlay.get() else {
            return Ok(());
        };
        overlay.flush().map_err(|e| {
            Error::new(
                e.errno(),
                format!(
                    "{} is incomplete, it lacks what was written since the last flush: {e}",
                    self.path.display()
                ),
            )
        })
    }
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
