//! What the filter tells a client about the export before the first request.

use crate::harness::{Base, Server, Setup, noise};

#[test]
fn the_export_can_do_everything() {
    let base = Base::new(&noise(1, 100_000));
    let server = Server::start(&["file", base.path()]);
    server.nbdsh(
        r#"
        assert not h.is_read_only()
        for can in ["flush", "fua", "trim", "zero", "fast_zero", "cache", "multi_conn", "df"]:
            assert getattr(h, "can_" + can)(), can
        assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        "#,
    );
}

/// The plugin is asked for reads only, so what it can't do is no matter.
#[test]
fn the_export_can_do_everything_over_a_plugin_that_can_only_read() {
    let server = Setup::new()
        .below("noextents")
        .below("nozero")
        .below("nocache")
        .start(&["pattern", "size=1M", "cachemode=none"]);
    server.nbdsh(
        r#"
        assert not h.is_read_only()
        for can in ["flush", "fua", "trim", "zero", "fast_zero", "multi_conn"]:
            assert getattr(h, "can_" + can)(), can
        Model([h], read(h), 1).run(100).check()
        "#,
    );
}

const SIZES: &str = r#"
    found = [h.get_block_size(which)
             for which in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
    expected = [int(word) for word in ARGS]
    assert found == expected, f"{found} instead of {expected}"
"#;

#[test]
fn the_preferred_size_is_that_of_the_overlay_file_system() {
    let base = Base::new(&noise(2, 100_000));
    let server = Server::start(&["file", base.path()]);
    server.nbdsh_with(&["1", "4096", "4294967295"], SIZES);
}

#[test]
fn the_preferred_size_is_the_block_size_but_not_less_than_4k() {
    for (parameter, size) in [
        ("512", "4096"),
        ("4K", "4096"),
        ("64K", "65536"),
        ("1M", "1048576"),
        ("2G", "33554432"),
    ] {
        let base = Base::new(&noise(3, 100_000));
        let parameter = format!("cow-block-size={parameter}");
        let server = Server::start(&["file", base.path(), &parameter]);
        server.nbdsh_with(&["1", size, "4294967295"], SIZES);
    }
}

fn over_a_plugin_with(minimum: &str, preferred: &str, maximum: &str, expected: [&str; 3]) {
    let base = Base::new(&noise(4, 1 << 20));
    let server = Setup::new().below("blocksize-policy").start(&[
        "file",
        base.path(),
        "cow-block-size=64K",
        &format!("blocksize-minimum={minimum}"),
        &format!("blocksize-preferred={preferred}"),
        &format!("blocksize-maximum={maximum}"),
    ]);
    server.nbdsh_with(&expected, SIZES);
}

#[test]
fn a_plugin_that_prefers_less_is_raised_to_the_block_size() {
    over_a_plugin_with("512", "4K", "1M", ["512", "65536", "1048576"]);
}

#[test]
fn a_plugin_that_prefers_more_is_left_alone() {
    over_a_plugin_with("512", "256K", "1M", ["512", "262144", "1048576"]);
}

#[test]
fn a_plugin_that_allows_less_than_a_block_is_left_alone() {
    over_a_plugin_with("512", "4K", "32K", ["512", "4096", "32768"]);
}

/// A plugin may refuse what is not aligned; the client that keeps to the advice
/// must never be the cause of such a request, not even when a block is filled.
#[test]
fn the_plugin_is_only_asked_for_what_its_minimum_allows() {
    let base = Base::new(&noise(5, 1 << 20));
    let server = Setup::new().below("blocksize-policy").start(&[
        "file",
        base.path(),
        "cow-block-size=64K",
        "blocksize-minimum=4K",
        "blocksize-preferred=4K",
        "blocksize-maximum=1M",
        "blocksize-error-policy=error",
    ]);
    server.nbdsh(
        r#"
        content = read(h, step=256 * K)
        for start in [0, 68 * K, 252 * K]:
            h.pwrite(noise(8 * K, start), start)
            content[start:start + 8 * K] = noise(8 * K, start)
        h.zero(4 * K, 8 * K)
        content[8 * K:12 * K] = bytes(4 * K)
        same(read(h, step=256 * K), content)
        "#,
    );
}

#[test]
fn the_plugin_is_never_asked_for_more_than_its_maximum() {
    let base = Base::new(&noise(6, 1 << 20));
    let server = Setup::new().below("blocksize-policy").start(&[
        "file",
        base.path(),
        "cow-block-size=64K",
        "blocksize-minimum=512",
        "blocksize-preferred=4K",
        "blocksize-maximum=32K",
        "blocksize-error-policy=error",
    ]);
    server.nbdsh(
        r#"
        content = read(h, step=32 * K)
        h.pwrite(b"x" * 512, 100 * K)
        content[100 * K:100 * K + 512] = b"x" * 512
        same(read(h, step=32 * K), content)
        "#,
    );
}

#[test]
fn a_client_that_does_not_heed_the_minimum_is_served_all_the_same() {
    let base = Base::new(&noise(7, 1 << 20));
    let server = Setup::new().below("blocksize-policy").start(&[
        "file",
        base.path(),
        "blocksize-minimum=8K",
        "blocksize-preferred=64K",
        "blocksize-maximum=1M",
        "blocksize-error-policy=error",
    ]);
    server.nbdsh(
        r#"
        lenient(h)
        content = read(h, step=256 * K)
        for start, length in [(5, 100), (8000, 500), (M - 1, 1), (70_000, 30_000)]:
            same(h.pread(length, start), content[start:start + length], start)
            data = noise(length, start)
            h.pwrite(data, start)
            content[start:start + length] = data
        h.zero(9_000, 200_000)
        content[200_000:209_000] = bytes(9_000)
        same(read(h, step=256 * K), content)
        "#,
    );
}

/// Between blocks of the overlay lie ranges that are smaller than what the layer below
/// takes.
#[test]
fn extents_and_prefetches_are_asked_for_in_multiples_of_the_minimum_too() {
    let base = Base::sparse((1 << 20) + 65536, &[(0, &noise(8, 64 << 10))]);
    for minimum in ["4K", "64K"] {
        let server = Setup::new().below("blocksize-policy").start(&[
            "file",
            base.path(),
            "cow-block-size=512",
            &format!("blocksize-minimum={minimum}"),
            "blocksize-preferred=64K",
            "blocksize-maximum=128K",
            "blocksize-error-policy=error",
        ]);
        server.nbdsh(
            r#"
            content = read(h, step=128 * K)
            lenient(h)
            for start in [512, 21 * K, 65 * K - 512, M + 3 * K]:
                h.pwrite(noise(512, start), start)
                content[start:start + 512] = noise(512, start)
            found = extents(h)
            assert found == [
                (0, 64 * K, "data"), (64 * K, 512, "hole,zero"), (65 * K - 512, 512, "data"),
                (65 * K, M - 62 * K, "hole,zero"), (M + 3 * K, 512, "data"),
                (M + 3 * K + 512, 61 * K - 512, "hole,zero"),
            ], found
            for start, length in [(0, 4096), (0, M), (64 * K, 64 * K), (0, h.get_size())]:
                h.cache(length, start)
                reply(h, length, start)
                reply(h, length, start, ONE)
            for start, length in [(513, 1), (1024, 512), (5000, 700), (M + 65535, 1)]:
                h.cache(length, start)
                assert extents(h, start, length)[0][0] == start
                reply(h, length, start, ONE)
            same(read(h, step=128 * K), content)
            "#,
        );
    }
}

/// Rounded out, the question is the same again, and so would be the answer: it ends where
/// the file does, in the middle of a unit.
#[test]
fn extents_that_the_layer_below_does_not_tell_are_data() {
    let base = Base::sparse((1 << 20) + 8192, &[]);
    let server = Setup::new()
        .below("blocksize-policy")
        .below("truncate")
        .start(&[
            "file",
            base.path(),
            "round-up=64K",
            "blocksize-minimum=64K",
            "blocksize-preferred=64K",
            "blocksize-maximum=128K",
        ]);
    server.nbdsh(
        r#"
        found = extents(h)
        holes = M + 8 * K
        # Newer versions of that filter round the answer too.
        told = [(0, M + 64 * K, "hole,zero")]
        assert found in ([(0, holes, "hole,zero"), (holes, 56 * K, "data")], told), found
        same(read(h), bytes(M + 64 * K))
        "#,
    );
}

/// What a client may ask for, rounded out, is more than a request has room for.
#[test]
fn a_range_as_long_as_a_request_can_be_is_rounded_out() {
    let server = Setup::new().below("blocksize-policy").start(&[
        "memory",
        "16G",
        "cow-block-size=512",
        "blocksize-minimum=64K",
        "blocksize-preferred=64K",
        "blocksize-maximum=4294967295",
        "blocksize-error-policy=error",
    ]);
    server.nbdsh(
        r#"
        h.set_strict_mode(0)
        for start in [1, 512, 64 * K - 1, 4 * G]:
            for length in [4 * G - 1, 4 * G - 512, 4 * G - 64 * K + 1]:
                h.cache(length, start)
                [(found, kind)] = reply(h, length, start)
                # The second is all that newer versions of nbdkit say at once.
                assert kind == "hole,zero" and found in (length, 4 * G - 64 * K), found
                # The first extent that there is to know of may end before the rounding.
                [(found, kind)] = reply(h, length, start, ONE)
                assert kind == "hole,zero" and length - 128 * K <= found <= length, found
        "#,
    );
}

/// A prefetch that is emulated by reads, over a layer that has a largest read.
#[test]
fn a_prefetch_keeps_to_the_maximum_too() {
    let base = Base::new(&noise(9, 1 << 20));
    let server = Setup::new()
        .below("nocache")
        .below("blocksize-policy")
        .start(&[
            "file",
            base.path(),
            "cachemode=emulate",
            "blocksize-minimum=512",
            "blocksize-preferred=4K",
            "blocksize-maximum=32K",
            "blocksize-error-policy=error",
        ]);
    server.nbdsh("h.cache(M, 0); h.cache(600 * K, 300 * K)");
}

/// That filter does not mind what it says: a maximum which is no multiple of the minimum.
#[test]
fn a_maximum_that_is_no_multiple_of_the_minimum_is_kept_all_the_same() {
    let base = Base::new(&noise(10, 1 << 20));
    let server = Setup::new().below("blocksize-policy").start(&[
        "file",
        base.path(),
        "blocksize-minimum=4K",
        "blocksize-preferred=4K",
        "blocksize-maximum=10000",
        "blocksize-error-policy=error",
    ]);
    server.nbdsh("same(read(h, step=256 * K), read(h, step=8 * K))");
}

/// The layer above takes what we prefer, and refuses all clients where that is less than
/// its own minimum.
#[test]
fn a_minimum_of_4k_above_fits_small_blocks() {
    let base = Base::new(&noise(11, 1 << 20));
    for block in ["512", "1K", "2K", "4K"] {
        let server = Setup::new().above("blocksize-policy").start(&[
            "file",
            base.path(),
            &format!("cow-block-size={block}"),
            "blocksize-minimum=4096",
        ]);
        server.nbdsh_with(&["4096", "4096", "4294967295"], SIZES);
    }
}
