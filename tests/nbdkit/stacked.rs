//! Other filters around ours, and plugins that fail.

use std::fs;

use crate::harness::{Base, Server, Setup, noise, run, scratch};

#[test]
fn a_slow_base_changes_nothing() {
    let base = Base::new(&noise(1, 500_000));
    let server = Setup::new()
        .below("delay")
        .start(&["file", base.path(), "rdelay=2ms"]);
    server.nbdsh("fly_together(neighbours([h, connect()], read(h), 12, 5), 40)");
}

#[test]
fn a_slow_overlay_changes_nothing() {
    let base = Base::new(&noise(2, 500_000));
    let server = Setup::new()
        .above("delay")
        .start(&["file", base.path(), "wdelay=2ms"]);
    server.nbdsh("fly_together(neighbours([h, connect()], read(h), 12, 5), 40)");
}

#[test]
fn a_compressed_base_can_be_written() {
    let files = scratch();
    let raw = files.path().join("disk");
    let mut content = noise(3, 600_000);
    content[100_000..400_000].fill(0);
    fs::write(&raw, &content).unwrap();
    run(&["xz", "--keep", "--block-size=65536", raw.to_str().unwrap()]);
    let base = Base::make(|path| {
        fs::copy(raw.with_extension("xz"), path).expect("the compressed disk");
    });
    let server = Setup::new().below("xz").start(&["file", base.path()]);
    server.nbdsh_with(
        &[raw.to_str().unwrap()],
        r#"
        same(read(h), open(ARGS[0], "rb").read())
        Model([h, connect()], read(h), 1).run(150).check()
        "#,
    );
}

#[test]
fn a_base_that_hides_its_extents_can_be_written() {
    let base = Base::new(&noise(4, 300_001));
    let server = Setup::new()
        .below("noextents")
        .start(&["file", base.path()]);
    server.nbdsh("Model([h, connect()], read(h), 1).run(150).check()");
}

/// The usual way to change one file inside a disk image: ext2 opens the disk by
/// itself, and writes through ours.
#[test]
fn a_file_in_a_disk_image_can_be_written_through_the_ext2_filter() {
    let files = scratch();
    let content = files.path().join("content");
    fs::write(&content, noise(9, 300_000)).unwrap();
    let base = Base::make(|path| {
        let disk = path.to_str().unwrap();
        fs::File::create(path).unwrap().set_len(8 << 20).unwrap();
        run(&["mkfs.ext2", "-q", "-F", disk]);
        let write = format!("write {} content", content.display());
        run(&["debugfs", "-w", "-R", &write, disk]);
    });
    let server = Setup::new()
        .above("ext2")
        .start(&["file", base.path(), "ext2file=/content"]);
    server.nbdsh_with(
        &[content.to_str().unwrap()],
        r#"
        expected = bytearray(open(ARGS[0], "rb").read())
        same(read(h), expected)
        h.pwrite(b"changed", 99_999)
        expected[99_999:100_006] = b"changed"
        same(read(h), expected)
        "#,
    );
}

#[test]
fn a_base_that_takes_one_request_at_a_time_can_be_written() {
    let base = Base::new(&noise(10, 500_000));
    let server =
        Setup::new()
            .below("noparallel")
            .start(&["file", base.path(), "serialize=requests"]);
    server.nbdsh("fly_together(neighbours([h, connect()], read(h), 8, 5), 60)");
}

#[test]
fn a_base_of_another_size_below_a_filter_can_be_written() {
    let base = Base::new(&noise(11, 100_001));
    let server = Setup::new().above("offset").below("truncate").start(&[
        "file",
        base.path(),
        "round-up=512",
        "offset=1000",
    ]);
    server.nbdsh_with(
        &[base.path()],
        r#"
        base = open(ARGS[0], "rb").read()[1000:]
        size = (100_001 + 511) // 512 * 512 - 1000
        assert h.get_size() == size
        same(read(h), base + bytes(size - len(base)))
        Model([h, connect()], read(h), 1).run(150).check()
        "#,
    );
}

/// Sets up a base that fails as long as a file exists; the code finds
/// `fail()` and `heal()`, the content of the `base` and the `code` of the error.
fn failing_base(error: &str, parameters: &[&str], code: &str) {
    let base = Base::new(&noise(6, 1 << 20));
    let files = scratch();
    let switch = files.path().join("fail");
    let fail_while = format!("error-pread-file={}", switch.display());
    let kind = format!("error-pread={error}");
    let plugin = [
        "file",
        base.path(),
        &kind,
        "error-pread-rate=100%",
        &fail_while,
    ];
    let server = Setup::new()
        .below("error")
        .start(&[&plugin, parameters].concat());
    server.nbdsh_after(
        "fail = lambda: open(ARGS[0], 'w').close()\n\
         heal = lambda: os.unlink(ARGS[0])\n\
         base = open(ARGS[1], 'rb').read()\n\
         code = ARGS[2]\n",
        &[switch.to_str().unwrap(), base.path(), error],
        code,
    );
}

#[test]
fn a_read_that_fails_in_the_base_fails_with_its_errno_and_works_later() {
    for error in ["EIO", "ENOMEM"] {
        failing_base(
            error,
            &[],
            r#"
            fail()
            refused(code, h.pread, 4096, 8192)
            heal()
            same(h.pread(4096, 8192), base[8192:12288])
            same(read(h), base)
            "#,
        );
    }
}

#[test]
fn a_partial_write_whose_base_fails_changes_nothing_and_works_later() {
    for error in ["EIO", "ENOMEM"] {
        failing_base(
            error,
            &["cow-block-size=64K"],
            r#"
            before = extents(h)
            fail()
            refused(code, h.pwrite, b"x" * 512, 70_000)
            heal()
            same(read(h), base)
            assert extents(h) == before
            h.pwrite(b"x" * 512, 70_000)
            same(read(h), base[:70_000] + b"x" * 512 + base[70_512:])
            "#,
        );
    }
}

#[test]
fn a_partial_zero_whose_base_fails_changes_nothing_and_works_later() {
    failing_base(
        "EIO",
        &["cow-block-size=64K"],
        r#"
        fail()
        refused(code, h.zero, 512, 70_000)
        heal()
        same(read(h), base)
        h.zero(512, 70_000)
        expected = bytearray(base)
        expected[70_000:70_512] = bytes(512)
        same(read(h), expected)
        "#,
    );
}

#[test]
fn a_fill_whose_base_fails_leaves_the_block_as_it_was() {
    failing_base(
        "EIO",
        &[
            "cow-block-size=64K",
            "cow-on-read=true",
            "cow-on-cache=true",
        ],
        r#"
        fail()
        refused(code, h.pread, 512, 70_000)
        # What could not be copied is only prefetched, and that is no error here.
        h.cache(512, 70_000)
        heal()
        same(read(h), base)
        # By now everything was copied, and the base is not needed any more.
        fail()
        same(read(h), base)
        "#,
    );
}

#[test]
fn what_is_in_the_overlay_needs_no_base() {
    failing_base(
        "EIO",
        &["cow-block-size=64K"],
        r#"
        fail()
        expected = bytearray(base)
        # Whole blocks: nothing of the base is left in them.
        h.pwrite(noise(128 * K, 1), 64 * K)
        h.trim(64 * K, 256 * K)
        h.zero(64 * K, 384 * K)
        expected[64 * K:192 * K] = noise(128 * K, 1)
        expected[256 * K:320 * K] = bytes(64 * K)
        expected[384 * K:448 * K] = bytes(64 * K)
        # Parts of blocks that the overlay holds.
        for start in [70_000, 260 * K, 390 * K]:
            h.pwrite(b"part", start)
            expected[start:start + 4] = b"part"
        for start in [64 * K, 128 * K, 256 * K, 384 * K]:
            same(h.pread(64 * K, start), expected[start:start + 64 * K])
        refused(code, h.pread, 512, 0)
        heal()
        same(read(h), expected)
        "#,
    );
}

#[test]
fn the_overlay_survives_requests_that_fail_in_flight() {
    let base = Base::new(&noise(7, 1 << 20));
    // One in five reads of the base fails; the same client gets on with the rest.
    let server = Setup::new().below("error").start(&[
        "file",
        base.path(),
        "cow-block-size=64K",
        "error-pread=EIO",
        "error-pread-rate=20%",
    ]);
    server.nbdsh_with(
        &[base.path()],
        r#"
        expected = bytearray(open(ARGS[0], "rb").read())

        def insist(request, *args):
            while True:
                try:
                    return request(*args)
                except nbd.Error as error:
                    assert error.errno == "EIO", error

        r = random.Random(1)
        for _ in range(300):
            start = r.randrange(M - 5000)
            data = r.randbytes(r.randint(1, 5000))
            insist(h.pwrite, data, start)
            expected[start:start + len(data)] = data
        for start in range(0, M, 64 * K):
            same(insist(h.pread, 64 * K, start), expected[start:start + 64 * K], start)
        "#,
    );
}

fn thread_model(parameter: &str) -> String {
    let server = Setup::new()
        .option("-v")
        .start(&["null", "size=1M", parameter]);
    let said = server.stderr();
    let line = said
        .lines()
        .find(|line| line.contains("using thread model"))
        .unwrap_or_else(|| panic!("no thread model in {said}"));
    line.rsplit(' ').next().unwrap().to_string()
}

#[test]
fn requests_run_in_parallel_unless_cow_serialize_says_no() {
    assert_eq!(thread_model("cow-serialize=false"), "parallel");
    assert_eq!(thread_model("cow-serialize=true"), "serialize_all_requests");
}

#[test]
fn serialized_requests_agree_with_models() {
    let base = Base::new(&noise(8, 500_000));
    let server = Server::start(&["file", base.path(), "cow-serialize=true"]);
    server.nbdsh("fly_together(neighbours([h, connect()], read(h), 8, 5), 60)");
}

/// A trim must neither copy a block, which takes space, nor need the base for it.
#[test]
fn a_trim_of_a_part_of_a_block_asks_nothing_of_the_base_and_takes_no_space() {
    let base = Base::new(&noise(7, 8 << 20));
    let switch = base.directory().join("fail");
    let switch_name = format!("error-pread-file={}", switch.display());
    let server = Setup::new().below("error").start(&[
        "file",
        base.path(),
        "error-pread=EIO",
        "error-pread-rate=100%",
        &switch_name,
        "cow-block-size=64K",
    ]);
    fs::write(&switch, "").expect("the switch");
    server.nbdsh("for start in range(0, 8 * M, 4 * K): h.trim(4 * K, start)");
    assert_eq!(server.overlay_bytes(), 0);
    fs::remove_file(&switch).expect("the switch");
    server.nbdsh_with(&[base.path()], "same(read(h), open(ARGS[0], 'rb').read())");
}
