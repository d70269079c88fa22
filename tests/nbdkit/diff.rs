//! What was written, as a qcow2 file over the base: the recipe of the manual page.

use std::fs;

use crate::harness::{Base, Server, noise, run, run_in, scratch};

/// The commands of qemu-img below a heading of the manual page, word for word.
fn commands(heading: &str) -> Vec<String> {
    let manual = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/nbdkit-cow-filter.pod");
    let manual = fs::read_to_string(manual).expect("the manual page");
    let heading = format!("=head2 {heading}");
    manual
        .lines()
        .skip_while(|line| *line != heading)
        .skip(1)
        .take_while(|line| !line.starts_with("=head"))
        .filter_map(|line| line.strip_prefix(' '))
        .filter(|line| line.starts_with("qemu-img "))
        .map(str::to_string)
        .collect()
}

fn words(command: &str) -> Vec<&str> {
    command.split(' ').collect()
}

/// The example of a kept overlay, on files with the names that it has.
#[test]
fn the_example_of_a_kept_overlay_does_what_it_says() {
    let files = scratch();
    let disk = files.path().join("disk.img");
    let mut expected = noise(1, 8 << 20);
    fs::write(&disk, &expected).expect("the base");
    let (file, kept) = (
        format!("file={}", disk.display()),
        format!("cow-overlay={}", files.path().join("diff.qcow2").display()),
    );
    for (round, &byte) in b"01".iter().enumerate() {
        let start = ((round * 2) << 20) + 77;
        expected[start..start + 100_000].fill(byte);
        let server = Server::start(&["file", &file, &kept]);
        server.nbdsh(&format!("h.pwrite(b'{round}' * 100_000, {start})"));
        server.stop();
    }
    let commands = commands("Keep what was written");
    let [info, convert, commit] = &commands[..] else {
        panic!("{commands:?}");
    };
    let said = run_in(files.path(), &words(info));
    assert!(said.contains("backing file: disk.img"), "{said}");
    run_in(files.path(), &words(convert));
    let changed = fs::read(files.path().join("changed.img"));
    assert!(changed.expect("what convert made") == expected);
    assert!(fs::read(&disk).expect("the base") != expected);
    run_in(files.path(), &words(commit));
    assert!(fs::read(&disk).expect("the base") == expected);
}

#[test]
fn the_recipe_for_a_diff_gives_the_disk_as_it_was_written() {
    const SIZE: u64 = 32 << 20;
    // Data, a hole, data.
    let content = noise(1, 12 << 20);
    let base = Base::sparse(SIZE, &[(0, &content[..4 << 20]), (8 << 20, &content)]);
    let files = scratch();
    let expected = files.path().join("expected.img");
    let server = Server::start(&["file", base.path()]);
    server.nbdsh_with(
        &[base.path(), expected.to_str().unwrap()],
        r#"
        expected = bytearray(open(ARGS[0], "rb").read())
        for start, data in [(1_000_001, noise(300_000, 1)), (5 * M, noise(5000, 2)),
                            (11 * M, bytes(64 * K)), (32 * M - 3, b"end")]:
            h.pwrite(data, start)
            expected[start:start + len(data)] = data
        for clear, start, length in [(h.trim, 10 * M, M), (h.zero, 15 * M + 77, 100_000)]:
            clear(length, start)
            expected[start:start + length] = bytes(length)
        open(ARGS[1], "wb").write(expected)
        "#,
    );

    let recipe = commands("How to get the differences of a temporary overlay");
    assert_eq!(recipe.len(), 2, "{recipe:?}");
    for command in recipe {
        let command = command.replace("SOCK", server.socket().to_str().unwrap());
        run_in(base.directory(), &words(&command));
    }
    server.stop();

    let expected = expected.to_str().unwrap();
    let diff = base.directory().join("diff.qcow2");
    let compare = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw"];
    let said = run(&[&compare[..], &[diff.to_str().unwrap(), expected]].concat());
    assert!(said.contains("Images are identical"), "{said}");
    run(&["qemu-img", "check", diff.to_str().unwrap()]);
    // A diff, not a copy of the disk.
    let size = fs::metadata(&diff).unwrap().len();
    assert!(
        size < 4 << 20,
        "{size} bytes tell what 1 MB of writes changed"
    );
}
