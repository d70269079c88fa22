//! The image's file system is full: in a write, in a flush, at the end, and when the
//! image is made.

use std::fs::{self, File};
use std::path::PathBuf;

use super::{assert_says, check, check_after_a_crash, compare, text};
use crate::full::FILL_UP;
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
        Setup::new().start(&[
            "file",
            self.base.path(),
            &format!("cow-overlay={}", text(&self.overlay())),
            &format!("cow-block-size={}", self.block),
        ])
    }

    /// A file that code which has it in `ARGS[1]` writes the expected bytes to.
    fn expected(&self) -> PathBuf {
        self.files.path().join("expected")
    }

    fn client(&self, server: &Server, code: &str) {
        server.nbdsh_with(&[self.block, text(&self.expected())], code);
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

/// Takes all the space that there is while `h` has something to flush: trimmed blocks
/// whose L2 entries lie in pages that the file does not have yet. (Nothing is taken for
/// those before: a trim has to work on a full file system.)
const FLUSH_INTO_NOTHING: &str = r#"
    STEP = 32 * M
    h.pwrite(noise(3 * 512, 1), 100)
    h.flush()
    content = bytearray(h.get_size())
    content[100:1636] = noise(1536, 1)
    open(ARGS[1], "wb").write(content)
    for place in [STEP - 70_000, STEP, 3 * STEP]:
        h.trim(4096, place // 512 * 512)
    filler = os.path.join(ARGS[2], "filler")
    with open(filler, "wb", buffering=0) as file:
        for chunk in [M, 4 * K]:
            try:
                while True:
                    file.write(b"x" * chunk)
            except OSError as error:
                assert error.errno == errno.ENOSPC
"#;

fn with_a_page_missing() -> Kept {
    let base = Base::sparse(128 << 20, &[]);
    Kept::new(base, Mount::tmpfs("8M"), "512")
}

#[test]
fn a_flush_that_has_no_space_for_its_tables_can_be_tried_again() {
    let kept = with_a_page_missing();
    let server = kept.serve();
    let code = format!(
        "{FLUSH_INTO_NOTHING}{}",
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
    let mount = text(kept.mount.path()).to_string();
    server.nbdsh_with(&[kept.block, text(&kept.expected()), &mount], &code);
    // Nothing is left for a last flush to do: a crash is as good.
    server.kill();
    check(&kept.overlay());
    compare(&kept.overlay(), &kept.expected());
}

#[test]
fn an_end_without_space_says_that_the_image_is_incomplete() {
    let kept = with_a_page_missing();
    let server = kept.serve();
    let mount = text(kept.mount.path()).to_string();
    server.nbdsh_with(
        &[kept.block, text(&kept.expected()), &mount],
        FLUSH_INTO_NOTHING,
    );
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
        let ended = Setup::new().run(&plugin, "true");
        if overlay.exists() {
            super::wait_until_unlocked(&overlay);
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
