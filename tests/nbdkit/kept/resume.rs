//! Served, ended in one way or another, and served again.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Stdio};

use super::{Disk, check_after_a_crash, text};
use crate::harness::Setup;
use crate::harness::command::{LIMIT, eventually, kill_group, spawn, wait};

const ROUND: &str = "disk.check().run(50).check().save()";

/// The model goes through all rounds: what one of them loses, the next ones miss.
fn ten_rounds(block: u64, size: u64) {
    let disk = Disk::new(size, block);
    for round in 0..10 {
        let seed = 100 * block + round;
        if round % 3 == 2 {
            disk.run_client(seed, ROUND);
        } else {
            let server = disk.serve();
            disk.client(&server, seed, ROUND);
            match round % 3 {
                0 => server.stop(),
                _ => server.interrupt(),
            }
        }
        disk.assert_sound();
    }
}

#[test]
fn ten_rounds_with_blocks_of_512() {
    ten_rounds(512, (3 << 20) + 700);
}

#[test]
fn ten_rounds_with_blocks_of_4k() {
    ten_rounds(4096, (37 << 20) + 1);
}

#[test]
fn ten_rounds_with_blocks_of_64k() {
    ten_rounds(65536, (48 << 20) + 4097);
}

/// Writes without end into places of their own, over four connections at once,
/// and notes in a second file what the disk may hold because of them.
const UNFLUSHED: &str = r#"
    disk.check().run(60)
    h.flush()
    start = disk.random.randrange(disk.size // 2)
    disk.write(start, disk.random.randbytes(100_000), FUA)
    disk.write(start + 200_000, bytes(70_001), FUA)
    disk.zero(start + 300_000, start + 400_000, FUA)
    disk.trim(start + 500_000, start + 600_000, FUA)
    disk.save()

    PLACE = 20_011
    new = bytearray(disk.bytes(0, disk.size))
    writes = []
    for at in range(0, disk.size - PLACE, PLACE):
        length = disk.random.choice([disk.random.randint(1, PLACE), disk.block])
        data = disk.random.randbytes(min(length, PLACE))
        new[at:at + len(data)] = data
        writes.append((at, data))
    open(ARGS[0] + ".new", "wb").write(new)
    disk.random.shuffle(writes)
    connections = [connect() for _ in range(4)]
    flight = Flight(connections, 16)
    print("in flight", flush=True)
    try:
        while True:
            for number, (at, data) in enumerate(writes):
                flight.write(connections[number % 4], data, at)
    except nbd.Error:
        print("gone", flush=True)
"#;

/// Every byte is one that was flushed or one that was on its way: a hole, or the
/// base showing through where something was flushed, is neither.
const OLD_OR_NEW: &str = r#"
    found = read(h)
    old = disk.bytes(0, disk.size)
    new = open(ARGS[0] + ".new", "rb").read()
    wrong = [i for i in range(disk.size) if found[i] != old[i] and found[i] != new[i]]
    assert not wrong, f"{len(wrong)} bytes from {wrong[0]} on are neither old nor new"
    os.pwrite(disk.file, found, 0)
"#;

struct Client(Child);

impl Drop for Client {
    fn drop(&mut self) {
        kill_group(&mut self.0);
        let _ = self.0.wait();
    }
}

fn what_was_flushed_survives(block: u64) {
    let disk = Disk::new((6 << 20) + 300, block);
    for round in 0..2 {
        let server = disk.serve();
        let args = disk.client_args(block + round);
        let said = tempfile::NamedTempFile::new().expect("a file for its stdout");
        let first = format!("h = connect()\n{}", super::CLIENT);
        let mut script =
            server.script_after(&first, UNFLUSHED, &args.each_ref().map(String::as_str));
        script.stdout(said.reopen().expect("that file"));
        let mut client = Client(spawn(script.stderr(Stdio::inherit())));
        let has_said = |line: &str| {
            let said = fs::read_to_string(said.path()).expect("what the client says");
            said.lines().any(|said| said == line)
        };
        let is_writing = eventually(LIMIT, || has_said("in flight"));
        assert!(is_writing, "the client did not come that far");
        server.kill();
        let ended = wait(&mut client.0, LIMIT).is_some_and(|status| status.success());
        assert!(ended && has_said("gone"), "nothing was in flight");
        check_after_a_crash(&disk.overlay());

        let server = disk.serve();
        disk.client(&server, 1, OLD_OR_NEW);
        server.stop();
        super::check(&disk.overlay());
        super::compare(&disk.overlay(), &disk.model());
    }
}

#[test]
fn what_was_flushed_survives_a_kill_with_blocks_of_512() {
    what_was_flushed_survives(512);
}

#[test]
fn what_was_flushed_survives_a_kill_with_blocks_of_4k() {
    what_was_flushed_survives(4096);
}

#[test]
fn what_was_flushed_survives_a_kill_with_blocks_of_64k() {
    what_was_flushed_survives(65536);
}

/// What was written and not flushed is lost by a kill, but not its space: no entry leads
/// to it any more.
#[test]
fn a_trim_gives_back_what_a_kill_has_left() {
    let disk = Disk::new(20 << 20, 4096);
    let taken = || 512 * fs::metadata(disk.overlay()).expect("the image").blocks();
    let server = disk.serve();
    server.nbdsh("h.pwrite(noise(8 * M, 1), 4 * M)");
    server.kill();
    let left = taken();
    assert!(left >= 8 << 20, "nothing was left but {left} bytes");

    let server = disk.serve();
    server.nbdsh("h.trim(8 * M, 4 * M); h.flush()");
    let given_back = || left.saturating_sub(taken());
    let is_back = eventually(LIMIT, || given_back() >= 7 << 20);
    assert!(is_back, "only {} bytes", given_back());
}

#[test]
fn what_reads_and_cache_requests_have_copied_is_kept() {
    for block in [4096, 65536] {
        let disk = Disk::new((20 << 20) + 5, block);
        let server = disk.serve_with(&Setup::new(), &["cow-on-read=true"]);
        let code = "disk.copies = True; disk.run(80); disk.read(0, 3 * M); disk.save()";
        disk.client(&server, 1, code);
        server.stop();
        disk.assert_sound();

        let server = disk.serve_with(&Setup::new(), &["cow-on-cache=true"]);
        let code = r#"
            for _ in range(20):
                start, end = disk.span()
                h.cache(end - start, start)
                disk.copied(start, end)
            disk.check().save()
        "#;
        disk.client(&server, 2, code);
        server.stop();
        disk.assert_sound();

        // All of it is there without the base being asked.
        let server = disk.serve();
        disk.client(&server, 3, ROUND);
        server.stop();
        disk.assert_sound();
    }
}

#[test]
fn the_block_size_is_that_of_the_image() {
    for (block, other) in [(512, "4K"), (65536, "4K"), (4096, "8K")] {
        let disk = Disk::new((5 << 20) + 100, block);
        let server = disk.serve();
        disk.client(&server, block, ROUND);
        server.stop();

        let overlay = format!("cow-overlay={}", text(&disk.overlay()));
        let plugin = ["file", disk.base.path(), &overlay];
        let server = Setup::new().start(&plugin);
        disk.client(&server, block + 1, ROUND);
        server.stop();
        disk.assert_sound();

        let size = format!("cow-block-size={other}");
        let size_of_blocks = format!("blocks of {block}");
        let plugin = [&plugin[..], &[&size]].concat();
        super::assert_refused(
            &plugin,
            &disk.overlay(),
            &[&size_of_blocks, "cow-block-size"],
        );
        disk.assert_sound();
    }
}
