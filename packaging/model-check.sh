#!/usr/bin/env bash
# Runs the parallel code under the model checker (tests/loom), then once more with
# the lost-write bug put into a copy of the tree, which the checker must find.
. "$(dirname -- "$0")/common.sh"
need_cargo

# Other flags make other artifacts: in a directory of their own they don't push
# out those of the normal build.
CARGO_TARGET_DIR=$(target_dir)/loom
RUSTFLAGS="${RUSTFLAGS:-} --cfg loom"
export CARGO_TARGET_DIR RUSTFLAGS

say 'Model checking'
cargo test --test loom --manifest-path "$root/Cargo.toml"

say 'Model checking a copy with the lost-write bug: this must fail'
copy=$(mktemp -d)
trap 'rm -rf -- "$copy"' EXIT
cp -R -- "$root"/{Cargo.toml,Cargo.lock,build.rs,include,src,tests} "$copy"
patch -s -d "$copy" -p1 <"$root/tests/loom/lost-write.patch"
cargo test --test loom --no-run --manifest-path "$copy/Cargo.toml"
if found=$(cargo test --test loom --manifest-path "$copy/Cargo.toml" 2>&1); then
    die 'The model checker did not find the lost-write bug.'
fi
for name in a_whole_write_survives_fills a_partial_write_survives_fills; do
    grep -qxF "test $name ... FAILED" <<<"$found" ||
        die "The model checker failed, but not in the test $name:
$found"
done
say 'It found the bug.'
