//! Overlays on the file systems that people have, each with its own idea of
//! holes, of punching them and of zeroing a range.

use crate::harness::command::{LIMIT, eventually};
use crate::harness::mount::Mount;
use crate::harness::{Base, Server, Setup, noise};

fn serve(mount: &Mount, base: &Base, parameters: &[&str]) -> Server {
    Setup::new()
        .tmpdir(mount.path())
        .start(&[&["file", base.path()], parameters].concat())
}

fn random_requests_agree_with_models(mount: &Mount) {
    for block_size in ["cow-block-size=512", "cow-block-size=64K"] {
        let base = Base::new(&noise(1, 3_000_001));
        let server = serve(mount, &base, &[block_size]);
        server.nbdsh(
            r#"
            Model([h, connect()], read(h), 1).run(250).check()
            fly_together(neighbours([h, connect()], read(h), 8, 5), 40)
            "#,
        );
    }
}

/// What `du` would show of the overlay falls when what was written is trimmed or zeroed.
fn space_comes_back(mount: &Mount) {
    for clear in ["h.trim", "h.zero"] {
        let base = Base::new(&noise(2, 8 << 20));
        let server = serve(mount, &base, &[]);
        server.nbdsh("h.pwrite(noise(8 * M, 1), 0)");
        let full = server.overlay_bytes();
        assert!(full >= 8 << 20, "{full} bytes hold 8 MB");
        // All but the first and the last megabyte, and not at the border of a block.
        let clear = format!("{clear}(6 * M - 200, M + 100)");
        server.nbdsh(&clear);
        // It is given back after the request was answered.
        eventually(LIMIT, || server.overlay_bytes() < 3 << 20);
        let left = server.overlay_bytes();
        assert!(
            (2 << 20..3 << 20).contains(&left),
            "{left} bytes after {clear}, {full} before"
        );
        server.nbdsh(
            r#"
            expected = bytearray(noise(8 * M, 1))
            expected[M + 100:7 * M - 100] = bytes(6 * M - 200)
            same(read(h), expected)
            "#,
        );
    }
}

/// Without MAY_TRIM the client wants to be sure of its space.
fn zeroes_can_keep_their_space(mount: &Mount, fast: bool) {
    let base = Base::new(&noise(3, 8 << 20));
    let server = serve(mount, &base, &[]);
    server.nbdsh_with(
        &[if fast { "fast" } else { "slow" }],
        r#"
        expected = read(h)
        assert h.can_fast_zero()
        # Over the base, over data and over a hole.
        h.pwrite(noise(M, 1), 2 * M)
        h.trim(M, 4 * M)
        for start in [0, 2 * M, 4 * M]:
            h.zero(M, start, NO_HOLE)
            expected[start:start + M] = bytes(M)
            assert extents(h, start, M) == [(start, M, "data")], extents(h)
        same(read(h), expected)
        for start in [5 * M, 2 * M]:
            if ARGS[0] == "fast":
                h.zero(M, start, NO_HOLE | FAST)
                expected[start:start + M] = bytes(M)
            else:
                refused("ENOTSUP", h.zero, M, start, NO_HOLE | FAST)
        same(read(h), expected)
        # With a hole allowed it is always fast.
        h.zero(M, 6 * M + 5, FAST)
        expected[6 * M + 5:7 * M + 5] = bytes(M)
        same(read(h), expected)
        "#,
    );
    let kept = server.overlay_bytes();
    assert!(kept >= 3 << 20, "{kept} bytes keep the space of 3 MB");
}

/// A file that was ever truncated is written out when it is closed (ext4 and XFS take it
/// for one that was replaced), even if it goes away with that: in the many pieces of an
/// overlay this takes minutes.
#[test]
fn what_is_thrown_away_is_not_written_to_the_disk() {
    for kind in ["ext4", "xfs"] {
        let mount = Mount::formatted(kind);
        let base = Base::sparse(32 << 20, &[]);
        // The kernel may write what it likes at any time, or somebody says `sync`: but
        // not each time within a moment.
        let is_kept_back = || {
            let server = serve(&mount, &base, &[]);
            let before = mount.bytes_written();
            server.nbdsh("for place in range(0, 16 * M, 8 * K): h.pwrite(noise(4 * K, 1), place)");
            server.stop();
            mount.bytes_written() - before < 4 << 20
        };
        assert!((0..8).any(|_| is_kept_back()), "{kind} wrote the overlay");
    }
}

/// They give a file megabytes for one byte, so that a short file with a byte at each end
/// has no hole. An overlay has.
fn is_accepted(mount: &Mount) {
    let before = mount.bytes_taken();
    let base = Base::sparse(1 << 30, &[(0, &noise(4, 1000))]);
    let server = serve(mount, &base, &[]);
    // XFS gives the space of a deleted file back a moment later. Its inode stays.
    let given_back = || mount.bytes_taken() < before + (1 << 20);
    assert!(eventually(LIMIT, given_back), "the trial took space");
    server.nbdsh(
        r#"
        assert h.get_block_size(nbd.SIZE_PREFERRED) == 4096
        h.pwrite(noise(5000, 1), 700 * M)
        same(h.pread(5000, 700 * M), noise(5000, 1))
        "#,
    );
    let taken = server.overlay_bytes();
    assert!(
        (5000..=32 << 20).contains(&taken),
        "{taken} bytes hold 5000"
    );
    server.stop();
    random_requests_agree_with_models(mount);
}

#[test]
fn a_tmpfs_of_huge_pages_is_accepted() {
    is_accepted(&Mount::of_large_units("huge"));
}

#[test]
fn a_tmpfs_of_huge_pages_within_a_file_is_accepted() {
    is_accepted(&Mount::of_large_units("huge within size"));
}

#[test]
fn an_xfs_with_an_extent_size_is_accepted() {
    is_accepted(&Mount::of_large_units("extsize"));
}

#[test]
fn an_ext4_of_large_clusters_is_accepted() {
    is_accepted(&Mount::of_large_units("bigalloc"));
}

/// As sshfs: it has nothing but the length to tell from.
#[test]
fn one_that_makes_up_what_a_file_takes_is_judged_by_its_free_space() {
    let mount = Mount::fuse("length", 1 << 30);
    let base = Base::new(&noise(5, 500_000));
    let server = serve(&mount, &base, &[]);
    server.nbdsh("h.pwrite(noise(5000, 1), 300_000); same(h.pread(5000, 300_000), noise(5000, 1))");
    let said = server.stop_and_tell();
    assert!(!said.contains("warning"), "{said}");
    random_requests_agree_with_models(&mount);
}

#[test]
fn one_that_tells_nothing_about_space_is_served_with_a_warning() {
    let mount = Mount::fuse("unknown", 1 << 30);
    let base = Base::new(&noise(6, 500_000));
    let said = serve(&mount, &base, &[]).stop_and_tell();
    for word in [
        "warning",
        mount.path().to_str().unwrap(),
        "how much space is free",
        "TMPDIR",
    ] {
        assert!(said.contains(word), "{word:?} in {said:?}");
    }
}

/// As exFAT and FAT.
#[test]
fn one_that_stores_holes_is_refused_and_left_as_it_was() {
    for (size, reason) in [
        (1 << 30, "stores holes as data (268435456 bytes"),
        (100 << 20, "No space left on device"),
    ] {
        let mount = Mount::fuse("data", size);
        let error = Setup::new()
            .tmpdir(mount.path())
            .error(&["null", "size=1M"]);
        for word in [mount.path().to_str().unwrap(), reason, "TMPDIR"] {
            assert!(error.contains(word), "{word:?} in {error:?}");
        }
        // What is deleted while it is open goes away a moment after it is closed.
        let given_back = || mount.bytes_taken() == 0;
        assert!(eventually(LIMIT, given_back), "the trial took space");
    }
}

macro_rules! on_each {
    ($($kind:ident: $mount:expr, $fast:expr;)*) => {$(
        mod $kind {
            use super::*;

            #[test]
            fn random_requests_agree_with_models() {
                super::random_requests_agree_with_models(&$mount);
            }

            #[test]
            fn space_comes_back() {
                super::space_comes_back(&$mount);
            }

            #[test]
            fn zeroes_can_keep_their_space() {
                super::zeroes_can_keep_their_space(&$mount, $fast);
            }
        }
    )*};
}

on_each! {
    ext4: Mount::formatted("ext4"), true;
    // Block-mapped files: holes can be punched, a range can't be zeroed in place.
    ext3: Mount::formatted("ext3"), false;
    xfs: Mount::formatted("xfs"), true;
    btrfs: Mount::formatted("btrfs"), true;
    tmpfs: Mount::tmpfs("64M"), false;
}

/// A block that is trimmed or zeroed piece by piece is all zeroes in the end, and keeps
/// no space.
#[test]
fn a_block_that_is_trimmed_piece_by_piece_gives_its_space_back() {
    for (block_size, piece) in [("64K", "4 * K"), ("4096", "512")] {
        for clear in ["h.trim", "h.zero"] {
            let base = Base::new(&noise(4, 4 << 20));
            let block_size = format!("cow-block-size={block_size}");
            let server = Server::start(&["file", base.path(), &block_size]);
            server.nbdsh("h.pwrite(noise(4 * M, 1), 0)");
            assert!(server.overlay_bytes() >= 4 << 20);
            server.nbdsh(&format!(
                "pieces = list(range(0, 4 * M, {piece}))\n\
                 random.Random(1).shuffle(pieces)\n\
                 for start in pieces: {clear}({piece}, start)\n\
                 same(read(h), bytes(4 * M))"
            ));
            let is_back = eventually(LIMIT, || server.overlay_bytes() == 0);
            assert!(is_back, "{} bytes after {clear}", server.overlay_bytes());
        }
    }
}
