//! Python with libnbd: the client that can send any request.
//!
//! nbdsh runs whichever python3 is first on PATH, and that need not be the one
//! that has libnbd. So the tests run their code with an interpreter that was
//! seen to import it; `client.py` is to them what nbdsh's `h` is.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use super::command::{command, outcome};

const CLIENT: &str = include_str!("client.py");

/// The command that runs `first` and then the code, with `client.py` imported.
pub fn script(scratch: &Path, socket: &Path, first: &str, code: &str, args: &[&str]) -> Command {
    std::fs::write(scratch.join("client.py"), CLIENT).expect("write client.py");
    let file = tempfile::Builder::new()
        .prefix("test-")
        .suffix(".py")
        .tempfile_in(scratch)
        .expect("a file for the script");
    let (_, path) = file.keep().expect("keep the script for its traceback");
    let text = format!("from client import *\n{first}\n{}", dedent(code));
    std::fs::write(&path, text).expect("write the script");
    let mut python = command(interpreter());
    python
        .arg(&path)
        .args(args)
        .env("NBD_SOCKET", socket)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .current_dir(scratch);
    python
}

pub fn interpreter() -> &'static str {
    static FOUND: OnceLock<&str> = OnceLock::new();
    FOUND.get_or_init(|| {
        let has_libnbd = |python: &&str| {
            let import = outcome(command(python).args(["-c", "import nbd"]));
            import.status.success()
        };
        ["/usr/bin/python3", "python3"]
            .into_iter()
            .find(has_libnbd)
            .expect("no python3 that can `import nbd`: install python3-libnbd")
    })
}

/// Removes the indentation that the code has for standing in a Rust function.
fn dedent(code: &str) -> String {
    let filled = || code.lines().filter(|line| !line.trim().is_empty());
    let margin = filled()
        .map(|line| line.len() - line.trim_start().len())
        .min()
        .unwrap_or(0);
    code.lines()
        .map(|line| line.get(margin..).unwrap_or(""))
        .collect::<Vec<_>>()
        .join("\n")
        + "\n"
}
