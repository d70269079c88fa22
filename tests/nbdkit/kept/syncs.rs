//! A sync of the image that fails: what the system could not write it may have thrown
//! away, and would not say so again.

use super::{Disk, assert_says, check_after_a_crash, compare, text};
use crate::harness::{Server, Setup};

/// An nbdkit on an image that exists, in which a thread's *n*th call of this kind fails.
/// Each connection has one thread.
fn failing(disk: &Disk, call: &str, when: &str) -> Server {
    let inject = format!("inject={call}:error=EIO:when={when}");
    let log = disk.base.directory().join("strace");
    let setup =
        Setup::new()
            .option("-t1")
            .under(&["strace", "-D", "-f", "-o", text(&log), "-e", &inject]);
    disk.serve_with(&setup, &[])
}

fn disk() -> Disk {
    let disk = Disk::new((20 << 20) + 512, 4096);
    let server = disk.serve();
    disk.client(&server, 1, "disk.write(10 * M, noise(K, 1)); disk.save()");
    server.stop();
    disk.assert_sound();
    disk
}

/// Whichever of the syncs of a flush it is, and however well the later ones would go.
/// L2 entries in two pieces take two calls of fdatasync, those in one piece another
/// call instead of the second. (The first of those writes the mark of the run.)
#[test]
fn after_a_failed_sync_no_flush_succeeds_and_reads_go_on() {
    for (call, when, good_flushes, places) in [
        ("fdatasync", "1", "0", "M"),
        ("fdatasync", "2", "0", "M, 19 * M"),
        ("pwritev2", "2", "0", "M"),
        ("fdatasync", "3", "1", "M"),
        ("fdatasync", "4", "1", "M, 19 * M"),
    ] {
        let disk = disk();
        let server = failing(&disk, call, when);
        let code = r#"
            for number in range(GOOD):
                disk.write(0, noise(5000, number))
                disk.write(18 * M, noise(5000, number))
                h.flush()
            for place in [PLACES]:
                disk.write(place, noise(100_000, place))
            refused("EIO", h.flush)
            for _ in range(3):
                refused("EIO", h.flush)
                refused("EIO", connect().flush)
                refused("EIO", h.pwrite, b"x" * 4096, 0, FUA)
                os.pwrite(disk.file, b"x" * 4096, 0)
                disk.check()
            disk.write(3 * M - 5000, noise(5000, 3))
            disk.check()
        "#
        .replace("GOOD", good_flushes)
        .replace("PLACES", places);
        disk.client(&server, 2, &code);
        assert_says(
            &server.stop_and_tell(),
            &[
                "syncing cow-overlay=",
                "I/O error",
                "an earlier flush failed",
                "incomplete",
            ],
        );
        check_after_a_crash(&disk.overlay());
    }
}

#[test]
fn a_last_flush_that_fails_is_told() {
    let disk = disk();
    let server = failing(&disk, "fdatasync", "1");
    // Not in place: what the disk held before, it holds still.
    disk.client(&server, 2, "h.pwrite(noise(5000, 5), M)");
    let said = server.stop_and_tell();
    let overlay = disk.overlay();
    let words = [
        text(&overlay),
        "incomplete",
        "since the last flush",
        "I/O error",
    ];
    assert_says(&said, &words);
    check_after_a_crash(&overlay);
    compare(&overlay, &disk.model());

    let server = disk.serve();
    disk.client(&server, 3, "disk.check().run(20).check().save()");
    server.stop();
    disk.assert_sound();
}
