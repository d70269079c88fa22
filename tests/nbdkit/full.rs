//! The overlay's file system is full while clients write.

use std::fs;

use crate::harness::mount::Mount;
use crate::harness::{Base, Setup, noise, run};

/// Writes until it is full and on; then the disk must hold what was
/// acknowledged, and of each block of a failed write the old bytes or the new.
pub const FILL_UP: &str = r#"
    BLOCK = int(ARGS[0])
    content = read(h)
    failed = 0

    def write(start, length, seed):
        global failed
        data = noise(length, seed)
        try:
            h.pwrite(data, start)
        except nbd.Error as error:
            assert error.errno == "ENOSPC", error
            failed += 1
            whole_blocks(start, data)
            return False
        content[start:start + length] = data
        return True

    def whole_blocks(start, data):
        end = start + len(data)
        found = h.pread(len(data), start)
        for block in range(start // BLOCK * BLOCK, end, BLOCK):
            low, high = max(block, start), min(block + BLOCK, end)
            now = found[low - start:high - start]
            new = data[low - start:high - start]
            assert now in (content[low:high], new), f"a torn block at {low}"
            content[low:high] = now

    # One write after the other, of sizes that no block divides.
    r = random.Random(1)
    start = 0
    while failed < 20:
        length = r.choice([r.randint(1, 3000), r.randint(1, 200_000), 256 * K])
        assert start + length < h.get_size(), "the file system did not fill up"
        write(start, length, start)
        # Some gaps, and some that overwrite the end of the one before.
        start += max(1, length + r.randint(-700, 5000))
    # And into what is there already, for which a file system may or may not need space.
    for _ in range(20):
        write(r.randrange(start), r.randint(1, 20_000), r.random())

    same(read(h), content)
    same(read(connect()), content)

    # Space that is given back can be used again.
    half = start // 2 // BLOCK * BLOCK
    h.trim(half, 0)
    content[:half] = bytes(half)
    same(read(h), content)
    tries = sum(write(place, 10_000, place) for place in range(0, half // 4, 10_000))
    assert tries == len(range(0, half // 4, 10_000)), f"only {tries} writes after a trim"
    same(read(h), content)
"#;

fn fills_up(mount: &Mount) {
    for block_size in ["4096", "65536"] {
        let base = Base::new(&noise(1, 64 << 20));
        let parameter = format!("cow-block-size={block_size}");
        let server = Setup::new()
            .tmpdir(mount.path())
            .start(&["file", base.path(), &parameter]);
        server.nbdsh_with(&[block_size], FILL_UP);
    }
}

#[test]
fn a_full_ext4_costs_nothing_that_was_acknowledged() {
    let mount = Mount::formatted("ext4");
    mount.leave_free(16 << 20);
    fills_up(&mount);
}

#[test]
fn a_full_xfs_costs_nothing_that_was_acknowledged() {
    let mount = Mount::formatted("xfs");
    mount.leave_free(16 << 20);
    fills_up(&mount);
}

#[test]
fn a_full_btrfs_costs_nothing_that_was_acknowledged() {
    let mount = Mount::formatted("btrfs");
    mount.leave_free(16 << 20);
    fills_up(&mount);
}

#[test]
fn a_full_tmpfs_costs_nothing_that_was_acknowledged() {
    fills_up(&Mount::tmpfs("16M"));
}

/// btrfs would write what is overwritten to another place.
#[test]
fn what_is_stored_can_be_overwritten_on_a_full_btrfs() {
    let mount = Mount::formatted("btrfs");
    // What the file system is filled with is beside it.
    let overlays = mount.path().join("overlays");
    fs::create_dir(&overlays).unwrap();
    let base = Base::sparse(64 << 20, &[]);
    let server =
        Setup::new()
            .tmpdir(&overlays)
            .start(&["file", base.path(), "cow-block-size=4096"]);
    server.nbdsh("h.pwrite(noise(4 * M, 1), 0)");
    // In memory there is a place for all of it, stored or not.
    run(&["sync", "-f", mount.path().to_str().unwrap()]);
    mount.fill();
    server.nbdsh(
        r#"
        refused("ENOSPC", h.pwrite, noise(M, 2), 32 * M)
        for place in range(0, 4 * M, M):
            h.pwrite(noise(M, place), place)
            same(h.pread(M, place), noise(M, place))
        "#,
    );
}

/// A trim inside of a block may give its space back, and another block may take
/// it: then a write to the first one finds no space in the middle of the block.
#[test]
fn a_block_in_which_a_part_was_trimmed_is_rewritten_as_a_whole_or_not_at_all() {
    let mount = Mount::tmpfs("4M");
    let base = Base::new(&noise(3, 16 << 20));
    let server =
        Setup::new()
            .tmpdir(mount.path())
            .start(&["file", base.path(), "cow-block-size=64K"]);
    server.nbdsh(
        r#"
        h.pwrite(noise(256 * K, 1), 0)
        old = bytearray(noise(256 * K, 1))
        for block in range(4):
            middle = block * 64 * K + 24 * K
            h.trim(16 * K, middle)
            old[middle:middle + 16 * K] = bytes(16 * K)
        # Until not even one page is left.
        for length in [64 * K, 4 * K]:
            for start in range(M, 16 * M, 64 * K):
                try:
                    h.pwrite(noise(length, start), start)
                except nbd.Error as error:
                    assert error.errno == "ENOSPC", error
                    break
            else:
                raise AssertionError("the file system did not fill up")
        new = noise(256 * K, 2)
        try:
            h.pwrite(new, 0)
            old = new
        except nbd.Error as error:
            assert error.errno == "ENOSPC", error
        found = h.pread(256 * K, 0)
        for start in range(0, 256 * K, 64 * K):
            block = found[start:start + 64 * K]
            whole = block in (old[start:start + 64 * K], new[start:start + 64 * K])
            assert whole, f"a torn block at {start}"
        "#,
    );
}

/// A read gets its bytes from the base even where there is no space to keep them.
#[test]
fn a_read_that_can_not_be_kept_still_reads() {
    let mount = Mount::tmpfs("4M");
    let content = noise(2, 16 << 20);
    let base = Base::new(&content);
    let server = Setup::new().tmpdir(mount.path()).start(&[
        "file",
        base.path(),
        "cow-on-read=true",
        "cow-block-size=64K",
    ]);
    server.nbdsh_with(
        &[base.path()],
        "for _ in range(2): same(read(h), open(ARGS[0], 'rb').read())",
    );
}

/// What a failed write has stored before it failed is nobody's: a trim of the same
/// place gives it back.
#[test]
fn the_space_that_a_failed_write_took_comes_back() {
    let mount = Mount::tmpfs("40M");
    let server = Setup::new()
        .tmpdir(mount.path())
        .start(&["null", "size=1G"]);
    server.nbdsh(
        r#"
        h.pwrite(noise(20 * M, 1), 0)
        try:
            h.pwrite(noise(30 * M, 2), 32 * M)
            raise AssertionError("30M went where 20M are free")
        except nbd.Error as error:
            assert error.errno == "ENOSPC", error
        same(h.pread(30 * M, 32 * M), bytes(30 * M))
        h.trim(30 * M, 32 * M)
        h.pwrite(noise(15 * M, 3), 100 * M)
        same(h.pread(20 * M, 0), noise(20 * M, 1))
        same(h.pread(15 * M, 100 * M), noise(15 * M, 3))
        "#,
    );
}
