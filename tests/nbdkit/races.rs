//! A fill writes bytes that the client did not send: the base's. Over a base that
//! takes two milliseconds, writes to the same block are acknowledged while fills
//! are under way, and none of them may be undone.

use std::fs;

use crate::harness::{Base, Setup, noise, scratch};

const BLOCK: usize = 64 << 10;

/// 2000 writes of 512 bytes and 4K, eight to a block of 64K, each block with its
/// fills in flight beside them; then how many of the acknowledged writes are gone.
const LOSSES: &str = r#"
    connections = [h, connect(), connect(), connect()]
    r = random.Random(1)
    flight = Flight(connections, 48)
    written = []
    acknowledged = 0

    def count():
        global acknowledged
        acknowledged += 1

    def fill(start):
        c = r.choice(connections)
        if ARGS[0] == "read":
            flight.read(c, 4096, start)
        else:
            flight.add(c, c.aio_cache(4096, start))

    blocks = list(range(250))
    r.shuffle(blocks)
    for block in blocks:
        slots = r.sample(range(16), 12)
        for turn, slot in enumerate(slots):
            start = block * 64 * K + slot * 4 * K
            if turn % 3 == 0:
                fill(start)
            else:
                data = r.randbytes(r.choice([512, 4096]))
                written.append((start, data))
                flight.write(r.choice(connections), data, start, landed=count)
    flight.finish()
    assert acknowledged == len(written) == 2000, acknowledged
    content = read(h)
    lost = sum(content[start:start + len(data)] != data for start, data in written)
    assert lost == 0, f"{lost} of {acknowledged} acknowledged writes are lost"
    # What was not written is the base's still.
    expected = bytearray(open(ARGS[1], "rb").read())
    for start, data in written:
        expected[start:start + len(data)] = data
    same(content, expected)
"#;

/// The same with writes of whole blocks, which need nothing of the base and so
/// are done while the fill is still waiting for it.
const LOSSES_OF_BLOCKS: &str = r#"
    connections = [h, connect(), connect(), connect()]
    r = random.Random(2)
    flight = Flight(connections, 48)
    expected = bytearray(open(ARGS[1], "rb").read())
    for block in range(250):
        start = block * 64 * K
        for turn in range(3):
            c = r.choice(connections)
            if turn == 1:
                data = r.randbytes(64 * K)
                expected[start:start + 64 * K] = data
                flight.write(c, data, start)
            elif ARGS[0] == "read":
                flight.read(c, 4096, start + r.randrange(60 * K))
            else:
                flight.add(c, c.aio_cache(4096, start + r.randrange(60 * K)))
    flight.finish()
    content = read(h)
    lost = sum(content[start:start + 64 * K] != expected[start:start + 64 * K]
               for start in range(0, len(expected), 64 * K))
    assert lost == 0, f"{lost} of 250 acknowledged writes are lost"
"#;

fn no_write_is_lost_beside(fill: &str, parameter: &str, code: &str) {
    let base = Base::new(&noise(1, 250 * BLOCK));
    let server = Setup::new().below("delay").start(&[
        "file",
        base.path(),
        "cow-block-size=64K",
        "rdelay=2ms",
        parameter,
    ]);
    server.nbdsh_with(&[fill, base.path()], code);
}

#[test]
fn no_acknowledged_write_is_lost_beside_reads_that_fill() {
    no_write_is_lost_beside("read", "cow-on-read=true", LOSSES);
}

#[test]
fn no_acknowledged_write_is_lost_beside_caches_that_fill() {
    no_write_is_lost_beside("cache", "cow-on-cache=true", LOSSES);
}

#[test]
fn no_acknowledged_whole_block_is_lost_beside_reads_that_fill() {
    no_write_is_lost_beside("read", "cow-on-read=true", LOSSES_OF_BLOCKS);
}

#[test]
fn no_acknowledged_whole_block_is_lost_beside_caches_that_fill() {
    no_write_is_lost_beside("cache", "cow-on-cache=true", LOSSES_OF_BLOCKS);
}

/// Zeroes and trims change a block as writes do, and a fill must not bring the base back.
#[test]
fn no_acknowledged_zero_or_trim_is_lost_beside_fills() {
    let base = Base::new(&noise(2, 250 * BLOCK));
    let server = Setup::new().below("delay").start(&[
        "file",
        base.path(),
        "cow-block-size=64K",
        "rdelay=2ms",
        "cow-on-read=true",
        "cow-on-cache=true",
    ]);
    server.nbdsh_with(
        &[base.path()],
        r#"
        connections = [h, connect(), connect()]
        r = random.Random(1)
        flight = Flight(connections, 48)
        expected = bytearray(open(ARGS[0], "rb").read())
        for block in range(250):
            start = block * 64 * K
            # The whole block, or a part of it; the fills ask for bytes of the same block.
            length = r.choice([64 * K, 64 * K, 4 * K])
            for turn in range(4):
                c = r.choice(connections)
                if turn == 1:
                    # A trim of a part of a block may do nothing.
                    changes = [c.aio_zero, c.aio_trim] if length == 64 * K else [c.aio_zero]
                    change = r.choice(changes)
                    flight.add(c, change(length, start))
                elif turn == 2:
                    flight.add(c, c.aio_cache(512, start + 32 * K))
                else:
                    flight.read(c, 4096, start + r.randrange(60 * K))
            expected[start:start + length] = bytes(length)
        flight.finish()
        same(read(h), expected)
        "#,
    );
}

/// A partial write waits for the base when its block is trimmed: the write came before
/// the trim or after it, and in neither order is the base seen again.
#[test]
fn a_trim_beside_a_partial_write_does_not_let_the_base_come_back() {
    let base = Base::new(&noise(4, 250 * BLOCK));
    let server = Setup::new().below("delay").start(&[
        "file",
        base.path(),
        "cow-block-size=64K",
        "rdelay=2ms",
    ]);
    server.nbdsh(
        r#"
        connections = [h, connect(), connect()]
        flight = Flight(connections, 24)
        for block in range(250):
            start = block * 64 * K
            flight.write(connections[block % 3], noise(512, block), start + 1000)
            other = connections[(block + 1) % 3]
            change = other.aio_zero if block % 2 else other.aio_trim
            flight.add(other, change(64 * K, start))
        flight.finish()
        trimmed = 0
        for block in range(250):
            zeroes = bytearray(64 * K)
            found = h.pread(64 * K, block * 64 * K)
            if found == zeroes:
                trimmed += 1
            else:
                # Here the trim came first, over another connection.
                zeroes[1000:1512] = noise(512, block)
                same(found, zeroes, block * 64 * K)
        # Or else no write has waited while its block was trimmed.
        assert trimmed > 50, trimmed
        "#,
    );
}

/// Two read-modify-writes of one block both read the base before either has written.
#[test]
fn no_partial_write_is_lost_beside_another_of_the_same_block() {
    let base = Base::new(&noise(3, 32 * BLOCK));
    let server = Setup::new().below("delay").start(&[
        "file",
        base.path(),
        "cow-block-size=64K",
        "rdelay=2ms",
    ]);
    server.nbdsh_with(
        &[base.path()],
        r#"
        connections = [h, connect(), connect(), connect()]
        flight = Flight(connections, 32)
        expected = bytearray(open(ARGS[0], "rb").read())
        slots = [block * 128 + slot for block in range(32) for slot in range(64)]
        # Neighbours fly together: all slots of a block, over all connections.
        for number, slot in enumerate(slots):
            start = slot * 512
            data = noise(512, slot)
            flight.write(connections[number % 4], data, start)
            expected[start:start + 512] = data
        flight.finish()
        same(read(h), expected)
        "#,
    );
}

/// A write that waits for the base is older than one that is acknowledged meanwhile, and
/// must not land over it: the newer one may have been flushed, and the client of the older
/// one may have gone.
#[test]
fn a_write_that_waits_for_the_base_does_not_land_over_a_newer_one() {
    let base = Base::new(&noise(5, 64 * BLOCK));
    let files = scratch();
    let [asked, stalled] = ["asked", "stalled"].map(|name| files.path().join(name));
    fs::write(&stalled, "").expect("a file");
    // It tells what it was asked for, and then waits as long as the file is there.
    let pread = format!(
        "pread=echo $4 >>{}; while [ -e {} ]; do sleep 0.05; done; \
         dd if={} skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none",
        asked.display(),
        stalled.display(),
        base.path()
    );
    let size = format!("get_size=echo {}", 64 * BLOCK);
    let server = Setup::new().start(&[
        "eval",
        "thread_model=echo parallel",
        &size,
        &pread,
        "cow-block-size=64K",
    ]);
    server.nbdsh_with(
        &[
            base.path(),
            asked.to_str().unwrap(),
            stalled.to_str().unwrap(),
        ],
        r#"
        older, newer = [connect() for _ in range(12)], connect()
        expected = bytearray(open(ARGS[0], "rb").read())
        B = 64 * K

        def waiting():
            return open(ARGS[1]).read().count("\n") if os.path.exists(ARGS[1]) else 0

        def write(c, length, start):
            buffer = nbd.Buffer.from_bytearray(bytearray(b"o" * length))
            return buffer, c.aio_pwrite(buffer, start)

        # What the older one asks for, and what the newer one leaves of its bytes.
        requests = [
            (lambda c, start: write(c, 512, start + 1000), 1000, 512, b"o"),
            (lambda c, start: write(c, 512, start + B - 256), B - 256, 512, b"o"),
            (lambda c, start: (None, c.aio_zero(512, start + 1000)), 1000, 512, b"\0"),
        ]
        changes = [
            (lambda start: newer.pwrite(b"n" * B, start), b"n"),
            (lambda start: newer.zero(B, start), b"\0"),
            (lambda start: newer.zero(B, start, NO_HOLE), b"\0"),
            (lambda start: newer.trim(B, start), b"\0"),
        ]
        flying = []
        for request, offset, length, old in requests:
            for change, new in changes:
                start = 4 * len(flying) * B
                before = waiting()
                c = older[len(flying)]
                flying.append((c, *request(c, start)))
                while waiting() == before:
                    c.poll(10)
                change(start)
                expected[start + offset:start + offset + length] = old * length
                expected[start:start + B] = new * B
        newer.flush()
        assert not any(c.aio_command_completed(cookie) for c, _, cookie in flying), "none waited"
        os.unlink(ARGS[2])
        for c, _, cookie in flying:
            while not c.aio_command_completed(cookie):
                c.poll(-1)
        same(read(h), expected)
        "#,
    );
}
