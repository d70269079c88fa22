//! The two filters of the same name, as the files that nbdkit is to load. By its
//! name alone nbdkit would load whichever is installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::command::{self, LIMIT, command};

/// A name that is in ours, whatever the compiler does, and not in the C filter: the
/// one that its messages are logged under.
const MARK: &[u8] = b"nbdkit_cow_filter";

/// The library under test: the one that cargo built for this executable.
pub fn ours() -> &'static str {
    static FOUND: OnceLock<String> = OnceLock::new();
    FOUND.get_or_init(|| {
        let path = match std::env::var_os("LIBRARY").filter(|path| !path.is_empty()) {
            Some(path) => PathBuf::from(path),
            None => std::env::current_exe()
                .expect("the path of this executable")
                .with_file_name("libnbdkit_cow_filter.so"),
        };
        assert!(path.is_file(), "there is no {}", path.display());
        path.into_os_string().into_string().expect("a UTF-8 path")
    })
}

/// The C filter, also where `make install` has set it aside for ours.
pub fn of_nbdkit() -> Result<&'static str, String> {
    static FOUND: OnceLock<Result<String, String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let (config, _) = command::run(command("nbdkit").arg("--dump-config"), LIMIT)?;
        let directory = config
            .lines()
            .find_map(|line| line.strip_prefix("filterdir="));
        c_filter_in(Path::new(
            directory.ok_or("nbdkit does not say where filters are")?,
        ))
    });
    found.as_deref().map_err(Clone::clone)
}

fn c_filter_in(directory: &Path) -> Result<String, String> {
    let names = ["nbdkit-cow-filter.so.distrib", "nbdkit-cow-filter.so"];
    let path = names
        .iter()
        .map(|name| directory.join(name))
        .find(|path| path.exists())
        .ok_or("the C filter is not installed")?;
    let bytes = fs::read(&path).map_err(|error| format!("the C filter can't be read: {error}"))?;
    if bytes.windows(MARK.len()).any(|window| window == MARK) {
        return Err("the C filter is not installed: this one is in its place".into());
    }
    path.into_os_string()
        .into_string()
        .map_err(|_| "the C filter's path is not UTF-8".into())
}
