//! A disk that fails: what could not be written is in the page cache, as if it were on the
//! disk, until something drops it. It must not be shown by the next nbdkit.

use std::fs;
use std::path::Path;

use super::small::{SIZE, base, kept_in, serve, write_through};
use super::{assert_says, check_after_a_crash, text};
use crate::harness::mount::FailingDisk;
use crate::harness::{Base, Server, Setup, noise};

const WARNING: &str = "did not end well";

/// Serves an image on a disk that fails after a good flush, until all is lost that was
/// written after that.
fn lose(disk: &FailingDisk, base: &Base, end: fn(Server)) {
    let overlay = disk.path().join("diff.qcow2");
    let server = serve(base.path(), text(&overlay));
    server.nbdsh("h.pwrite(b'safe' * 16 * K, 100_000); h.trim(8192, 200 * K); h.flush()");
    disk.fail(true);
    server.nbdsh(
        r#"
        # In place, new, and over what was trimmed.
        for place in [100_000, 4096, 200 * K]:
            h.pwrite(b"lost" * K, place)
        refused("EIO", h.flush)
        refused("EIO", h.flush)
        "#,
    );
    end(server);
    disk.fail(false);
}

fn expected() -> Vec<u8> {
    let mut bytes = noise(1, SIZE);
    bytes[100_000..165_536].copy_from_slice(&b"safe".repeat(16 << 10));
    bytes[204_800..212_992].fill(0);
    bytes
}

/// What a client reads, and what nbdkit says.
fn read(base: &Base, overlay: &Path, then: &str) -> (Vec<u8>, String) {
    let server = serve(base.path(), text(overlay));
    let read = base.directory().join("read");
    let code = format!("open(ARGS[0], 'wb').write(read(h)); {then}");
    server.nbdsh_with(&[text(&read)], &code);
    (fs::read(read).unwrap(), server.stop_and_tell())
}

fn shows_what_the_disk_has(end: fn(Server)) {
    let mut disk = FailingDisk::new();
    let base = base();
    lose(&disk, &base, end);
    let overlay = disk.path().join("diff.qcow2");
    let (bytes, said) = read(&base, &overlay, "h.flush()");
    assert!(bytes == expected(), "something that was lost is shown");
    assert_says(&said, &["warning", WARNING, text(&overlay)]);
    assert_eq!(said.lines().count(), 1, "{said}");
    check_after_a_crash(&overlay);

    disk.forget();
    let overlay = disk.path().join("diff.qcow2");
    let (bytes, said) = read(&base, &overlay, "h.pwrite(b'more' * K, 0); h.flush()");
    assert!(bytes == expected(), "the disk has something else");
    assert_eq!(said, "", "that was a clean end");
    let (bytes, said) = read(&base, &overlay, "");
    assert!(bytes[..4096] == b"more".repeat(1 << 10));
    assert_eq!(said, "");
}

#[test]
fn what_was_lost_is_not_shown_after_an_end() {
    shows_what_the_disk_has(|server| {
        assert_says(&server.stop_and_tell(), &["incomplete"]);
    });
}

#[test]
fn what_was_lost_is_not_shown_after_a_crash() {
    shows_what_the_disk_has(Server::kill);
}

/// Makes the header that of an image of version 1.0, which has no mark.
fn to_version_1(overlay: &Path) {
    let mut bytes = fs::read(overlay).unwrap();
    let number = |bytes: &[u8], at: usize| {
        u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    };
    let (name_at, name_len) = (number(&bytes, 12), number(&bytes, 16));
    let name = bytes[name_at..name_at + name_len].to_vec();
    bytes[132..136].copy_from_slice(&32u32.to_be_bytes());
    // Our extension is followed by the end of all of them, and the name.
    bytes[168..name_at + name_len].fill(0);
    bytes[176..176 + name_len].copy_from_slice(&name);
    bytes[12..16].copy_from_slice(&176u32.to_be_bytes());
    fs::write(overlay, bytes).unwrap();
}

/// It does not say how its last run ended.
#[test]
fn an_image_of_version_1_is_always_read_from_the_disk() {
    let mut disk = FailingDisk::new();
    let base = base();
    let overlay = disk.path().join("diff.qcow2");
    serve(base.path(), text(&overlay)).nbdsh("h.flush()");
    to_version_1(&overlay);
    disk.forget();
    lose(&disk, &base, Server::kill);
    let overlay = disk.path().join("diff.qcow2");
    let (bytes, said) = read(&base, &overlay, "h.flush()");
    assert!(bytes == expected(), "something that was lost is shown");
    assert_eq!(said, "");
}

/// Nothing has changed then, on the disk or in what is shown.
#[test]
fn where_the_run_can_not_be_marked_nothing_is_written() {
    let disk = FailingDisk::new();
    let base = base();
    let overlay = disk.path().join("diff.qcow2");
    serve(base.path(), text(&overlay)).nbdsh("h.flush()");
    let server = serve(base.path(), text(&overlay));
    disk.fail(true);
    server.nbdsh(
        r#"
        before = read(h)
        refused("EIO", h.pwrite, b"x" * 4096, 0)
        refused("EIO", h.pwrite, b"x" * 10, 9)
        refused("EIO", h.zero, 8192, 8192)
        same(read(h), before)
        "#,
    );
    disk.fail(false);
    server.nbdsh("h.pwrite(b'y' * 4096, 0); h.flush()");
    assert_says(
        &server.stop_and_tell(),
        &["writing the mark of a run", text(&overlay)],
    );
    let (bytes, said) = read(&base, &overlay, "");
    assert!(bytes[..4096] == [b'y'; 4096] && bytes[4096..] == noise(1, SIZE)[4096..]);
    assert_eq!(said, "");
}

/// A run that only reads leaves no mark, and none that ended well.
#[test]
fn only_a_run_that_wrote_and_was_cut_short_is_told_of() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    let run = |code: &str, end: fn(Server) -> String| {
        let server = serve(base.path(), text(&overlay));
        server.nbdsh(code);
        end(server)
    };
    let kill = |server: Server| {
        let said = server.stderr();
        server.kill();
        said
    };
    let stop = Server::stop_and_tell;
    assert_eq!(run("h.pread(512, 0)", kill), "");
    assert_eq!(run("h.pread(512, 0); h.flush()", kill), "");
    assert_eq!(run("h.pwrite(b'x' * 512, 0)", stop), "");
    assert_eq!(run("h.pread(512, 0)", kill), "");
    assert_eq!(run("h.pwrite(b'x' * 512, 0); h.flush()", kill), "");
    // Until a run has ended well.
    for end in [kill, stop] {
        assert_says(&run("h.pread(512, 0)", end), &["warning", WARNING]);
    }
    assert_eq!(run("h.pread(512, 0)", stop), "");
}

#[test]
fn an_image_that_can_not_be_synced_is_refused_and_left_as_it_is() {
    let base = base();
    let overlay = base.directory().join("diff.qcow2");
    let server = serve(base.path(), text(&overlay));
    write_through(&server.uri());
    server.kill();
    let before = super::Seal::of(&overlay);
    let log = base.directory().join("strace");
    let kept = kept_in(base.directory(), "diff.qcow2");
    let plugin = ["file", base.path(), &kept];
    let inject = "inject=fsync:error=EIO";
    let strace = ["strace", "-D", "-f", "-o", text(&log), "-e", inject];
    let error = Setup::new().under(&strace).error(&plugin);
    let words = [text(&overlay), "can't be made safe", "I/O error"];
    assert_says(&error, &words);
    assert_eq!(super::Seal::of(&overlay), before);
    fs::remove_file(log).unwrap();
    let server = serve(base.path(), text(&overlay));
    write_through(&server.uri());
    assert_says(&server.stop_and_tell(), &[WARNING]);
}
