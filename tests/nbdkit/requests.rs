//! Every kind of request, against the bytes that must come of it.

use crate::harness::{Base, Server, Setup, noise};

#[test]
fn what_is_written_is_read_back_on_every_connection() {
    let base = Base::new(&noise(1, 1 << 20));
    let server = Server::start(&["file", base.path()]);
    server.nbdsh(
        r#"
        other = connect()
        expected = read(h)
        # In the middle of a block, across a border, a whole block, the very ends.
        for start, length in [(100, 512), (4000, 300), (8192, 4096), (0, 1), (M - 1, 1)]:
            data = noise(length, start)
            h.pwrite(data, start)
            expected[start:start + length] = data
            same(other.pread(length, start), data, start)
        same(read(other), expected)
        "#,
    );
}

#[test]
fn a_fresh_disk_reads_as_its_base() {
    let content = noise(2, 1_000_001);
    let base = Base::new(&content);
    let server = Server::start(&["file", base.path()]);
    server.nbdsh_with(&[base.path()], "same(read(h), open(ARGS[0], 'rb').read())");
}

#[test]
fn a_new_server_knows_nothing_of_the_writes_before() {
    let base = Base::new(&noise(3, 100_000));
    let server = Server::start(&["file", base.path()]);
    server.nbdsh("h.pwrite(bytes(100_000), 0)");
    server.stop();
    let server = Server::start(&["file", base.path()]);
    server.nbdsh_with(&[base.path()], "same(read(h), open(ARGS[0], 'rb').read())");
}

/// Sizes around one byte, one sector and one block, and ones that none of them divides.
const SIZES: [usize; 7] = [1, 511, 512, 4097, 100_000, 131_072, 3 * 1024 * 1024 + 513];

fn random_requests_agree_with_a_model(block_size: &str) {
    for size in SIZES {
        let base = Base::new(&noise(size as u64, size));
        let block_size = format!("cow-block-size={block_size}");
        let server = Server::start(&["file", base.path(), &block_size]);
        server.nbdsh("Model([h, connect()], read(h), h.get_size()).run(250).check()");
    }
}

#[test]
fn random_requests_agree_with_a_model_at_blocks_of_512() {
    random_requests_agree_with_a_model("512");
}

#[test]
fn random_requests_agree_with_a_model_at_blocks_of_4k() {
    random_requests_agree_with_a_model("4K");
}

#[test]
fn random_requests_agree_with_a_model_at_blocks_of_64k() {
    random_requests_agree_with_a_model("64K");
}

#[test]
fn random_requests_agree_with_a_model_at_blocks_of_1m() {
    random_requests_agree_with_a_model("1M");
}

/// Reading around such a block must not take memory or time for more than the disk.
#[test]
fn random_requests_agree_with_a_model_at_blocks_larger_than_the_disk() {
    for block_size in ["cow-block-size=256K", "cow-block-size=2G"] {
        let base = Base::new(&noise(14, 100_001));
        let server = Server::start(&["file", base.path(), block_size]);
        server.nbdsh("Model([h, connect()], read(h), 1).run(250).check()");
    }
}

#[test]
fn random_requests_agree_with_a_model_over_a_sparse_base() {
    let data = noise(15, 100_000);
    for block_size in ["cow-block-size=4K", "cow-block-size=64K"] {
        let base = Base::sparse(3_000_000, &[(200_000, &data), (1 << 20, &data)]);
        let server = Server::start(&["file", base.path(), block_size]);
        server.nbdsh("Model([h, connect()], read(h), 1).run(250).check()");
    }
}

fn requests_in_flight_agree_with_models(parameters: &[&str]) {
    let base = Base::new(&noise(4, 2_000_003));
    let server = Server::start(&[&["file", base.path()], parameters].concat());
    server.nbdsh(
        r#"
        connections = [h, connect(), connect(), connect()]
        content = read(h)
        fly_together(neighbours(connections, content, 16, 5), 60)
        "#,
    );
}

#[test]
fn requests_in_flight_on_four_connections_agree_with_models() {
    requests_in_flight_agree_with_models(&[]);
}

/// Sixteen models in 2 MB, so that most blocks belong to two of them.
#[test]
fn requests_in_flight_that_share_blocks_agree_with_models() {
    requests_in_flight_agree_with_models(&["cow-block-size=128K"]);
}

#[test]
fn requests_in_flight_agree_with_models_while_reads_and_caches_fill_blocks() {
    requests_in_flight_agree_with_models(&[
        "cow-block-size=128K",
        "cow-on-read=true",
        "cow-on-cache=true",
    ]);
}

#[test]
fn sixteen_unaligned_writes_in_flight_over_a_slow_base_are_all_there() {
    let base = Base::new(&noise(5, 4 << 20));
    let server = Setup::new()
        .below("delay")
        .start(&["file", base.path(), "rdelay=5ms"]);
    server.nbdsh(
        r#"
        content = read(h)
        flight = Flight([h], 16)
        for block in range(256):
            data = noise(512, block)
            start = block * 16 * K + 1000
            flight.write(h, data, start)
            content[start:start + 512] = data
        flight.finish()
        same(read(h), content)
        "#,
    );
}

#[test]
fn a_partial_last_block_is_written_trimmed_and_zeroed() {
    let base = Base::new(&noise(6, 4096 + 700));
    let server = Server::start(&["file", base.path()]);
    server.nbdsh(
        r#"
        expected = read(h)
        h.pwrite(b"end", 4096 + 697)
        expected[-3:] = b"end"
        same(read(h), expected)
        h.trim(700, 4096)
        expected[4096:] = bytes(700)
        same(read(h), expected)
        h.pwrite(b"again", 4100)
        expected[4100:4105] = b"again"
        same(read(h), expected)
        h.zero(700, 4096, FAST if h.can_fast_zero() else 0)
        expected[4096:] = bytes(700)
        same(read(h), expected)
        assert h.get_size() == 4096 + 700
        "#,
    );
}

#[test]
fn an_empty_disk_is_served() {
    let base = Base::new(b"");
    let server = Server::start(&["file", base.path()]);
    server.nbdsh(
        r#"
        assert h.get_size() == 0
        h.flush()
        # Nothing can be asked of it, and asking must not kill the server.
        refused("EINVAL", lenient(h).pread, 1, 0)
        refused("ENOSPC", h.pwrite, b"x", 0)
        assert connect().get_size() == 0
        "#,
    );
}

#[test]
fn a_request_past_the_end_is_an_error_and_the_next_one_works() {
    let base = Base::new(&noise(7, 5000));
    let server = Server::start(&["file", base.path()]);
    server.nbdsh(
        r#"
        expected = read(h)
        lenient(h)
        for start, length in [(4999, 2), (5000, 1), (1 << 62, 4096)]:
            refused("EINVAL", h.pread, length, start)
            refused("ENOSPC", h.pwrite, b"x" * length, start)
            refused("ENOSPC", h.zero, length, start)
            refused("EINVAL", h.trim, length, start)
            refused("EINVAL", h.cache, length, start)
        same(read(h), expected)
        "#,
    );
}

#[test]
fn fua_is_accepted_by_write_zero_and_trim() {
    let base = Base::new(&noise(8, 100_000));
    let server = Server::start(&["file", base.path()]);
    server.nbdsh(
        r#"
        h.pwrite(b"a" * 10_000, 500, FUA)
        h.zero(5000, 600, FUA)
        h.trim(69_632, 20_480, FUA)
        h.flush()
        expected = noise(0, 0) + b"a" * 100 + bytes(5000) + b"a" * 4900
        same(h.pread(10_000, 500), expected)
        same(h.pread(69_632, 20_480), bytes(69_632))
        "#,
    );
}

/// A block of zeroes has no data of its own to keep; what was in it must not shine through.
#[test]
fn zeroes_that_are_written_hide_the_base() {
    let base = Base::new(&noise(9, 1 << 20));
    let server = Server::start(&["file", base.path()]);
    server.nbdsh(
        r#"
        expected = read(h)
        h.pwrite(bytes(40_000), 10_000)
        expected[10_000:50_000] = bytes(40_000)
        same(read(h), expected)
        # And again over blocks that hold data by now.
        h.pwrite(noise(40_000, 1), 10_000)
        h.pwrite(bytes(40_000), 10_000)
        same(read(h), expected)
        "#,
    );
}

#[test]
fn a_write_into_a_zeroed_block_keeps_the_zeroes_around_it() {
    let base = Base::new(&noise(10, 1 << 20));
    let server = Server::start(&["file", base.path(), "cow-block-size=64K"]);
    server.nbdsh(
        r#"
        expected = read(h)
        for clear, start in [(h.trim, 64 * K), (h.zero, 256 * K)]:
            clear(128 * K, start)
            h.pwrite(b"new", start + 70_000)
            expected[start:start + 128 * K] = bytes(128 * K)
            expected[start + 70_000:start + 70_003] = b"new"
        same(read(h), expected)
        "#,
    );
}

/// What a block held before it was trimmed must not come back with the next partial write.
#[test]
fn data_that_was_trimmed_does_not_come_back() {
    let base = Base::new(&noise(11, 1 << 20));
    let server = Server::start(&["file", base.path(), "cow-block-size=64K"]);
    server.nbdsh(
        r#"
        h.pwrite(b"secret" * 10_000, 0)
        h.trim(M, 0)
        h.pwrite(b"x", 100)
        expected = bytearray(M)
        expected[100] = ord("x")
        same(read(h), expected)
        "#,
    );
}

#[test]
fn minus_r_serves_the_base_and_refuses_writes() {
    let base = Base::new(&noise(12, 100_000));
    let server = Setup::new().option("-r").start(&["file", base.path()]);
    server.nbdsh_with(
        &[base.path()],
        r#"
        assert h.is_read_only()
        same(read(h), open(ARGS[0], "rb").read())
        lenient(h)
        refused("EPERM", h.pwrite, b"x", 0)
        refused("EPERM", h.trim, 4096, 0)
        same(read(h), open(ARGS[0], "rb").read())
        "#,
    );
}

#[test]
fn one_thread_is_enough() {
    let base = Base::new(&noise(13, 500_000));
    let server = Setup::new().option("-t1").start(&["file", base.path()]);
    server.nbdsh("fly_together(neighbours([h, connect()], read(h), 8, 5), 60)");
}

/// Eight exbibytes are past any file system's longest file; the overlay must not mind.
#[test]
fn both_ends_of_a_disk_of_7_eib_can_be_written() {
    let server = Server::start(&["null", "size=7E"]);
    server.nbdsh(
        r#"
        size = 7 << 60
        assert h.get_size() == size
        places = [0, 3 * T - 100, 8 * T - 100, 16 * T - 100, 1 << 60, size - 5000]
        for place in places:
            h.pwrite(noise(5000, place), place)
        for place in places:
            same(connect().pread(5000, place), noise(5000, place), place)
            # A hole on either side, as in the base.
            if place:
                same(h.pread(9000, place - 9000), bytes(9000), place - 9000)
        h.trim(5000, 16 * T - 100)
        same(h.pread(5000, 16 * T - 100), bytes(5000))
        # As far as one request reaches: no memory or time for each block of it.
        h.zero(0xFFFFF000, 1 << 61)
        h.trim(0xFFFFF000, 5 << 60)
        same(h.pread(4096, 5 << 60), bytes(4096))
        same(h.pread(5000, size - 5000), noise(5000, size - 5000))
        "#,
    );
}

/// Two bits for each of 2^28 blocks would be 64 MB.
#[test]
fn zeroing_a_tebibyte_takes_no_memory_for_each_block() {
    let server = Server::start(&["null", "size=7E", "cow-block-size=4K"]);
    let before = server.memory();
    server.nbdsh(
        r#"
        for clear in [h.zero, h.trim]:
            for start in range(T, 2 * T, 2 * G):
                clear(2 * G, start)
        assert reply(h, G, T) == [(G, "hole,zero")]
        "#,
    );
    let taken = server.memory().saturating_sub(before);
    assert!(taken < 24 << 20, "{taken} bytes for a map of zeroes");
}
