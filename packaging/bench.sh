#!/usr/bin/env bash
# Measures the filter against no filter, the C filter and qemu-nbd, and writes
# docs/performance; with QUICK=1 for a minute only, or with ONLY= a part of it, and
# into target/bench.
. "$(dirname -- "$0")/common.sh"
need_cargo
cd -- "$root"

# However this ends, nothing stays: the benchmark's own children end with it, and
# its directories, on tmpfs and on disk, have a name by which they are found.
export BENCH_SCRATCH=cow-bench.$$.
bench_pid=

# shellcheck disable=SC2317,SC2329 # called by trap
finish() {
    local status=$?
    trap '' INT TERM HUP
    trap - EXIT
    if [ -n "$bench_pid" ] && kill "$bench_pid" 2>/dev/null; then
        wait "$bench_pid" 2>/dev/null || :
    fi
    # A child that is being killed may still make a file in the first attempt.
    remove_scratch 2>/dev/null || { sleep 1 && remove_scratch; }
    exit "$status"
}
# shellcheck disable=SC2317,SC2329
remove_scratch() { rm -rf -- "/dev/shm/$BENCH_SCRATCH"* "/var/tmp/$BENCH_SCRATCH"*; }
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# Not run by cargo, which would not pass a signal on.
built=$(cargo_release bench --bench bench --no-run --message-format=json-render-diagnostics)
executable=$(sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' <<<"$built")
[ -x "$executable" ] || die 'cargo does not say where the benchmark is.'

# In the background, because a trap waits for what is in the foreground.
"$executable" &
bench_pid=$!
status=0
wait "$bench_pid" || status=$?
bench_pid=
exit "$status"
