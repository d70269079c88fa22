//! What nbdkit's callbacks mean, in safe Rust.
//!
//! The life of a filter: [`Filter::new`] when all parameters are known and
//! before nbdkit goes into the background; [`Filter::connect`] when a client has
//! chosen an export; then that [`Connection`]'s requests, in parallel, until it is
//! dropped; [`Filter::finish`] when all clients are gone.

pub mod config;
mod connection;
mod exports;
pub mod probe;
mod stats;

use std::ffi::CStr;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nix::unistd::{Gid, Uid, getegid, geteuid, getgroups};

use crate::base::Base;
use crate::error::{Error, Result};
use crate::error_log;
use crate::overlay::{Budget, Reclaim};
use crate::sync::{Mutex, locked};
use crate::temporary::Directory;
use config::Config;
pub use connection::{Advice, Connection};
use exports::Exports;
use stats::Stats;

/// What all connections share.
pub struct Filter {
    config: Config,
    exports: Exports,
    reclaim: Arc<Reclaim>,
    /// Those that give space back, and that count failures in the log.
    threads: Mutex<Vec<JoinHandle<()>>>,
    stats: Option<Stats>,
    user: User,
}

/// Who the process is to a file system.
type User = (Uid, Gid, Vec<Gid>);

fn user() -> User {
    // There are always groups to be told of: it does not fail.
    (geteuid(), getegid(), getgroups().unwrap_or_default())
}

impl Filter {
    /// Fails if the directory of the overlay, or the image that is to be one, or the file
    /// of the statistics, is not fit for it.
    pub fn new(config: Config) -> Result<Self> {
        log::debug!("{config:?}");
        if config.stats.is_some() && config.stats == config.overlay {
            return Err(Error::new(
                libc::EINVAL,
                "cow-stats and cow-overlay must be two files",
            ));
        }
        let budget = config.limit.map(|limit| Arc::new(Budget::new(limit)));
        let stats = match &config.stats {
            Some(path) => Some(Stats::new(path, config.scope, budget.clone())?),
            None => None,
        };
        let reclaim = Arc::default();
        Ok(Filter {
            exports: Exports::new(&config, &reclaim, budget)?,
            reclaim,
            threads: Mutex::default(),
            stats,
            config,
            user: user(),
        })
    }

    /// Starts what runs beside the requests. To be called when nbdkit has forked, which
    /// no thread survives.
    pub fn start(&'static self) {
        let reclaim = Arc::clone(&self.reclaim);
        let lost = "there is no thread to give space back, so trim and zero requests take longer";
        self.spawn("cow-reclaim", lost, move || reclaim.run());
        let lost = "there is no thread to count failures in the log, so their number may come late";
        self.spawn("cow-log", lost, error_log::run);
        if let Some(stats) = &self.stats {
            stats.start(&self.exports);
        }
    }

    /// `lost` is what to say if it can't be had.
    fn spawn(&self, name: &str, lost: &str, run: impl FnOnce() + Send + 'static) {
        match thread::Builder::new().name(name.to_string()).spawn(run) {
            Ok(handle) => locked(&self.threads).push(handle),
            Err(e) => log::warn!("{lost}: {e}"),
        }
    }

    /// Looks at the directory again if nbdkit has become another user (`-u`), or one of
    /// other groups (`-g`), since [`Filter::new`]. One overlay file is there already and
    /// will do for most, so that this user can make no others is only worth a warning.
    pub fn recheck(&self) {
        let Exports::Temporary(temporary) = &self.exports else {
            return;
        };
        if user() == self.user {
            return;
        }
        if let Err(e) = Directory::open(temporary.directory()) {
            log::warn!("only one overlay file can be had: as the user that nbdkit is now, {e}");
        }
    }

    /// A connection to `export`, over `base`. EINVAL if its overlay was made for another
    /// size or, where it is kept, for another disk.
    pub fn connect(&self, export: &CStr, base: &impl Base) -> Result<Connection<'_>> {
        let size = base.size();
        // The line of nbdkit's own cow filter, letter by letter: programs look for it.
        log::debug!(target: "cow", "underlying file size: {size}");
        let overlay = self.exports.join(export, base)?;
        Ok(Connection::new(self, overlay))
    }

    /// Ends a connection, and tells what it has come to.
    pub fn disconnect(&self, connection: Connection<'_>) {
        connection.log_figures();
        drop(connection);
        if let Some(stats) = &self.stats {
            stats.disconnected(&self.exports);
        }
    }

    /// Ends what runs beside the requests, and makes safe what is to be kept, when the
    /// last client is gone.
    pub fn finish(&self) -> Result<()> {
        self.reclaim.stop();
        error_log::stop();
        for thread in locked(&self.threads).drain(..) {
            // nbdkit unloads the library after this. A panic was logged when it happened.
            let _ = thread.join();
        }
        let finished = match &self.exports {
            Exports::Temporary(_) => Ok(()),
            Exports::Kept(kept, _) => kept.finish(),
        };
        error_log::tell_rest();
        if let Some(stats) = &self.stats {
            stats.finish(&self.exports);
        }
        finished
    }
}
