#!/usr/bin/env bash
# Crashes the kept overlay, in memory, at every step of random requests and of moving home
# what other programs have written; or, with PART=qemu, has QEMU and guests write to an image
# between runs of the filter, and kills them. Until it is stopped or finds an error; says the
# seed then. CRASH_SEED= begins with that one.
. "$(dirname -- "$0")/common.sh"
need_cargo
cd -- "$root"
export CRASH_FOREVER=1 CRASH_SEED=${CRASH_SEED:-0}
case ${PART:-memory} in
memory)
    cargo_release test --release --test core -- \
        --exact kept::crashes::random_requests_survive_a_crash_at_every_step --nocapture
    ;;
qemu)
    cargo test --test nbdkit -- \
        --exact kept::random_qemu::whatever_qemu_did_is_gone_on_with_in_blocks_of_4k --nocapture
    ;;
*) die "PART=$PART: memory or qemu" ;;
esac
