#!/usr/bin/env bash
# Everything at once for MINUTES (3 if not set), over the release build of the library.
. "$(dirname -- "$0")/common.sh"
need_cargo
cd -- "$root"

minutes=${MINUTES:-3}
[[ $minutes =~ ^[1-9][0-9]*$ ]] || die "soak.sh: MINUTES=$minutes is no number of minutes"
export COW_SOAK_MINUTES=$minutes
exec cargo test --release --test nbdkit -- --ignored --exact --nocapture reliability::soak::soak
