//! What it ran on: enough to judge the figures by, and no name of anything.

use std::fs;

use super::command::{self, LIMIT, command};

/// (what, value)
pub fn about() -> Vec<(&'static str, String)> {
    vec![
        ("date", first_line("date", &["-u", "+%Y-%m-%d"])),
        ("processor", processor()),
        ("memory", memory()),
        ("kernel", kernel()),
        (
            "file system of /var/tmp",
            first_line("stat", &["-f", "-c", "%T", "/var/tmp"]),
        ),
        ("nbdkit", first_line("nbdkit", &["--version"])),
        ("qemu", first_line("qemu-nbd", &["--version"])),
        ("fio", first_line("fio", &["--version"])),
        ("rustc", first_line("rustc", &["--version"])),
    ]
}

fn first_line(program: &str, arguments: &[&str]) -> String {
    let output = command::run(command(program).args(arguments), LIMIT);
    let line = output
        .ok()
        .and_then(|(text, _)| Some(text.lines().next()?.trim().to_string()));
    line.unwrap_or_else(|| "unknown".into())
}

fn kernel() -> String {
    let read = fs::read_to_string("/proc/sys/kernel/osrelease");
    read.map_or("unknown".into(), |text| text.trim().to_string())
}

fn field(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

fn processor() -> String {
    let model = field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".into());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{model}, {cores} cores")
}

fn memory() -> String {
    in_memory("MemTotal").map_or("unknown".into(), |bytes| {
        format!("{:.1} GiB", bytes as f64 / (1 << 30) as f64)
    })
}

/// What can be had without swapping, in bytes, where the kernel says so.
pub fn available_memory() -> Option<u64> {
    in_memory("MemAvailable")
}

/// A field of /proc/meminfo, in bytes.
fn in_memory(name: &str) -> Option<u64> {
    let value = field("/proc/meminfo", name)?;
    let kilobytes: u64 = value.strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kilobytes << 10)
}
