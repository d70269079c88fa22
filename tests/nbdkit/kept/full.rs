//! The image's file system is full: in a write, in a flush, at the end, and when the
//! image is made.

use std::fs::{self, File};
use std::path::PathBuf;

use super::{assert_says, check, check_after_a_crash, compare, text};
use crate::full::FILL_UP;
use crate::harness::command::run;
use crate::harness::mount::Mount;
use crate::harness::{Base, Server, Setup, noise, scratch};

/// A base that is elsewhere, and the image alone on its file system.
struct Kept {
    base: Base,
    mount: Mount,
    block: &'static str,
    files: tempfile::TempDir,
}

impl Kept {
    fn new(base: Base, mount: Mount, block: &'static str) -> Kept {
        let files = scratch();
        Kept {
            base,
            mount,
            block,
            files,
        }
    }

    fn overlay(&self) -> PathBuf {
        self.mount.path().join("diff.qcow2")
    }

    fn serve(&self) -> Server {
        self.serve_with(&[])
    }

    fn serve_with(&self, parameters: &[&str]) -> Server {
        let overlay = format!("cow-overlay={}", text(&self.overlay()));
        let block = format!("cow-block-size={}", self.block);
        let plugin = ["file", self.base.path(), &overlay, &block];
        Setup::new().start(&[&plugin, parameters].concat())
    }

    /// A file that code which has it in `ARGS[1]` writes the expected bytes to.
    fn expected(&self) -> PathBuf {
        self.files.path().join("expected")
    }

    /// Runs `code` with the block size, that file, and the image's directory.
    fn client(&self, server: &Server, code: &str) {
        let expected = self.expected();
        let arguments = [self.block, text(&expected), text(self.mount.path())];
        server.nbdsh_with(&arguments, code);
    }

    /// A crash leaves the image sound, with the expected bytes.
    fn expect_flushed(&self, server: Server) {
        server.kill();
        check(&self.overlay());
        compare(&self.overlay(), &self.expected());
    }
}

/// After [`FILL_UP`]: fills up again, to the last page.
const FILL_UP_AGAIN: &str = r#"
    failed = 0
    for place in range(0, h.get_size() - BLOCK, BLOCK):
        if failed == 100:
            break
        write(place, BLOCK, place)
    assert failed == 100, "the file system did not fill up"
"#;

fn fills_up_and_goes_on(mount: Mount, block: &'static str) {
    let kept = Kept::new(Base::new(&noise(1, 64 << 20)), mount, block);
    let server = kept.serve();
    let code = format!(
        "{FILL_UP}{FILL_UP_AGAIN}{}",
        r#"
    # What was acknowledged has room for its tables too.
    h.flush()
    same(read(h), content)
    # A trim makes room for the tables as well.
    h.trim(32 * M, 0)
    content[:32 * M] = bytes(32 * M)
    h.flush()
    write(5000, 100_000, 1)
    h.pwrite(noise(100_000, 2), 40 * M, FUA)
    content[40 * M:40 * M + 100_000] = noise(100_000, 2)
    same(read(h), content)
    open(ARGS[1], "wb").write(content)
    "#
    );
    kept.client(&server, &code);
    server.stop();
    check(&kept.overlay());
    compare(&kept.overlay(), &kept.expected());

    let server = kept.serve();
    kept.client(&server, "same(read(h), open(ARGS[1], 'rb').read())");
    server.stop();
    check(&kept.overlay());
}

#[test]
fn a_full_tmpfs_costs_nothing_that_was_acknowledged_or_flushed() {
    fills_up_and_goes_on(Mount::tmpfs("16M"), "4096");
}

#[test]
fn a_full_tmpfs_costs_nothing_with_blocks_of_64k() {
    fills_up_and_goes_on(Mount::tmpfs("16M"), "65536");
}

#[test]
fn a_full_ext4_costs_nothing_that_was_acknowledged_or_flushed() {
    let mount = Mount::formatted("ext4");
    mount.leave_free(12 << 20);
    fills_up_and_goes_on(mount, "4096");
}

#[test]
fn a_full_btrfs_costs_nothing_that_was_acknowledged_or_flushed() {
    let mount = Mount::formatted("btrfs");
    mount.leave_free(16 << 20);
    fills_up_and_goes_on(mount, "4096");
}

/// Code that takes all the space there is in the directory `ARGS[2]`.
const FILL: &str = r#"
    filler = os.path.join(ARGS[2], "filler")
    with open(filler, "wb", buffering=0) as file:
        for chunk in [M, 4 * K]:
            try:
                while True:
                    file.write(b"x" * chunk)
            except OSError as error:
                assert error.errno == errno.ENOSPC
"#;

/// A trim, zeroes and a read that is to be saved need space for tables that was not
/// taken yet. Others need theirs to be flushed, and have it.
#[test]
fn what_finds_no_space_for_tables_keeps_no_other_from_being_flushed() {
    let base = Base::sparse(1 << 30, &[(1 << 20, &[7; 4096])]);
    let kept = Kept::new(base, Mount::tmpfs("8M"), "4096");
    let server = kept.serve_with(&["cow-on-read=true"]);
    let code = format!(
        "{}{FILL}{}",
        r#"
    AT = 900 * M
    h.pwrite(noise(M, 1), AT)
    h.flush()
    h.pwrite(noise(M, 2), AT + M)
    "#,
        r#"
    for place in [0, M, 700 * M]:
        refused("ENOSPC", h.pwrite, bytes(64 * K), place)
        refused("ENOSPC", h.zero, 64 * K, place)
        refused("ENOSPC", h.zero, 64 * K, place, nbd.CMD_FLAG_NO_HOLE)
        h.trim(64 * K, place)
        h.pread(64 * K, place)
    same(h.pread(4096, M), b"\x07" * 4096)
    h.flush()
    h.pwrite(noise(5000, 3), AT + 100, FUA)
    with open(ARGS[1], "wb") as file:
        for place, content in [
            (M, b"\x07" * 4096), (AT, noise(M, 1) + noise(M, 2)), (AT + 100, noise(5000, 3))
        ]:
            file.seek(place)
            file.write(content)
        file.truncate(h.get_size())
    "#
    );
    kept.client(&server, &code);
    kept.expect_flushed(server);

    // Zeroes everywhere make their own room.
    let server = kept.serve();
    kept.client(
        &server,
        r#"
        refused("ENOSPC", h.zero, 64 * K, 0)
        h.zero(h.get_size(), 0)
        h.flush()
        for start in range(0, h.get_size(), 32 * M):
            same(h.pread(32 * M, start), bytes(32 * M))
        "#,
    );
    server.stop();
    check(&kept.overlay());
}

/// Zeroes that keep their space have it, new ones and those where there was a hole.
fn zeroes_keep_their_space(kind: &str) {
    let mount = Mount::formatted(kind);
    mount.leave_free(16 << 20);
    let kept = Kept::new(Base::new(&noise(1, 64 << 20)), mount, "4096");
    let server = kept.serve();
    let code = format!(
        "{}{FILL}{}",
        r#"
    def taken():
        return 512 * os.stat(os.path.join(ARGS[2], "diff.qcow2")).st_blocks

    places = [4 * M, 30 * M]
    h.pwrite(noise(2 * M, 1), places[0])
    h.flush()
    h.trim(2 * M, places[0])
    h.flush()
    # The space comes back after the answer.
    patience = 600
    while taken() > M and patience:
        time.sleep(0.1)
        patience -= 1
    before = taken()
    for place in places:
        h.zero(2 * M, place, NO_HOLE)
    h.flush()
    assert taken() >= before + 4 * M, f"{before} bytes, then {taken()}"
    "#,
        r#"
    refused("ENOSPC", h.pwrite, noise(2 * M, 2), 50 * M)
    for place in places:
        same(h.pread(2 * M, place), bytes(2 * M))
        h.pwrite(noise(2 * M, place), place)
    h.flush()
    open(ARGS[1], "wb").write(read(h))
    "#
    );
    kept.client(&server, &code);
    kept.expect_flushed(server);
}

#[test]
fn zeroes_with_no_hole_have_space_on_a_full_ext4() {
    zeroes_keep_their_space("ext4");
}

#[test]
fn zeroes_with_no_hole_have_space_on_a_full_xfs() {
    zeroes_keep_their_space("xfs");
}

/// What is trimmed has tables, and needs no space.
#[test]
fn a_trim_makes_room_in_an_image_that_was_resumed_on_a_full_xfs() {
    let mount = Mount::formatted("xfs");
    mount.leave_free(16 << 20);
    let kept = Kept::new(Base::new(&noise(1, 64 << 20)), mount, "4096");
    let server = kept.serve();
    let code = format!("\n    h.pwrite(noise(8 * M, 1), 0)\n    h.flush()\n{FILL}");
    kept.client(&server, &code);
    server.stop();
    let server = kept.serve();
    kept.client(
        &server,
        r#"
        refused("ENOSPC", h.pwrite, noise(M, 2), 20 * M)
        h.trim(8 * M, 0)
        h.flush()
        h.pwrite(noise(4 * M, 2), 40 * M)
        h.flush()
        content = bytearray(read(h))
        same(content[:8 * M], bytes(8 * M))
        same(content[40 * M:44 * M], noise(4 * M, 2))
        open(ARGS[1], "wb").write(content)
        "#,
    );
    kept.expect_flushed(server);
}

/// The copy has the same tables, until one of the two writes to them.
#[test]
fn an_image_that_was_copied_by_reference_has_space_for_its_tables_again() {
    let kept = Kept::new(
        Base::new(&noise(1, 64 << 20)),
        Mount::formatted("xfs"),
        "4096",
    );
    let server = kept.serve();
    kept.client(
        &server,
        "for place in range(0, 64 * M, M): h.pwrite(noise(64 * K, place), place)",
    );
    server.stop();
    let copy = kept.mount.path().join("copy.qcow2");
    run(&["cp", "--reflink=always", text(&kept.overlay()), text(&copy)]);
    let server = kept.serve();
    let code = format!(
        "\n    h.pwrite(noise(64 * K, 1), 3 * M + 64 * K)\n{FILL}{}",
        r#"
    h.flush()
    open(ARGS[1], "wb").write(read(h))
    "#
    );
    kept.client(&server, &code);
    kept.expect_flushed(server);
    check(&copy);
}

/// Takes all the space that there is while `h` has something to flush: trimmed blocks
/// whose L2 entries lie in pages that the file does not have yet. (The file system is
/// one where space can't be taken before.)
const FLUSH_INTO_NOTHING: &str = r#"
    STEP = 32 * M
    h.pwrite(noise(3 * 512, 1), 100)
    h.flush()
    content = bytearray(h.get_size())
    content[100:1636] = noise(1536, 1)
    open(ARGS[1], "wb").write(content)
    for place in [STEP - 70_000, STEP, 3 * STEP]:
        h.trim(4096, place // 512 * 512)
"#;

fn with_a_page_missing() -> Kept {
    let base = Base::sparse(128 << 20, &[]);
    Kept::new(base, Mount::formatted("ext3"), "512")
}

#[test]
fn a_flush_that_has_no_space_for_its_tables_can_be_tried_again() {
    let kept = with_a_page_missing();
    let server = kept.serve();
    let code = format!(
        "{FLUSH_INTO_NOTHING}{FILL}{}",
        r#"
    for _ in range(3):
        refused("ENOSPC", h.flush)
    refused("ENOSPC", h.pwrite, noise(512, 3), 0, FUA)
    content[:512] = noise(512, 3)
    same(read(h), content)
    open(ARGS[1], "wb").write(content)
    os.unlink(filler)
    h.flush()
    "#
    );
    kept.client(&server, &code);
    // Nothing is left for a last flush to do: a crash is as good.
    kept.expect_flushed(server);
}

#[test]
fn an_end_without_space_says_that_the_image_is_incomplete() {
    let kept = with_a_page_missing();
    let server = kept.serve();
    kept.client(&server, &format!("{FLUSH_INTO_NOTHING}{FILL}"));
    let said = server.stop_and_tell();
    let words = [
        text(&kept.overlay()),
        "incomplete",
        "No space left on device",
    ]
    .map(str::to_string);
    assert_says(&said, &words.each_ref().map(String::as_str));

    // What was flushed before is there, and nothing else is damaged.
    check_after_a_crash(&kept.overlay());
    compare(&kept.overlay(), &kept.expected());
    fs::remove_file(kept.mount.path().join("filler")).unwrap();
    let server = kept.serve();
    kept.client(
        &server,
        "same(read(h), open(ARGS[1], 'rb').read()); h.flush()",
    );
    server.stop();
    check(&kept.overlay());
}

/// There is room to try the directory out, and for a part of the tables.
#[test]
fn an_image_for_which_there_is_no_space_leaves_nothing_behind() {
    let base = Base::sparse(1 << 30, &[]);
    let mut outcomes = std::collections::BTreeSet::new();
    for pages in 0..8 {
        let mount = Mount::tmpfs("1M");
        let overlay = mount.path().join("diff.qcow2");
        mount.fill();
        let big = File::options().write(true).open(mount.path().join("big"));
        let big = big.unwrap();
        let pages_left = big.metadata().unwrap().len() / 4096 - pages;
        big.set_len(pages_left * 4096).unwrap();
        let kept = format!("cow-overlay={}", text(&overlay));
        let files = || fs::read_dir(mount.path()).unwrap().count();
        let before = files();
        let plugin = ["file", base.path(), &kept, "cow-block-size=4K"];
        let ended = Setup::new().run(&plugin, "nbdinfo --size \"$uri\"");
        if overlay.exists() {
            check(&overlay);
            outcomes.insert("made");
            continue;
        }
        assert_says(&ended.stderr, &[text(&overlay), "No space left on device"]);
        assert_eq!(files(), before, "{pages} pages");
        let is_late = ended.stderr.contains("tables");
        outcomes.insert(if is_late {
            "no space for the tables"
        } else {
            "no space at all"
        });
    }
    let all = ["made", "no space at all", "no space for the tables"];
    assert_eq!(outcomes, all.into());
}
