//! What was written, as a qcow2 file over the base: the recipe of the manual page.

use std::fs;
use std::path::Path;

use crate::harness::{Base, Server, noise, run, run_in, scratch};

/// The commands of the manual page, word for word, with the socket in its place.
fn recipe(socket: &Path) -> Vec<String> {
    let manual = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/nbdkit-cow-filter.pod");
    let manual = fs::read_to_string(manual).expect("the manual page");
    manual
        .lines()
        .filter_map(|line| line.strip_prefix(' '))
        .filter(|line| line.starts_with("qemu-img "))
        .map(|line| line.replace("SOCK", socket.to_str().unwrap()))
        .collect()
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

    let recipe = recipe(&server.socket());
    assert_eq!(recipe.len(), 2, "{recipe:?}");
    for words in recipe {
        let words: Vec<_> = words.split(' ').collect();
        run_in(base.directory(), &words);
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
