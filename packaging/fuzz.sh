#!/usr/bin/env bash
# Feeds command lines and damaged images to the filter (tests/fuzz): fuzz.sh [SECONDS|clippy]
#
# First the inputs that are kept, in tests/fuzz/corpus, then what the fuzzer makes
# of them, for so many seconds, or until Ctrl-C or a finding. Of this time the command
# lines have a few seconds, in which all of them is reached. A finding ends it
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

# fuzz TARGET MAX_LEN SECONDS, where 0 seconds are all until Ctrl-C.
fuzz() {
    local target=$1 max_len=$2 seconds=$3 status=0 input
    local fuzzer=$work/$host/release/$target
    local corpus=$work/corpus/$target artifacts=$work/artifacts/$target log=$work/$target.log
    mkdir -p -- "$corpus" "$artifacts"
    local run=("$fuzzer" -max_len="$max_len" -max_total_time="$seconds" -timeout=20
        -rss_limit_mb=1024 -artifact_prefix="$artifacts/"
        "$corpus" "$root/tests/fuzz/corpus/$target")

    if [ "$seconds" -eq 0 ]; then
        say "Fuzzing ($target) until Ctrl-C"
        # Ctrl-C is for the fuzzer, whose status counts.
        "${run[@]}" 2>&1 | tee -i -- "$log" || status=$?
    else
        say "Fuzzing ($target) for $seconds seconds"
        "${run[@]}" >"$log" 2>&1 || status=$?
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
}

short=5
[ "$seconds" -eq 0 ] || [ "$seconds" -gt "$short" ] || short=1
fuzz parameters 200 "$short"
# 8 bytes for the disk and 48 steps of 16: see fuzz_targets/script.rs.
fuzz image 776 "$((seconds > short ? seconds - short : seconds))"
