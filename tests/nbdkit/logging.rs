//! What `nbdkit -v` shows of the filter, and how to see more or less of it.

use crate::harness::{Base, Setup, noise};

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
    let sizes = |server: &crate::harness::Server| {
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
