#!/usr/bin/env bash
# Tests packaging/install.sh, in a directory of its own: a stand-in for nbdkit says that its
# filters and manual pages are there, and dpkg, which is the real one, has a database
# there, with a package "nbdkit" in it. The nbdkit of this machine is not touched.
. "$(dirname -- "$0")/../../packaging/common.sh"
need_cargo
[ "$(id -u)" -eq 0 ] || die 'This test needs root, as an installation does.'

work=$(realpath -- "$(mktemp -d)")
trap 'rm -rf -- "$work"' EXIT
chmod 755 -- "$work" # mandb gives up root's rights
umask 022

# What is installed here is the library that cargo test has built.
built=$(cargo build -q --manifest-path "$root/Cargo.toml" --message-format=json-render-diagnostics)
LIBRARY=$(sed -n 's/.*"\([^"]*\/libnbdkit_cow_filter\.so\)".*/\1/p' <<<"$built")
export CARGO_TARGET_DIR=$work/target
"$root/packaging/build.sh" manual
our_page=$(manual)
NAME=cowrs "$root/packaging/build.sh" manual
our_other_page=$(filter_name=cowrs && manual)

# The commands of this machine, but for those that know its nbdkit, and without dpkg's,
# which are there for a part of the tests only.
mkdir -- "$work/commands" "$work/dpkg-commands"
for name in nbdkit pkg-config; do ln -s -- "$(type -P false)" "$work/commands/$name"; done
while IFS= read -r -d : directory; do
    for command in "$directory"/*; do
        [ -x "$command" ] || continue
        name=${command##*/}
        to=$work/commands
        [[ $name != dpkg* ]] || to=$work/dpkg-commands
        [ -e "$to/$name" ] || ln -s -- "$command" "$to/$name"
    done
done <<<"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:"

fs=$work/fs
filters=$fs/lib/nbdkit/filters
pages=$fs/share/man
library=$filters/nbdkit-cow-filter.so
page=$pages/man1/nbdkit-cow-filter.1
packed=$page.gz
other_library=$filters/nbdkit-cowrs-filter.so
other_page=$pages/man1/nbdkit-cowrs-filter.1
record=$fs/state/nbdkit-cow-filter/installed
export LIBRARY DPKG_ADMINDIR=$fs/dpkg STATEDIR=$fs/state
export LC_ALL=C MANPATH=$pages
unset DESTDIR FILTERDIR MANDIR NAME

fail() { die "FAILED, $case_name: $*"; }
holds() { [ "$(cat -- "$1" 2>&1)" = "$2" ] || fail "$1 is not '$2'"; }
same() { cmp -s -- "$1" "$2" || fail "$1 and $2 differ"; }
gone() { [ ! -e "$1" ] || fail "$1 is there"; }

# Runs install.sh quietly, with the variables that are given.
make_it() {
    local what=$1
    shift
    env "$@" "$root/packaging/install.sh" "$what" >"$work/output" 2>&1 ||
        fail "$what: $(cat -- "$work/output")"
}

# Runs an install that must be refused, for a reason in which the words are.
refused() {
    local words=$1
    shift
    ! env "$@" "$root/packaging/install.sh" install >"$work/output" 2>&1 ||
        fail "$* was not refused"
    grep -qF -e "$words" "$work/output" || fail "$*: $(cat -- "$work/output")"
}

# All that is there, but for what man and dpkg make while they work.
snapshot() {
    cd -- "$fs"
    find . \( -path ./dpkg -o -name index.db -o -name 'cat*' -o -name CACHEDIR.TAG \) -prune -o \
        -printf '%p %y %m\n' | sort
    find . -path ./dpkg -prune -o -type f ! -name index.db ! -name CACHEDIR.TAG -exec sha256sum {} + |
        sort
    cat dpkg/diversions 2>/dev/null || :
}

# The files of nbdkit, in a version.
nbdkit_files() {
    local top=$1 version=$2
    mkdir -p -- "$top$filters" "$top$pages/man1" "$top$fs/bin"
    printf '#!/bin/sh\necho filterdir=%s\necho mandir=%s\n' "$filters" "$pages" >"$top$fs/bin/nbdkit"
    chmod 755 "$top$fs/bin/nbdkit"
    printf 'filter %s' "$version" >"$top$library"
    printf '.TH nbdkit-cow-filter 1\n.SH NAME\nnbdkit-cow-filter \\- the other page, %s\n' "$version" |
        gzip -n >"$top$packed"
}

# Installs such a version: as a package, or as it comes without one.
nbdkit() {
    local version=$1 package=$work/package
    rm -rf -- "$package"
    if ! [ "$with_dpkg" ]; then
        nbdkit_files '' "$version"
        return
    fi
    nbdkit_files "$package" "$version"
    mkdir -- "$package/DEBIAN"
    printf '%s\n' 'Package: nbdkit' "Version: $version" 'Architecture: all' \
        'Maintainer: nobody <nobody@example.org>' 'Description: stand-in' >"$package/DEBIAN/control"
    dpkg-deb --build "$package" "$work/nbdkit.deb" >/dev/null
    dpkg --log=/dev/null -i "$work/nbdkit.deb" >/dev/null
}

remove_nbdkit() {
    if [ "$with_dpkg" ]; then
        dpkg --log=/dev/null --purge nbdkit >/dev/null 2>&1
    else
        rm -- "$fs/bin/nbdkit"
        find "$fs" -name '*.distrib*' -delete
    fi
}

# Begins a test, in an empty file system with nbdkit.
new_case() {
    case_name=$1
    [ -z "$with_dpkg" ] || case_name+=", with dpkg"
    rm -rf -- "$fs"
    mkdir -p -- "$fs/dpkg"/{info,updates} "$fs/state" "$pages/man1"
    : >"$fs/dpkg/status"
    nbdkit 1
    mandb -q -c "$pages"
    before=$(snapshot)
}
unchanged() {
    diff <(cat <<<"$before") <(snapshot) >&2 || fail 'not all is as it was before'
}

installed() {
    same "$LIBRARY" "$library"
    same "$our_page" "$page"
    holds "$library.distrib" "filter $1"
    gone "$packed"
}
# What man -k says of the filter.
shown() {
    local found
    found=$(apropos nbdkit-cow-filter 2>&1) || :
    [[ $found == "nbdkit-cow-filter (1) "*"- $1" && $found != *$'\n'* ]] ||
        fail "man -k shows: $found"
}
ours='write to a disk without changing it'

# What an install of an earlier version left: the page set aside under a name of man1.
earlier_install() {
    local name kept
    for name in "$library" "$packed"; do
        kept=$name.distrib
        [ "$name" = "$library" ] || kept=$pages/man1/nbdkit-cow-filter.distrib.1.gz
        if [ "$with_dpkg" ]; then
            dpkg-divert --quiet --local --rename --divert "$kept" --add "$name"
        else
            mv -- "$name" "$kept"
        fi
    done
    cp -- "$LIBRARY" "$library"
    cp -- "$our_page" "$page"
}

tests() {
    new_case 'installed and taken away'
    make_it install
    installed 1
    shown "$ours"
    mandb -q -c "$pages"
    shown "$ours"
    sed -i 's/nbdkit-cow-filter authors/nbdkit\\-cow\\-filter authors/' "$page" # as pod2man 6
    make_it install
    installed 1
    make_it uninstall
    unchanged
    shown 'the other page, 1'
    make_it uninstall
    unchanged

    new_case 'taken away after nbdkit'
    make_it install
    remove_nbdkit
    make_it uninstall
    left=$(find "$fs" -name '*nbdkit-cow-filter*')
    [ -z "$left" ] || fail "left behind: $left"
    nbdkit 1
    unchanged

    new_case 'installed twice'
    make_it install FILTERDIR="$fs/an other" MANDIR="$fs/an other/man"
    make_it install
    installed 1
    same "$LIBRARY" "$fs/an other/nbdkit-cow-filter.so"
    make_it uninstall
    rmdir -- "$fs/an other/man/man1" "$fs/an other/man" "$fs/an other"
    unchanged

    new_case 'taken away in one place'
    make_it install
    with_one=$(snapshot)
    make_it install FILTERDIR="$fs/other" MANDIR="$fs/other/man"
    make_it uninstall FILTERDIR="$fs/other" MANDIR="$fs/other/man"
    rm -r -- "$fs/other"
    diff <(cat <<<"$with_one") <(snapshot) >&2 || fail 'the other place has changed'
    make_it uninstall
    unchanged

    new_case 'two filters with one page'
    make_it install
    with_one=$(snapshot)
    make_it install FILTERDIR="$fs/other"
    make_it uninstall FILTERDIR="$fs/other"
    rmdir -- "$fs/other"
    diff <(cat <<<"$with_one") <(snapshot) >&2 || fail 'the other install has changed'
    make_it install FILTERDIR="$fs/other"
    make_it uninstall FILTERDIR="$filters"
    same "$our_page" "$page"
    make_it uninstall
    rmdir -- "$fs/other"
    unchanged

    new_case 'one filter with two pages'
    make_it install
    with_one=$(snapshot)
    make_it install MANDIR="$fs/other"
    make_it uninstall MANDIR="$fs/other"
    rmdir -- "$fs/other/man1" "$fs/other"
    diff <(cat <<<"$with_one") <(snapshot) >&2 || fail 'the other install has changed'
    make_it uninstall
    unchanged

    new_case 'taken away in one place after nbdkit'
    make_it install FILTERDIR="$fs/other"
    remove_nbdkit
    make_it uninstall FILTERDIR="$fs/other"
    for file in "$fs/other/nbdkit-cow-filter.so" "$page" "$record"; do gone "$file"; done

    new_case 'cut short'
    make_it install
    touch -- "$library.new" "$page.new" "$record.new"
    make_it uninstall
    unchanged

    new_case 'a user without a home'
    mkdir -- "$fs/user"
    printf '#!/bin/sh\necho 1000\n' >"$fs/user/id"
    chmod 755 "$fs/user/id"
    for what in install uninstall; do
        ! env -u HOME -u XDG_STATE_HOME -u STATEDIR PATH="$fs/user:$PATH" \
            "$root/packaging/install.sh" "$what" >"$work/output" 2>&1 || fail "$what has succeeded"
        grep -q 'set STATEDIR' "$work/output" || fail "$what: $(cat -- "$work/output")"
    done
    rm -r -- "$fs/user"
    unchanged

    new_case 'what is recorded is not there any more'
    make_it install FILTERDIR="$fs/other" MANDIR="$fs/other/man"
    rm -r -- "$fs/other"
    make_it install FILTERDIR="$fs/third" MANDIR="$fs/third/man"
    echo 'of somebody else' >"$fs/third/nbdkit-cow-filter.so"
    echo 'no path' >>"$record"
    make_it uninstall
    holds "$fs/third/nbdkit-cow-filter.so" 'of somebody else'
    rm -r -- "$fs/third"
    unchanged

    new_case 'in a package'
    make_it install DESTDIR="$work/destination"
    unchanged
    same "$LIBRARY" "$work/destination$library"
    same "$our_page" "$work/destination$page"
    make_it install
    make_it uninstall DESTDIR="$work/destination"
    gone "$work/destination$library"
    gone "$work/destination$page"
    rm -r -- "$work/destination"
    installed 1
    make_it uninstall
    unchanged

    new_case 'by another name'
    make_it install NAME=cowrs
    same "$LIBRARY" "$other_library"
    same "$our_other_page" "$other_page"
    holds "$library" 'filter 1'
    shown 'the other page, 1'
    [[ $(apropos nbdkit-cowrs-filter 2>&1) == "nbdkit-cowrs-filter (1) "*"- $ours" ]] ||
        fail 'man -k does not show the page'
    make_it install
    installed 1
    make_it uninstall NAME=cowrs
    gone "$other_library"
    gone "$other_page"
    installed 1
    make_it install NAME=cowrs
    make_it uninstall
    same "$LIBRARY" "$other_library"
    same "$our_other_page" "$other_page"
    holds "$library" 'filter 1'
    make_it uninstall NAME=cowrs
    unchanged

    new_case 'a name that is taken, and one that is none'
    echo 'another' >"$other_library"
    refused "$other_library is there" NAME=cowrs
    rm -- "$other_library"
    echo 'another' >"$other_page.gz"
    refused "$other_page.gz is there" NAME=cowrs
    rm -- "$other_page.gz"
    for name in ../cow -cow 'c ow' .; do refused "NAME=$name" NAME="$name"; done
    unchanged

    new_case 'over an earlier version'
    earlier_install
    make_it install
    installed 1
    mandb -q "$pages"
    shown "$ours"
    make_it uninstall
    unchanged

    new_case 'an earlier version taken away'
    earlier_install
    make_it uninstall
    unchanged
}

with_dpkg=
PATH=$fs/bin:$work/commands
tests

if [ -x "$work/dpkg-commands/dpkg-divert" ]; then
    with_dpkg=yes
    PATH+=:$work/dpkg-commands
    tests

    new_case 'nbdkit is upgraded'
    make_it install
    nbdkit 2
    installed 2
    shown "$ours"
    make_it uninstall
    holds "$library" 'filter 2'
    shown 'the other page, 2'
    gone "$record"
fi
say 'install and uninstall: all tests passed.'
