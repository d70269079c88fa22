//! The overlay that one can keep: a qcow2 image in place of files without a name.
//!
//! There is one, for one export. If it exists it is opened, and found fit as far as that
//! can be known, before any client connects, so that what is wrong is told at start. If
//! not, the first client's connection makes it: only a client tells which export it is
//! for, and how large.

mod backing;
mod base_lock;
mod fingerprint;
mod image_path;
mod store;

use std::ffi::{CStr, OsStr};
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::base::Base;
use crate::block::BlockSize;
use crate::error::{Error, Result};
use crate::file_system::{FileSystem, NOT_KNOWN_SPARSE};
use crate::named_file;
use crate::overlay::{Account, Budget, Overlay, Reclaim};
use crate::qcow2::header::{Header, User};
use crate::qcow2::home;
use crate::qcow2::image::{GROUP_TABLES_LEN, Image};
use crate::qcow2::layout::Layout;
use crate::sparse;
use crate::sync::{Mutex, MutexGuard, locked};
pub use backing::{Backing, absolute};
use image_path::ImagePath;
pub use store::{KeptStore, resume};

/// How often to tell how far the moving of clusters has come.
const PROGRESS: Duration = Duration::from_secs(5);

/// An overlay that is kept in a file.
pub type KeptOverlay = Overlay<KeptStore<File>>;

/// What the parameters ask for.
pub struct Wanted {
    /// The image's path, which is absolute.
    pub path: PathBuf,
    /// `None`: that of the image, or of its file system.
    pub block_size: Option<BlockSize>,
    /// The base's name, if one was given or can be told from the parameters.
    pub backing: Option<Backing>,
    pub reclaim: Arc<Reclaim>,
    /// With a limit.
    pub budget: Option<Arc<Budget>>,
}

/// See the module's documentation.
pub struct Kept {
    path: ImagePath,
    block_size: Option<BlockSize>,
    backing: Option<Backing>,
    reclaim: Arc<Reclaim>,
    budget: Option<Arc<Budget>>,
    /// The base, locked while this is there.
    _base_lock: Option<File>,
    /// Held while an image is made or its base is looked at, so that none is made twice.
    served: Mutex<Option<Served>>,
}

/// The image, once there is one.
struct Served {
    overlay: Arc<KeptOverlay>,
    /// As the file has it.
    header: Header,
}

impl Kept {
    /// Opens the image if there is one, else looks whether one can be made.
    pub fn start(wanted: Wanted) -> Result<Self> {
        if let Some(block_size) = wanted.block_size {
            // For the message alone: the size of the disk is not known yet.
            Layout::new(0, block_size)?;
        }
        let mut kept = Kept {
            path: ImagePath::new(&wanted.path),
            block_size: wanted.block_size,
            backing: wanted.backing,
            reclaim: wanted.reclaim,
            budget: wanted.budget,
            _base_lock: None,
            served: Mutex::default(),
        };
        match kept.path.open() {
            Ok(file) => kept.served = Mutex::new(Some(kept.resume(file)?)),
            Err(e) if e.errno() == libc::ENOENT => kept.expect_makeable()?,
            Err(e) => return Err(e),
        }
        kept._base_lock = kept.lock_base()?;
        Ok(kept)
    }

    fn resume(&self, file: File) -> Result<Served> {
        let metadata = file
            .metadata()
            .map_err(|e| self.path.failed(e, "looking at"))?;
        if !metadata.is_file() {
            return self.path.refuse("it is no regular file");
        }
        self.path.lock(&file)?;
        self.path.expect_leads_to(&file)?;
        // Before anything is read that counts. (What this itself has read goes with it.)
        if !Image::has_ended_well(&file, self.path.path()) {
            self.path.drop_cached(&file)?;
        }
        let opened = match self.open_at_home(&file) {
            Err(e) if e.errno() == libc::EINVAL => {
                log::debug!("{e}");
                self.bring_home(&file)?;
                self.open_at_home(&file).map_err(|e| {
                    let path = self.path.path().display();
                    let what = format!("{path} is not as it should be after it was changed: {e}");
                    Error::new(libc::EIO, what)
                })
            }
            opened => opened.and_then(|(overlay, header)| {
                self.check(&header, header.layout.end)?;
                Ok((overlay, header))
            }),
        };
        let (overlay, header) = opened?;
        log::debug!(
            "cow-overlay={}: goes on with a disk of {} bytes in blocks of {}",
            self.path.path().display(),
            header.layout.disk_size(),
            header.layout.block_size()
        );
        if header
            .in_use
            .is_some_and(|in_use| in_use.by == Some(User::Run))
        {
            log::warn!(
                "the last run of nbdkit with cow-overlay={} did not end well: \
                 what was written in it and not flushed may be lost",
                self.path.path().display()
            );
        }
        Ok(Served {
            overlay: overlay.join(&self.reclaim),
            header,
        })
    }

    /// EINVAL if not all of the image is where this filter puts it.
    fn open_at_home(&self, file: &File) -> Result<(KeptOverlay, Header)> {
        let file = file.try_clone();
        let file = file.map_err(|e| self.path.failed(e, "opening"))?;
        let (image, header) = Image::open(file, self.path.path())?;
        let account = self.budget.as_ref().map(Account::new);
        let image = image.limited(account.as_ref());
        Ok((resume(image, self.path.can_zero_range())?, header))
    }

    /// Whether the image is the one that is wanted. `len`: how long its file is going to be.
    fn check(&self, header: &Header, len: u64) -> Result<()> {
        let layout = header.layout;
        if self
            .block_size
            .is_some_and(|size| size != layout.block_size())
        {
            return self.path.refuse(format!(
                "it has blocks of {}: leave cow-block-size out, or give that",
                layout.block_size()
            ));
        }
        self.check_backing(header)?;
        self.path.expect_allowed(len)
    }

    /// Another program has written to the image, or it is damaged.
    fn bring_home(&self, file: &File) -> Result<()> {
        let path = self.path.path();
        let survey = home::survey(file, path)?;
        self.check(survey.header(), survey.longest())?;
        let (path, of) = (path.display(), survey.to_move());
        log::warn!(
            "cow-overlay={path}: another program has written to it: \
             putting its tables in order, and clusters to their places ({of} of them)"
        );
        let start = Instant::now();
        let mut told = start;
        let moved = survey.bring_home(&mut |progress| {
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                let home::Progress {
                    clusters, bytes, ..
                } = progress;
                log::warn!(
                    "cow-overlay={path}: {clusters} of {of} clusters moved, {bytes} bytes copied"
                );
            }
        })?;
        log::warn!(
            "cow-overlay={path}: {} of {of} clusters moved, {} bytes copied, in {:.1} s",
            moved.clusters,
            moved.bytes,
            start.elapsed().as_secs_f64()
        );
        Ok(())
    }

    /// Looks, before nbdkit goes into the background, whether the image will find its
    /// place, as far as that can be told.
    fn expect_makeable(&self) -> Result<()> {
        if self.path.path().is_symlink() {
            return Err(self
                .path
                .refused("it is a symbolic link to a file that does not exist"));
        }
        let Some(backing) = &self.backing else {
            return Err(self
                .path
                .refused("the name of its backing file is not known: give it with cow-backing="));
        };
        self.recorded_name(backing)?;
        let file_system = self.path.try_file_system()?;
        if let Some(budget) = &self.budget {
            let block_size = self.block_size_on(&file_system);
            budget.expect_room_for_a_block(block_size, GROUP_TABLES_LEN)?;
        }
        self.path.open_directory()?;
        if !file_system.known_sparse {
            log::warn!(
                "cow-overlay={}: {NOT_KNOWN_SPARSE}",
                self.path.path().display()
            );
        }
        if let Backing::File(path) = backing {
            // The export has at least its size.
            let (_, size) = self.open_backing(path)?;
            let layout = Layout::new(size, self.block_size_on(&file_system))?;
            self.path.expect_allowed(layout.end)?;
            tempfile::tempfile_in(self.path.directory())
                .and_then(|file| file.set_len(layout.end))
                .map_err(|e| {
                    self.path
                        .failed(e, &format!("making a file of {} bytes for", layout.end))
                })?;
        }
        Ok(())
    }

    fn block_size_on(&self, file_system: &FileSystem) -> BlockSize {
        self.block_size
            .unwrap_or_else(|| file_system.default_block_size())
    }

    /// EINVAL if the image can't be that of a base of `size` bytes.
    pub fn expect_fits(&self, size: u64) -> Result<()> {
        if let Some(Backing::File(path)) = &self.backing {
            self.expect_size(path, size)?;
        }
        let Some(Served { overlay, .. }) = &*self.held() else {
            return Ok(());
        };
        let has_content = !overlay.is_untouched() || overlay.store().image().records_export();
        self.expect_made_for(size, overlay.size(), has_content)
    }

    fn held(&self) -> MutexGuard<'_, Option<Served>> {
        locked(&self.served)
    }

    /// The overlay, if the image was opened or made.
    pub fn current(&self) -> Option<Arc<KeptOverlay>> {
        let served = self.held();
        served.as_ref().map(|served| Arc::clone(&served.overlay))
    }

    /// The overlay for `export`, over `base`, for whose size the image is fit. `other` is
    /// another export that uses the image or has written to it. EINVAL if there is one, or
    /// if the image was made for another export or another disk.
    pub fn overlay(
        &self,
        export: &CStr,
        base: &impl Base,
        other: Option<&CStr>,
    ) -> Result<Arc<KeptOverlay>> {
        let mut held = self.held();
        let was_there = held.is_some();
        let served = match &mut *held {
            Some(served) => served,
            none => none.insert(self.make(base)?),
        };
        let overlay = &served.overlay;
        if let Some(other) = other {
            return self.path.refuse(format!(
                "it keeps what is written to export {other:?}, and can't keep export {export:?} too"
            ));
        }
        if !overlay.store().image().claim(export.to_bytes()) {
            return self.path.refuse(format!(
                "it keeps what was written to another export than {export:?}"
            ));
        }
        if was_there {
            self.recognise(served, base)?;
        }
        Ok(Arc::clone(&served.overlay))
    }

    /// Makes the image under another name, and gives it its own when all of it is
    /// on the disk: a crash leaves either none or a whole one.
    fn make(&self, base: &impl Base) -> Result<Served> {
        let size = base.size();
        let file_system = self.path.try_file_system()?;
        let block_size = self.block_size_on(&file_system);
        let Some(backing) = &self.backing else {
            return self
                .path
                .refuse("the name of its backing file is not known");
        };
        let layout = Layout::new(size, block_size)?;
        let mut header = Header::new(layout, self.recorded_name(backing)?, self.base_mtime());
        header.samples = self.fingerprint_of(base)?;
        self.path.expect_allowed(header.layout.end)?;
        let directory = self.path.open_directory()?;
        let failed = |e| self.path.failed(e, "making");
        let prefix = OsStr::new(".cow-overlay-");
        let named = named_file::in_directory(self.path.directory(), prefix).map_err(failed)?;
        let file = named.as_file().try_clone().map_err(failed)?;
        // The umask may have taken some of it away.
        file.set_permissions(Permissions::from_mode(0o600))
            .map_err(failed)?;
        // Else btrfs needs new space for every change of a table.
        sparse::write_in_place(&file);
        self.path.lock(&file)?;
        let image = Image::create(file, self.path.path(), &header)?;
        named.as_file().sync_all().map_err(failed)?;
        named
            .persist_noclobber(self.path.path())
            .map_err(|e| match e.error.kind() {
                io::ErrorKind::AlreadyExists => self.path.was_made_meanwhile(),
                _ => failed(e.error),
            })?;
        let is_there = directory
            .sync_all()
            .map_err(|e| self.path.failed(e, "syncing the directory of"))
            .and_then(|()| self.path.leads_to(image.file()));
        // Else the next client would find an image that it takes for another program's.
        let is_there = is_there.inspect_err(|_| self.path.remove(image.file()))?;
        log::debug!(
            "cow-overlay={}: made for a disk of {size} bytes in blocks of {block_size}",
            self.path.path().display()
        );
        if !is_there {
            // Some FUSE file systems (sshfs) take what has got a second name for another
            // file. The one that is open has then lost its only name, and a lock on it
            // would keep nobody out.
            drop(image);
            let served = self.resume(self.path.open()?)?;
            // (Or it is another one, put there by another program.)
            self.expect_made_for(size, served.overlay.size(), true)?;
            return Ok(served);
        }
        let account = self.budget.as_ref().map(Account::new);
        let image = image.limited(account.as_ref());
        let store = KeptStore::new(image, file_system.can_zero_range);
        let overlay = Overlay::new(size, block_size, store).limited(account);
        Ok(Served {
            overlay: overlay.join(&self.reclaim),
            header,
        })
    }

    /// Gives back what is left to be given back, and flushes, when all clients are gone.
    pub fn finish(&self) -> Result<()> {
        let mut held = self.held();
        let Some(served) = &mut *held else {
            return Ok(());
        };
        let overlay = Arc::clone(&served.overlay);
        let image = overlay.store().image();
        let incomplete = |e: Error| {
            Error::new(
                e.errno(),
                format!(
                    "{} is incomplete, it lacks what was written since the last flush: {e}",
                    self.path.path().display()
                ),
            )
        };
        image.expect_named().map_err(incomplete)?;
        // First what clients have written: it can take minutes to give back space, and
        // whoever stops nbdkit may not wait so long.
        let flushed = overlay.flush();
        overlay.give_back();
        let flushed = flushed.and_then(|()| Self::forget_written(served));
        flushed.and_then(|()| overlay.flush()).map_err(incomplete)?;
        image.end_run()
    }
}
