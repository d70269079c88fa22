# shellcheck shell=bash
# Read by the other scripts here: where things are, and how to say what is wrong.

set -euo pipefail

# mke2fs, losetup and the like lie in sbin, which is not on every user's PATH.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# Where it is set, cd may go to another directory, and prints which.
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034 # for the scripts that read this one
manual_source=$root/docs/nbdkit-cow-filter.pod

say() { printf '%s\n' "$*"; }
die() {
    printf '%s\n' "$*" >&2
    exit 1
}
have() { command -v -- "$1" >/dev/null 2>&1; }

# rustup's own directory counts, also in a shell that was started before it was
# added to PATH.
have cargo || PATH=$PATH:${CARGO_HOME:-${HOME:-}/.cargo}/bin

need_cargo() {
    have cargo || die 'The Rust toolchain is missing: install cargo, then run make again.'
}

# Puts a program that cargo installs on PATH: need_cargo_program NAME VERSION [OPTION...]
need_cargo_program() {
    local name=$1 version=$2 tools
    tools=$(target_dir)/tools
    shift 2
    PATH=$PATH:$tools/bin
    ! have "$name" || return 0
    say "Installing $name $version in $tools"
    # Not optimised, which would take far longer than all that it does here. Not from the
    # tree, where settings may forbid the network.
    (cd / && cargo install -q --debug --locked --version "$version" --root "$tools" "$@" "$name") ||
        die "$name could not be installed: without a network, put it on PATH."
}
# Without its own xz, which is a library in C: it takes the command.
need_cargo_deb() { need_cargo_program cargo-deb 3.6.3 --no-default-features; }

# As it stands in Cargo.toml.
version() { sed -n '/^version/ { s/.*"\(.*\)".*/\1/p; q }' "$root/Cargo.toml"; }

# Where cargo builds. Asked of cargo, because a configuration file can move it;
# not required to work, because "sudo make install" often has no cargo.
target_dir() {
    local dir=
    if [ -z "${CARGO_TARGET_DIR:-}" ] && have cargo; then
        dir=$(cargo metadata --offline --no-deps --format-version 1 \
            --manifest-path "$root/Cargo.toml" 2>/dev/null |
            sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p') || dir=
    fi
    [ -n "$dir" ] || dir=${CARGO_TARGET_DIR:-target}
    case $dir in
    /*) printf '%s\n' "$dir" ;;
    *) printf '%s\n' "$root/$dir" ;;
    esac
}

# Runs cargo so that no path of this machine gets into what it builds: the same sources
# give the same bytes in every directory. For all that builds for release, because cargo
# builds everything again where the flags are others.
#
# The user's own flags stay. Flags for a "target" in a configuration file hide ours.
cargo_release() {
    local flags=() config
    local remap=(
        "--remap-path-prefix=$root=/usr/src/nbdkit-cow-filter"
        "--remap-path-prefix=${CARGO_HOME:-${HOME:-}/.cargo}=/usr/src/cargo"
    )
    if [ "${CARGO_ENCODED_RUSTFLAGS+set}" ]; then
        mapfile -t -d $'\x1f' flags < <(printf '%s' "$CARGO_ENCODED_RUSTFLAGS")
    elif [ "${RUSTFLAGS+set}" ]; then
        read -ra flags <<<"${RUSTFLAGS//$'\n'/ }"
    else
        # The environment would hide the flags of the configuration files.
        remap=("${remap[@]//\\/\\\\}")
        printf -v config '"%s",' "${remap[@]//\"/\\\"}"
        cargo --config "build.rustflags=[$config]" "$@"
        return
    fi
    # Cargo looks at this one first, and here a flag can have a space in it.
    flags+=("${remap[@]}")
    local IFS=$'\x1f'
    CARGO_ENCODED_RUSTFLAGS="${flags[*]}" cargo "$@"
}

# The library to serve or install; LIBRARY= overrides it.
library() {
    if [ -n "${LIBRARY:-}" ]; then
        realpath -m -- "$LIBRARY"
    else
        printf '%s\n' "$(target_dir)${CARGO_BUILD_TARGET:+/$CARGO_BUILD_TARGET}/release/libnbdkit_cow_filter.so"
    fi
}

# The name by which nbdkit finds the filter; NAME= overrides it. It becomes a part of
# file names, and of an option that is to be typed.
filter_name=${NAME:-cow}
[[ $filter_name =~ ^[A-Za-z0-9][A-Za-z0-9-]*$ ]] ||
    die "NAME=$filter_name: the name of a filter has letters, digits and hyphens only, and no hyphen in front."

manual() { printf '%s\n' "$(target_dir)/man/nbdkit-$filter_name-filter.1"; }
