#!/usr/bin/env bash
# Feeds damaged images to the filter (tests/fuzz): fuzz.sh [SECONDS|clippy]
#
# First the inputs that are kept, in tests/fuzz/corpus, then what the fuzzer makes
# of them, for so many seconds, or until Ctrl-C or a finding. A finding ends it
# with status 1 and the name of the file that has the input. Inputs that reach
# something new are kept where cargo builds, for the next run, not in the tree.
#
# libFuzzer needs the compiler to count what is reached. These flags have a stable
# one do that: neither cargo-fuzz nor a nightly toolchain is needed. The crate is
# laid out as cargo-fuzz wants it all the same.
#
# GNU ld links it on every system. The tables name every function, and GNU ld keeps
# what they name, so it wants each symbol of nbdkit's that the code asks for; the linker
# that rustup brings drops both, and a build that fails with Debian's own compiler would
# pass.
. "$(dirname -- "$0")/common.sh"
need_cargo

target=image
# 8 bytes for the disk and 48 steps of 16: see fuzz_targets/script.rs.
max_len=776

work=$(target_dir)/fuzz
export CARGO_TARGET_DIR=$work
flags=(
    --cfg fuzzing -Cdebug-assertions -Coverflow-checks -Ccodegen-units=1
    -Cpasses=sancov-module
    -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares
    -Clink-arg=-fuse-ld=bfd
)
export RUSTFLAGS="${RUSTFLAGS:-} ${flags[*]}"
# With a target named, the flags are not for build scripts, which have no fuzzer.
host=$(rustc -vV | sed -n 's/^host: //p')
cargo=(--manifest-path "$root/tests/fuzz/Cargo.toml" --release --locked --target "$host")

# With the flags of the build, so that libFuzzer is not compiled twice.
if [ "${1:-}" = clippy ]; then
    exec cargo clippy "${cargo[@]}" -- -D warnings
fi

seconds=${1:-0}
[[ $seconds =~ ^[0-9]+$ ]] || die "fuzz.sh: '$seconds' is no number of seconds"

cargo build "${cargo[@]}"
fuzzer=$work/$host/release/$target
corpus=$work/corpus/$target
artifacts=$work/artifacts/$target
log=$work/$target.log
mkdir -p -- "$corpus" "$artifacts"

run() {
    "$fuzzer" -max_len="$max_len" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=1024 \
        -artifact_prefix="$artifacts/" "$corpus" "$root/tests/fuzz/corpus/$target" 2>&1
}

status=0
if [ "$seconds" -eq 0 ]; then
    say 'Fuzzing until Ctrl-C'
    # Ctrl-C is for the fuzzer, whose status counts.
    run | tee -i -- "$log" || status=$?
else
    say "Fuzzing for $seconds seconds"
    run >"$log" || status=$?
fi

# 72: libFuzzer was interrupted.
case $status in
0 | 72) grep -a '^Done ' "$log" || : ;;
*)
    [ "$seconds" -eq 0 ] || tail -n 60 -- "$log"
    input=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
    die "The fuzzer found something${input:+, with the input $input
Once more with that input: $fuzzer $input}"
    ;;
esac
