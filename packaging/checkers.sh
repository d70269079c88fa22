#!/usr/bin/env bash
# Tools that look for what a test can't see: undefined behaviour in the unsafe code of the
# core (Miri), races between its threads (ThreadSanitizer), and wrong or lost memory in
# nbdkit with the library loaded (valgrind's memcheck).
#
# Miri and ThreadSanitizer are parts of the nightly toolchain. Where it can't be had, this
# says so and goes on with what there is.
. "$(dirname -- "$0")/common.sh"
need_cargo
cd -- "$root"

nightly() { cargo +nightly "$@"; }

# Nothing is installed where all is there.
have_nightly() {
    have rustup || return 1
    if nightly miri --version >/dev/null 2>&1 &&
        [ -e "$(rustc +nightly --print sysroot)/lib/rustlib/src/rust/library/Cargo.lock" ]; then
        return 0
    fi
    rustup -q component add --toolchain nightly miri rust-src ||
        rustup -q toolchain install nightly --profile minimal --component miri,rust-src
}

host=$(rustc -vV | sed -n 's/^host: //p')
target=$(target_dir)

miri() {
    say 'Miri: the core'
    # Without isolation threads see the time pass. Those that are left out go through
    # thousands of blocks over and over, which Miri takes many minutes for.
    CARGO_TARGET_DIR=$target/miri MIRIFLAGS="${MIRIFLAGS:-} -Zmiri-disable-isolation" \
        PROPTEST_CASES=4 nightly miri test --locked --lib -- \
        overlay::map:: block:: --skip a_map_equals_a_plain_vector_of_states \
        --skip threads_that_set_neighbouring_blocks_lose_none
}

thread_sanitizer() {
    say 'ThreadSanitizer: the core under many threads'
    # The standard library has to be built with it as well: the sanitizer would not see
    # what its locks do, and take for a race what they keep apart.
    CARGO_TARGET_DIR=$target/tsan RUSTFLAGS="${RUSTFLAGS:-} -Zsanitizer=thread" \
        nightly test -Zbuild-std --locked --target "$host" --test core -- races::
}

memcheck() {
    say 'memcheck: nbdkit with the library'
    cargo test --test nbdkit -- --ignored reliability::memcheck
}

if have_nightly; then
    miri
    thread_sanitizer
else
    say 'Miri and ThreadSanitizer are left out: there is no nightly toolchain, and rustup could not fetch one.'
fi
if have valgrind; then
    memcheck
else
    die 'memcheck can not be run: valgrind is missing, which make deps installs.'
fi
