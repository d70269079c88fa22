//! The map of the disk: what `nbdinfo --map` prints, to the byte.

use crate::harness::{Base, Server, Setup, noise, run};

/// `nbdinfo --map` as (offset, length, kind).
fn map(server: &Server) -> Vec<(u64, u64, String)> {
    run(&["nbdinfo", "--map", &server.uri()])
        .lines()
        .map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            let [offset, length, _flags, kind] = words[..] else {
                panic!("not a line of a map: {line:?}");
            };
            (
                offset.parse().unwrap(),
                length.parse().unwrap(),
                kind.into(),
            )
        })
        .collect()
}

fn assert_map(server: &Server, expected: &[(u64, u64, &str)]) {
    let expected: Vec<_> = expected
        .iter()
        .map(|(offset, length, kind)| (*offset, *length, kind.to_string()))
        .collect();
    assert_eq!(map(server), expected);
}

const K: u64 = 1024;

/// Data and holes by turns, 64K each.
fn half_sparse(size: u64) -> Base {
    let data = noise(1, 64 << 10);
    let pieces: Vec<_> = (0..size)
        .step_by(128 << 10)
        .map(|offset| (offset, &data[..(size - offset).min(64 << 10) as usize]))
        .collect();
    Base::sparse(size, &pieces)
}

#[test]
fn an_untouched_disk_has_the_map_of_its_base() {
    let base = half_sparse(512 * K);
    let server = Server::start(&["file", base.path()]);
    assert_map(
        &server,
        &[
            (0, 64 * K, "data"),
            (64 * K, 64 * K, "hole,zero"),
            (128 * K, 64 * K, "data"),
            (192 * K, 64 * K, "hole,zero"),
            (256 * K, 64 * K, "data"),
            (320 * K, 64 * K, "hole,zero"),
            (384 * K, 64 * K, "data"),
            (448 * K, 64 * K, "hole,zero"),
        ],
    );
}

#[test]
fn the_map_shows_what_was_written_trimmed_and_zeroed() {
    let base = half_sparse(512 * K);
    let server = Server::start(&["file", base.path(), "cow-block-size=4K"]);
    server.nbdsh(
        r#"
        h.pwrite(noise(4 * K, 1), 100 * K)   # a block in a hole
        h.pwrite(b"x", 73 * K)               # a part of one: its whole block is data
        h.trim(32 * K, 144 * K)              # in data
        h.zero(8 * K, 272 * K)               # in data
        h.zero(4 * K, 288 * K, NO_HOLE)      # keeps its space, so it is no hole
        h.trim(16 * K, 96 * K)               # what was written to the hole goes again
        h.pwrite(noise(8 * K, 2), 148 * K)   # and what was trimmed comes back
        h.trim(10 * K, 385 * K)              # one whole block and pieces of two others
        "#,
    );
    assert_map(
        &server,
        &[
            (0, 64 * K, "data"),
            (64 * K, 8 * K, "hole,zero"),
            (72 * K, 4 * K, "data"),
            (76 * K, 52 * K, "hole,zero"),
            (128 * K, 16 * K, "data"),
            (144 * K, 4 * K, "hole,zero"),
            (148 * K, 8 * K, "data"),
            (156 * K, 20 * K, "hole,zero"),
            (176 * K, 16 * K, "data"),
            (192 * K, 64 * K, "hole,zero"),
            (256 * K, 16 * K, "data"),
            (272 * K, 8 * K, "hole,zero"),
            (280 * K, 40 * K, "data"),
            (320 * K, 64 * K, "hole,zero"),
            (384 * K, 4 * K, "data"),
            (388 * K, 4 * K, "hole,zero"),
            (392 * K, 56 * K, "data"),
            (448 * K, 64 * K, "hole,zero"),
        ],
    );
}

#[test]
fn the_map_ends_where_a_disk_with_a_partial_last_block_ends() {
    let base = half_sparse(64 * K + 1000);
    let server = Server::start(&["file", base.path()]);
    // The base's own block is partly a hole, as far as its file system can tell.
    server.nbdsh("h.pwrite(b'x', 64 * K + 999)");
    assert_map(&server, &[(0, 65 * K - 24, "data")]);
    server.nbdsh("h.trim(1000, 64 * K)");
    assert_map(&server, &[(0, 64 * K, "data"), (64 * K, 1000, "hole,zero")]);
}

#[test]
fn a_disk_of_a_tebibyte_has_a_map() {
    let server = Server::start(&["memory", "1T"]);
    assert_map(&server, &[(0, 1 << 40, "hole,zero")]);
    server.nbdsh("h.pwrite(noise(8 * K, 1), 700 * G)");
    assert_map(
        &server,
        &[
            (0, 700 << 30, "hole,zero"),
            (700 << 30, 8 * K, "data"),
            ((700 << 30) + 8 * K, (324 << 30) - 8 * K, "hole,zero"),
        ],
    );
}

/// nbdkit 1.32 aborts when a filter hands it an extent that reaches past the request.
const LARGEST: &str = r#"
    largest = 0xFFFFFE00

    def ask(offset):
        answer = reply(h, largest, offset)
        assert all(length > 0 for length, _ in answer), answer
        assert offset + sum(length for length, _ in answer) <= h.get_size(), answer

    for change in [lambda: None, lambda: h.trim(2 * G, 2 * G), *map(eval, ARGS)]:
        change()
        for offset in [0, 512, 4095, 4096, 6 * G - largest]:
            ask(offset)
"#;

#[test]
fn the_largest_request_is_answered_within_its_bounds() {
    for parameter in ["cow-block-size=4K", "cow-block-size=1M"] {
        let server = Server::start(&["memory", "6G", parameter]);
        let writes = [
            "lambda: h.pwrite(b'x' * 512, 5 * G)",
            "lambda: h.pwrite(b'x' * 512, G)",
            "lambda: h.trim(largest, 4096)",
        ];
        server.nbdsh_with(&writes, LARGEST);
    }
}

#[test]
fn the_largest_request_is_answered_within_its_bounds_at_blocks_of_2g() {
    let server = Server::start(&["memory", "6G", "cow-block-size=2G"]);
    server.nbdsh(LARGEST);
}

#[test]
fn every_answer_keeps_to_the_range_that_was_asked() {
    let base = half_sparse(1024 * K);
    let server = Server::start(&["file", base.path()]);
    server.nbdsh(
        r#"
        Model([h], read(h), 3).run(60)
        whole = extents(h)
        kind = [None] * (M // 512)
        for offset, length, what in whole:
            assert offset % 512 == 0 and length % 512 == 0, (offset, length)
            for sector in range(offset // 512, (offset + length) // 512):
                kind[sector] = what
        assert None not in kind, "the map has a gap"
        content = read(h)
        for offset, length, what in whole:
            if "zero" in what:
                same(content[offset:offset + length], bytes(length), offset)
        # A part of the disk is told the same as in the map of the whole.
        for seed in range(200):
            r = random.Random(seed)
            offset = r.randrange(M // 512)
            count = r.randint(1, M // 512 - offset)
            told = extents(h, offset * 512, count * 512)
            assert sum(length for _, length, _ in told) == count * 512
            for at, length, what in told:
                for sector in range(at // 512, (at + length) // 512):
                    assert kind[sector] == what, (sector, kind[sector], what)
        "#,
    );
}

#[test]
fn one_extent_is_given_where_one_was_asked_for() {
    let base = half_sparse(512 * K);
    let server = Server::start(&["file", base.path()]);
    server.nbdsh(
        r#"
        h.pwrite(noise(4 * K, 1), 100 * K)
        h.trim(32 * K, 144 * K)
        for offset in range(0, 512 * K, 3 * K):
            count = 512 * K - offset
            one = reply(h, count, offset, ONE)
            assert len(one) == 1, one
            length, kind = one[0]
            assert 0 < length <= count, one
            first = extents(h, offset, length)
            assert first == [(offset, length, kind)], (first, one)
        # Shorter than the run that it lies in.
        assert reply(h, 1000, 1000, ONE) == [(1000, "data")]
        "#,
    );
}

fn blocks_over_a_plugin_without_extents(server: &Server) {
    assert_map(server, &[(0, 1024 * K, "data")]);
    server.nbdsh(
        r#"
        h.trim(64 * K, 128 * K)
        h.pwrite(b"x" * 4096, 160 * K)
        assert reply(h, M, 0, ONE)[0][1] == "data"
        "#,
    );
    assert_map(
        server,
        &[
            (0, 128 * K, "data"),
            (128 * K, 32 * K, "hole,zero"),
            (160 * K, 4 * K, "data"),
            (164 * K, 28 * K, "hole,zero"),
            (192 * K, 832 * K, "data"),
        ],
    );
}

#[test]
fn a_plugin_without_extents_is_data_where_nothing_was_trimmed() {
    let server = Server::start(&["pattern", "size=1M", "cow-block-size=4K"]);
    blocks_over_a_plugin_without_extents(&server);
}

#[test]
fn a_plugin_whose_extents_are_hidden_is_data_where_nothing_was_trimmed() {
    let base = half_sparse(1024 * K);
    let server = Setup::new()
        .below("noextents")
        .start(&["file", base.path(), "cow-block-size=4K"]);
    blocks_over_a_plugin_without_extents(&server);
}

/// A client that fills a disk with zeroes gets a sparse disk, whatever request it uses.
#[test]
fn blocks_of_zeroes_are_holes_however_they_were_written() {
    let base = Base::new(&noise(2, 256 << 10));
    let server = Server::start(&["file", base.path(), "cow-block-size=4K"]);
    server.nbdsh(
        r#"
        h.pwrite(bytes(16 * K), 16 * K)
        h.trim(16 * K, 64 * K)
        h.zero(16 * K, 128 * K)
        "#,
    );
    assert_map(
        &server,
        &[
            (0, 16 * K, "data"),
            (16 * K, 16 * K, "hole,zero"),
            (32 * K, 32 * K, "data"),
            (64 * K, 16 * K, "hole,zero"),
            (80 * K, 48 * K, "data"),
            (128 * K, 16 * K, "hole,zero"),
            (144 * K, 112 * K, "data"),
        ],
    );
    assert_eq!(server.overlay_bytes(), 0, "zeroes took space");
}

/// Reading must not change the map, and cow-on-read must.
#[test]
fn a_block_that_was_only_read_stays_a_part_of_the_base() {
    let base = half_sparse(256 * K);
    let untouched = Server::start(&["file", base.path()]);
    let before = map(&untouched);
    untouched.nbdsh("read(h)");
    assert_eq!(map(&untouched), before);
    let filled = Server::start(&["file", base.path(), "cow-on-read=true"]);
    filled.nbdsh("read(h)");
    assert_ne!(filled.overlay_bytes(), 0);
}
