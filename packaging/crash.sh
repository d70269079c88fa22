#!/usr/bin/env bash
# Crashes the kept overlay at every step of random requests, in memory, until it is
# stopped or finds an error; says the seed then. CRASH_SEED= begins with that one.
. "$(dirname -- "$0")/common.sh"
need_cargo
cd -- "$root"
export CRASH_FOREVER=1 CRASH_SEED=${CRASH_SEED:-0}
cargo_release test --release --test core -- \
    --exact kept::crashes::random_requests_survive_a_crash_at_every_step --nocapture
