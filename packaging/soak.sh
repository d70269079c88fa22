#!/usr/bin/env bash
# Everything at once for MINUTES (3 if not set), over the release build of the library.
# SEED repeats the rounds of a run: what it has printed, SEED or SEED/ROUND.
. "$(dirname -- "$0")/common.sh"
need_cargo
cd -- "$root"

minutes=${MINUTES:-3}
[[ $minutes =~ ^[1-9][0-9]*$ ]] || die "soak.sh: MINUTES=$minutes is no number of minutes"
export COW_SOAK_MINUTES=$minutes
if [[ -n ${SEED:-} ]]; then
    [[ $SEED =~ ^[0-9]+(/[0-9]+)?$ ]] || die "soak.sh: SEED=$SEED is neither SEED nor SEED/ROUND"
    export COW_SOAK_SEED=$SEED
fi
exec cargo test --release --test nbdkit -- --ignored --exact --nocapture reliability::soak::soak
