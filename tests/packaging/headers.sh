#!/usr/bin/env bash
# Tests that a build ends with a sentence where nbdkit's header is none that is known: the
# build script of this machine, with changed copies of the header of this machine.
. "$(dirname -- "$0")/../../packaging/common.sh"
need_cargo

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT

# The build script that cargo has made, which cargo itself would follow by a build of all.
messages=$(cargo build -q --manifest-path "$root/Cargo.toml" --message-format=json-render-diagnostics)
script=$(grep -F "\"manifest_path\":\"$root/Cargo.toml\"" <<<"$messages" |
    sed -n 's/.*"kind":\["custom-build"\].*"filenames":\["\([^"]*\)".*/\1/p')
[ -x "$script" ] || die 'cargo does not say where the build script is.'

include=$(pkg-config --variable=includedir nbdkit)
version=$(pkg-config --modversion nbdkit)
filter_version=$(version)

fail() { die "FAILED, $case_name: $*"; }

# Copies the header and changes it as sed does with the arguments.
header() {
    case_name=$1
    shift
    rm -rf -- "$work/include" "$work/out"
    mkdir -- "$work/include" "$work/out"
    cp -- "$include"/nbdkit-{common,filter,version}.h "$work/include/"
    [ $# -gt 0 ] || return 0
    sed -i "$@" -- "$work/include"/*.h
    ! cmp -s -- "$include/nbdkit-filter.h" "$work/include/nbdkit-filter.h" ||
        ! cmp -s -- "$include/nbdkit-common.h" "$work/include/nbdkit-common.h" ||
        fail 'the header has not changed'
}
# What the build script says to cargo.
said() {
    cd -- "$root"
    CARGO_MANIFEST_DIR=$root OUT_DIR=$work/out NBDKIT_CFLAGS=-I$work/include \
        "$script" >"$work/said" 2>"$work/stderr" || fail "$(cat -- "$work/stderr")"
}
says() { grep -qxF -- "$1" "$work/said" || fail "it does not say: $1
but: $(cat -- "$work/said")"; }
says_not() { ! grep -F -- "$1" "$work/said" || fail "it says that"; }

refused() {
    said
    says "cargo::error=<nbdkit-filter.h> of nbdkit $version is none of those that nbdkit-cow-filter $filter_version knows: $1. Use another version of this filter, or of nbdkit: 1.32 to 1.48 are known."
    says_not rustc-cfg
    [ ! -e "$work/out/nbdkit.rs" ] || fail 'it has made declarations'
}
accepted() {
    said
    says_not cargo::error
    says "cargo::rustc-env=NBDKIT_VERSION=$version"
    [ -s "$work/out/nbdkit.rs" ] || fail 'it has made no declarations'
}
# A part of a C struct, up to the semicolon.
member='/(\*NAME)/,/;/'

header 'the header as it is'
accepted

header 'a header without dump_plugin' -e '/(\*dump_plugin)/d' -e '1i // changed'
accepted
says_not 'cargo::rustc-cfg=nbdkit_dump_plugin'

header 'a header with dump_plugin' -e '/(\*dump_plugin)/d' \
    -e '/^struct nbdkit_filter {/a void (*dump_plugin) (void);'
accepted
says 'cargo::rustc-cfg=nbdkit_dump_plugin'

header 'thread_model as in 1.32' -e 's/(\*thread_model) (.*)/(*thread_model) (void)/' -e '1i // changed'
accepted

header 'thread_model as in 1.48' -e 's/(\*thread_model) (.*)/(*thread_model) (int model)/' -e '1i // changed'
accepted

header 'another call for the layer below' '/^struct nbdkit_next_ops {/a int (*copy) (void);'
accepted

header 'a new request' '/^struct nbdkit_filter {/a int (*copy) (nbdkit_next *next, void *handle);'
refused 'nbdkit_filter.copy is new'

header 'a member that is no callback' '/^struct nbdkit_filter {/a int block;'
refused 'nbdkit_filter.block is new'

header 'two new requests' '/^struct nbdkit_filter {/a int (*a) (void); int (*b) (void);'
refused 'nbdkit_filter.a is new (the first of 2 differences)'

header 'a new flag' '/define NBDKIT_FLAG_FUA/a #define NBDKIT_FLAG_COPY 64'
refused 'NBDKIT_FLAG_COPY is new'

header 'a new flag with a cast' '/define NBDKIT_FLAG_FUA/a #define NBDKIT_FLAG_COPY ((uint32_t) 64)'
refused 'NBDKIT_FLAG_COPY is new'

header 'another API' 's/\(define NBDKIT_FILTER_API_VERSION\) .*/\1 7/'
refused 'NBDKIT_FILTER_API_VERSION is 7, not 6'

# As in nbdkit 1.28.
header 'no block sizes' "${member/NAME/block_size}d"
refused 'nbdkit_filter.block_size is missing (the first of 2 differences)'

header 'longer zeroes' "/^struct nbdkit_filter {/,/^}/ { ${member/NAME/zero} s/uint32_t count/uint64_t count/ }"
refused 'nbdkit_filter.zero is fn(*mut nbdkit_next, *mut c_void, u64, u64, u32, *mut c_int) -> c_int, not fn(*mut nbdkit_next, *mut c_void, u32, u64, u32, *mut c_int) -> c_int'

header 'a read that returns nothing' "/^struct nbdkit_next_ops {/,/^}/ s/int (\*pread)/void (*pread)/"
refused 'nbdkit_next_ops.pread is fn(*mut nbdkit_next, *mut c_void, u32, u64, u32, *mut c_int), not fn(*mut nbdkit_next, *mut c_void, u32, u64, u32, *mut c_int) -> c_int'

header 'another function' 's/nbdkit_extents_free/nbdkit_extents_drop/'
refused 'nbdkit_extents_free is missing'

header 'no header'
rm -- "$work/include"/*
said
grep -q '^cargo::error=.*nbdkit-plugin-dev' "$work/said" ||
    { [ "$include" = /usr/include ] && grep -q "NBDKIT_VERSION=$version" "$work/said"; } ||
    fail "it says: $(cat -- "$work/said")"

say 'The test of the headers passed.'
