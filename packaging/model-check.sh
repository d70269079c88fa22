#!/usr/bin/env bash
# Runs the parallel code under the model checker (tests/loom), then once more with
# the bugs of tests/loom/*.patch put into a copy of the tree, which the checker must
# find.
. "$(dirname -- "$0")/common.sh"
need_cargo

# Other flags make other artifacts: in a directory of their own they don't push
# out those of the normal build.
CARGO_TARGET_DIR=$(target_dir)/loom
RUSTFLAGS="${RUSTFLAGS:-} --cfg loom"
export CARGO_TARGET_DIR RUSTFLAGS

say 'Model checking'
cargo test --test loom --manifest-path "$root/Cargo.toml"

say 'Model checking a copy with known bugs: this must fail'
copy=$(mktemp -d)
trap 'rm -rf -- "$copy"' EXIT
cp -R -- "$root"/{Cargo.toml,Cargo.lock,build.rs,include,src,tests} "$copy"
# All of them together, which saves two builds: each can be seen by tests that
# the others don't touch.
for name in lost-write late-mark joined-flush; do
    patch -s -d "$copy" -p1 <"$root/tests/loom/$name.patch"
done
cargo test --test loom --no-run --manifest-path "$copy/Cargo.toml"
if found=$(cargo test --test loom --manifest-path "$copy/Cargo.toml" 2>&1); then
    die 'The model checker found none of the bugs.'
fi
must_fail() {
    local bug=$1 name
    shift
    for name in "$@"; do
        grep -qxF "test $name ... FAILED" <<<"$found" ||
            die "The model checker did not find the $bug bug by the test $name:
$found"
    done
}
must_fail lost-write a_whole_write_survives_fills a_partial_write_survives_fills
must_fail late-mark kept::a_change_that_another_request_has_made_is_safe_after_a_flush
must_fail joined-flush kept::each_of_many_flushes_covers_what_was_written_before_it
say 'It found the bugs.'
