//! What `nbdkit -v` shows of the filter, and how to see more or less of it.

use std::fs;

use serde_json::{Value, json};

use crate::harness::command::{LIMIT, eventually};
use crate::harness::mount::Mount;
use crate::harness::{Base, Server, Setup, noise, scratch};

/// The lines that the filter's own code has logged while a client wrote and read.
fn logged(options: &[&str], cow_log: Option<&str>) -> Vec<String> {
    let base = Base::new(&noise(1, 100_000));
    let mut setup = Setup::new();
    for option in options {
        setup = setup.option(option);
    }
    if let Some(filter) = cow_log {
        setup = setup.env("COW_LOG", filter);
    }
    let server = setup.start(&["file", base.path()]);
    server.nbdsh("h.pwrite(b'x' * 512, 54_321); h.pread(512, 54_321); h.trim(8192, 4096)");
    server
        .stderr()
        .lines()
        .filter(|line| line.contains(": nbdkit_cow_filter"))
        .map(String::from)
        .collect()
}

/// A line about one request tells where on the disk it was. As a number of its own: an
/// inode's may have these digits in it.
fn requests(lines: &[String]) -> usize {
    let numbers = |line: &String| {
        let mut numbers = line.split(|c: char| !c.is_ascii_digit());
        numbers.any(|number| number == "54321")
    };
    lines.iter().filter(|line| numbers(line)).count()
}

#[test]
fn without_v_nothing_is_logged() {
    for cow_log in [None, Some("trace")] {
        assert_eq!(logged(&[], cow_log), [""; 0]);
        assert_eq!(logged(&["-D", "cow.verbose=1"], cow_log), [""; 0]);
    }
}

#[test]
fn with_v_the_filter_tells_what_it_does_but_not_each_request() {
    let lines = logged(&["-v"], None);
    assert!(!lines.is_empty(), "nothing from the filter");
    assert!(
        lines.iter().all(|line| line.contains("debug: ")),
        "{lines:?}"
    );
    assert_eq!(requests(&lines), 0, "{lines:?}");
}

#[test]
fn with_the_verbose_flag_each_request_is_logged() {
    let lines = logged(&["-v", "-D", "cow.verbose=1"], None);
    assert!(requests(&lines) >= 2, "the write and the read in {lines:?}");
    assert_eq!(requests(&logged(&["-v", "-D", "cow.verbose=0"], None)), 0);
}

#[test]
fn cow_log_can_silence_the_filter() {
    for options in [&["-v"][..], &["-v", "-D", "cow.verbose=1"]] {
        assert_eq!(logged(options, Some("off")), [""; 0]);
    }
}

#[test]
fn cow_log_chooses_by_module() {
    let all = logged(&["-v", "-D", "cow.verbose=1"], None);
    let some = logged(
        &["-v", "-D", "cow.verbose=1"],
        Some("off,nbdkit_cow_filter::overlay=trace"),
    );
    assert!(
        !some.is_empty() && some.len() < all.len(),
        "{some:?} of {all:?}"
    );
    for line in &some {
        assert!(line.contains("nbdkit_cow_filter::overlay"), "{line}");
    }
    let debug = logged(
        &["-v", "-D", "cow.verbose=1"],
        Some("debug,nbdkit_cow_filter::overlay=trace"),
    );
    assert!(
        debug.len() > some.len() && debug.len() < all.len(),
        "{debug:?}"
    );
}

#[test]
fn a_cow_log_that_makes_no_sense_does_not_stop_nbdkit() {
    logged(&["-v"], Some("no/such=filter,,=,loud"));
}

/// Programs that read the log of nbdkit's own filter look for this line.
#[test]
fn each_open_tells_the_size_of_the_disk_below() {
    let base = Base::new(&noise(2, 100_001));
    let sizes = |server: &Server| {
        let said = server.stderr();
        let sizes = said
            .lines()
            .filter(|line| line.starts_with("nbdkit: ") && line.contains(": debug: "))
            .filter_map(|line| line.split_once(": debug: cow: underlying file size: "));
        sizes.map(|(_, size)| size.to_string()).collect::<Vec<_>>()
    };
    let server = Setup::new().option("-v").start(&["file", base.path()]);
    assert_eq!(sizes(&server), [""; 0]);
    for opens in 1..=3 {
        server.nbdsh("h.pread(1, 0)");
        assert_eq!(sizes(&server), vec!["100001"; opens]);
    }
    server.stop();
    let server = Setup::new().start(&["file", base.path()]);
    server.nbdsh("h.pread(1, 0)");
    assert_eq!(server.stderr(), "");
}

/// What cow-stats has of the export, in one line.
#[test]
fn each_disconnect_tells_what_was_counted() {
    let base = Base::new(&noise(3, 100_001));
    let files = scratch();
    let stats = files.path().join("stats.json");
    let parameter = format!("cow-stats={}", stats.display());
    let server = Setup::new()
        .option("-v")
        .start(&["file", base.path(), &parameter]);
    for _ in 0..2 {
        server.nbdsh("h.pwrite(b'x' * 512, 54_321); h.pread(4096, 0)");
    }
    // nbdkit does not wait for ever for the end of a connection.
    let has_told = || server.stderr().matches("underlying file size").count() == 4;
    assert!(eventually(LIMIT, has_told), "{}", server.stderr());
    let said = server.stop_and_tell();
    let told: Vec<_> = said
        .lines()
        .filter_map(|line| line.split_once(": debug: cow: a client disconnects: "))
        .map(|(_, told)| told.rsplit_once("; ").expect("two parts"))
        .collect();
    let [first, second] = told[..] else {
        panic!("{} lines in {said}", told.len());
    };
    let parse = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
    assert_eq!(parse(first.0)["requests"]["write"]["count"], 1);
    for (_, end) in [first, second] {
        assert_eq!(end, "cow: underlying file size: 100001");
    }
    let document = parse(&fs::read_to_string(stats).unwrap());
    let mut second = parse(second.0);
    // It is still there when the line is written.
    assert_eq!(second["connections"], json!({"now": 1, "ever": 2}));
    second["connections"]["now"] = json!(0);
    assert_eq!(second, document["exports"][0]);
}

/// nbdkit over a disk of 64 MiB, with an overlay for which there is no space any more.
fn without_space(mount: &Mount, parameters: &[&str]) -> Server {
    let server = Setup::new()
        .tmpdir(mount.path())
        .start(&[&["pattern", "64M"], parameters].concat());
    mount.fill();
    server
}

/// How many failures the lines of the log stand for that have `message`.
fn failures(said: &str, message: &str) -> u64 {
    let number = |line: &str, before: &str, after: &str| {
        let (start, _) = line.split_once(after)?;
        let (_, number) = start.rsplit_once(before)?;
        number.parse::<u64>().ok()
    };
    said.lines()
        .filter(|line| line.contains(message))
        .map(|line| {
            let at_the_end = number(line, "warning: ", " more times: ");
            let before = number(line, "(and ", " more times since the last message)");
            at_the_end.unwrap_or_else(|| 1 + before.unwrap_or(0))
        })
        .sum()
}

#[test]
fn a_client_that_tries_again_and_again_does_not_fill_the_log() {
    let mount = Mount::tmpfs("1M");
    let server = without_space(&mount, &[]);
    server.nbdsh(
        r#"
        for place in range(5000):
            refused("ENOSPC", h.pwrite, b"1" * 4096, place * 4096)
        for place in range(100):
            refused("ENOSPC", h.zero, 4096, place * 4096, NO_HOLE)
        "#,
    );
    mount.make_room();
    let said = server.stop_and_tell();
    assert!(said.lines().count() < 30, "{said}");
    assert!(
        said.contains("(4096 bytes at offset 0): No space left on device"),
        "the first: {said}"
    );
    let space = "No space left on device";
    assert_eq!(failures(&said, space), 5100, "{said}");
    assert!(
        failures(&said, "zero failed") > 0,
        "a kind of its own: {said}"
    );
}

/// It is told while the client is still there, and one who comes again and again does not
/// get more lines.
#[test]
fn the_number_of_failures_is_told_after_some_seconds() {
    let mount = Mount::tmpfs("1M");
    let server = without_space(&mount, &[]);
    server.python(
        r#"
        for _ in range(50):
            refused("ENOSPC", connect().pwrite, b"1" * 4096, 0)
        "#,
    );
    let told = eventually(LIMIT, || {
        server.stderr().contains("49 more times: write failed")
    });
    assert!(told, "{}", server.stderr());
    mount.make_room();
    let said = server.stop_and_tell();
    assert!(said.lines().count() < 10, "{said}");
}

/// Nobody is told of them but the log, and that once.
#[test]
fn copies_of_the_base_that_can_not_be_saved_are_told_in_short() {
    let mount = Mount::tmpfs("1M");
    let server = without_space(&mount, &["cow-on-read=true", "cow-on-cache=true"]);
    server.nbdsh("for place in range(500): h.pread(4096, place * 4096); h.cache(4096, M)");
    mount.make_room();
    let said = server.stop_and_tell();
    assert!(said.lines().count() < 30, "{said}");
    for what in ["cow-on-read", "cow-on-cache"] {
        assert_eq!(failures(&said, what), 500, "{what} in {said}");
    }
}

/// Each has its reason, and there are no more of them than there are connections.
#[test]
fn each_refusal_of_a_client_is_logged() {
    let mut base = Base::new(&noise(4, 100_000));
    let server = Server::start(&["file", base.path()]);
    server.nbdsh("h.pwrite(b'1', 0)");
    base.grow_to(200_000);
    server.python(
        r#"
        for _ in range(3):
            try:
                connect()
            except nbd.Error:
                continue
            raise AssertionError("not refused")
        "#,
    );
    let said = server.stop_and_tell();
    assert_eq!(said.matches("must not be resized").count(), 3, "{said}");
}
