//! What reached the plugin, as nbdkit's log filter below ours wrote it down.

use std::path::Path;

#[derive(Debug, PartialEq, Eq, Clone, PartialOrd, Ord)]
pub struct Request {
    pub kind: String,
    pub offset: u64,
    pub count: u64,
}

/// The requests of one kind ("Read", "Cache") in the order of their arrival.
pub fn requests(log: &Path, kind: &str) -> Vec<Request> {
    let text = std::fs::read_to_string(log).expect("the log filter's file");
    text.lines()
        .filter_map(parse)
        .filter(|r| r.kind == kind)
        .collect()
}

/// How many reads have been handed to the plugin and are not answered.
pub fn in_flight(log: &Path) -> usize {
    let text = std::fs::read_to_string(log).expect("the log filter's file");
    let begun = text.matches(" Read id=").count();
    begun - text.matches(" ...Read id=").count()
}

/// How many reads the plugin has failed.
pub fn failed(log: &Path) -> usize {
    let text = std::fs::read_to_string(log).expect("the log filter's file");
    let failed = |line: &&str| line.contains(" ...Read id=") && line.contains(" return=-1");
    text.lines().filter(failed).count()
}

/// `DATE TIME connection=1 Read id=1 offset=0x0 count=0x200 ...`; the line that
/// tells the result has no offset, and is passed over.
fn parse(line: &str) -> Option<Request> {
    let mut words = line
        .split(' ')
        .skip_while(|word| !word.starts_with("connection="));
    let kind = words.nth(1)?.to_string();
    let mut number = |key: &str| {
        let word = words.find(|word| word.starts_with(key))?;
        u64::from_str_radix(word[key.len()..].strip_prefix("0x")?, 16).ok()
    };
    Some(Request {
        kind,
        offset: number("offset=")?,
        count: number("count=")?,
    })
}
