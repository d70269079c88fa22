#!/usr/bin/env bash
# Installs what is missing: deps.sh [build|run|check|bench|package|roots]
#
# build: to build the filter; run: also for the demo; check: also for the tests;
# bench: for the benchmark, which needs little of what the tests do; package: to make
# and test packages; roots: to make systems of other versions of Debian.
# Without an argument as check, but does not insist on a Rust toolchain (for
# "sudo make deps", where the toolchain is another user's).
#
# For the tests it also has cargo fetch what is built only in their course, so that
# a network that is out of reach ends them before they begin. nginx, a second QEMU and
# a guest are fetched, not installed.
#
# When nothing is missing it asks dpkg and cargo and ends: no network, no root.
. "$(dirname -- "$0")/common.sh"

part=${1:-check}
asked_for=
if [ $# -gt 0 ]; then
    need_cargo
else
    asked_for=yes
    have cargo || say 'The Rust toolchain is missing: install cargo before you build.'
fi

# Debian's package; the part that needs it; how to see on another system that it
# is there: a command, or "function argument". "-" where another line covers it.
table() {
    cat <<'TABLE'
make               build  make
gcc                build  cc
g++                check  c++
libc6-dev          build  -
ca-certificates    build  -
pkg-config         build  pkg-config
libclang-dev       build  have_libclang
nbdkit             build  nbdkit
nbdkit-plugin-dev  build  have_header nbdkit
perl               build  pod2man
perl               build  podchecker
e2fsprogs          run    mke2fs
e2fsprogs          run    debugfs
qemu-utils         run    qemu-img
qemu-utils         run    qemu-io
libnbd-bin         run    nbdinfo
libnbd-bin         run    nbdcopy
libnbd-bin         check  nbdfuse
python3            check  python3
python3-libnbd     check  have_module nbd
fio                check  fio
fio                bench  fio
patch              check  patch
fuse3              check  fusermount3
xfsprogs           check  mkfs.xfs
btrfs-progs        check  mkfs.btrfs
util-linux         check  losetup
util-linux         check  unshare
util-linux         check  nsenter
iproute2           check  ip
nbdkit             check  have_plugin curl
nbdkit             check  have_plugin floppy
nbdkit-plugin-python check have_plugin python
mount              check  mount
strace             check  strace
procps             check  pgrep
man-db             check  mandb
xz-utils           check  xz
git                check  git
nginx              check  nginx
shellcheck         check  shellcheck
qemu-utils         bench  qemu-nbd
libnbd-bin         bench  nbdcopy
valgrind           bench  valgrind
valgrind           check  valgrind
nginx              bench  nginx
git                package  git
xz-utils           package  xz
python3            package  python3
binutils           package  readelf
rpm                package  rpmbuild
elfutils           package  eu-strip
rpm2cpio           package  rpm2cpio
cpio               package  cpio
rpmlint            package  rpmlint
qemu-utils         package  qemu-io
man-db             package  man
dpkg-dev           package  dpkg-shlibdeps
lintian            package  lintian
libnbd-bin         package  nbdcopy
git                roots  git
xz-utils           roots  xz
tar                roots  tar
util-linux         roots  unshare
debootstrap        roots  debootstrap
TABLE
}

# Columns of the lines that this part needs.
wanted() {
    case $part in
    build) table | grep -E ' build ' ;;
    run) table | grep -E ' (build|run) ' ;;
    check) table | grep -E ' (build|run|check) ' ;;
    bench | package | roots) table | grep -E " (build|$part) " ;;
    esac
}

have_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] || [[ $(ldconfig -p 2>/dev/null) =~ libclang[-.] ]]
}
have_header() { have pkg-config && pkg-config --exists "$1"; }
have_module() {
    local python
    for python in python3 /usr/bin/python3; do
        "$python" -c "import $1" 2>/dev/null && return 0
    done
    return 1
}

have_plugin() { nbdkit "$1" --version >/dev/null 2>&1; }

list_only() {
    local package test argument what found list='' status=0
    while read -r package _ test argument; do
        case $test in
        -) continue ;;
        have_libclang) what='libclang, the library' ;;
        have_header) what="the file $argument.pc, for pkg-config, and the headers" ;;
        have_module) what="the Python module $argument" ;;
        have_plugin) what="the $argument plugin of nbdkit" ;;
        *) what=$test ;;
        esac
        case $test in
        have_*) ;;
        *) argument=$test test=have ;;
        esac
        if "$test" "$argument"; then
            found=found
        else
            found=MISSING
            status=1
        fi
        printf -v list '%s  %-8s %-18s %s\n' "$list" "$found" "$package" "$what"
    done < <(wanted)
    if [ "$status" -ne 0 ] || [ "$asked_for" ]; then
        say 'There is no apt-get here. What is needed (by the names that Debian uses):'
        printf '%s' "$list"
    fi
    return "$status"
}

# Runs a command up to three times, for a mirror that is out of reach for a moment.
persistently() {
    local what=$1 attempt
    shift
    for attempt in 1 2 3; do
        if [ "$attempt" -gt 1 ]; then
            say "$what failed; once more in a few seconds."
            sleep 5
        fi
        "$@" && return 0
    done
    return 1
}

# apt-get, as root, without questions.
apt_get() {
    persistently "apt-get $1" "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get \
        -y -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 \
        -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold \
        "$@" </dev/null
}

install_packages() {
    local packages installed package missing=()
    # Installed, nginx would be a web server for all the network: see nginx.sh.
    mapfile -t packages < <(wanted | awk '$1 != "nginx" { print $1 }' | sort -u)
    installed=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null |
        sed -n 's/^installed //p') || true
    for package in "${packages[@]}"; do
        grep -qxF -- "$package" <<<"$installed" || missing+=("$package")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0

    as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        have sudo || die "Missing: ${missing[*]}
Run this as root, then try again: apt-get install --no-install-recommends ${missing[*]}"
        as_root=(sudo)
    fi

    say "Installing: ${missing[*]}"
    apt_get update -o APT::Update::Error-Mode=any || say 'The package lists could not be brought up to date; trying with those that are there.'
    apt_get install --no-install-recommends "${missing[@]}" ||
        die "Could not install: ${missing[*]}"
}

# For this machine, because cargo would else want what other systems need as well,
# which a cache that builds have filled does not have.
fetch_crates() {
    local host manifest flags
    host=$(rustc -vV | sed -n 's/^host: //p')
    while read -r manifest flags; do
        persistently 'cargo fetch' env RUSTFLAGS="${RUSTFLAGS:-} $flags" \
            cargo fetch --locked --target "$host" --manifest-path "$root/$manifest" </dev/null ||
            die "Could not fetch the crates of $manifest."
    done <<'BUILDS'
Cargo.toml
Cargo.toml --cfg loom
tests/fuzz/Cargo.toml
BUILDS
}

case $part in
build | run | check | bench | package | roots) ;;
*) die "deps.sh: unknown part '$part': build, run, check, bench, package or roots" ;;
esac
if have apt-get && have dpkg-query; then
    install_packages
else
    list_only
fi

# Under sudo the target directory and the cache of crates are another user's, as the
# toolchain is.
if [ "$asked_for" ] && { ! have cargo || [ "${SUDO_USER:-}" ]; }; then
    exit 0
fi
case $part in
check)
    "$root/packaging/nginx.sh"
    "$root/packaging/qemu.sh"
    "$root/packaging/guest.sh"
    # A tree with vendor/ has them.
    [ -d "$root/vendor" ] || fetch_crates
    ;;
bench) "$root/packaging/nginx.sh" ;;
esac
