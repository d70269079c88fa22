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

# The copies below have the same name to cargo, which then takes the older sources of
# one for those of what it has built from another.
forget_builds() { cargo clean -q -p nbdkit-cow-filter --manifest-path "$root/Cargo.toml"; }

say 'Model checking'
forget_builds
cargo test --test loom --manifest-path "$root/Cargo.toml"

copy=$(mktemp -d)
trap 'rm -rf -- "$copy"' EXIT

# Runs the checker on a copy with bugs: their names, then the tests that must fail.
must_find() {
    local bugs=$1 found name
    shift
    say "Model checking a copy with bugs ($bugs): this must fail"
    cp -R -- "$root"/{Cargo.toml,Cargo.lock,build.rs,include,src,tests} "$copy"
    for name in $bugs; do
        patch -s -F0 -d "$copy" -p1 <"$root/tests/loom/$name.patch"
    done
    forget_builds
    cargo test --test loom --no-run --manifest-path "$copy/Cargo.toml"
    if found=$(cargo test --test loom --manifest-path "$copy/Cargo.toml" 2>&1); then
        die 'The model checker found none of the bugs.'
    fi
    for name in "$@"; do
        grep -qxF "test $name ... FAILED" <<<"$found" ||
            die "The model checker did not find a bug by the test $name:
$found"
    done
}
# Seven together, which saves six builds: each is seen by tests that the others don't
# touch.
must_find 'lost-write untold-write blind-punch late-mark joined-flush late-failure unseen-flight' \
    a_whole_write_survives_fills a_partial_write_survives_fills \
    order::a_newer_whole_write_wins \
    reclaim::a_write_after_a_trim_is_not_punched_out \
    kept::a_change_that_another_request_has_made_is_safe_after_a_flush \
    kept::each_of_many_flushes_covers_what_was_written_before_it \
    kept::faults::no_flush_is_told_of_the_failure_of_one_after_a_good_one \
    limit::of_two_who_take_the_rest_one_is_refused
must_find 'lost-update stale-leaf greedy-start' \
    limit::of_two_new_overlays_one_is_written_to \
    map::a_leaf_that_serves_another_part_is_not_taken_for_the_old_one \
    writes_of_two_neighbouring_blocks_both_survive
forget_builds
say 'It found the bugs.'
