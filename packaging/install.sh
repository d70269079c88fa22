#!/usr/bin/env bash
# install.sh install|uninstall, with DESTDIR, FILTERDIR and MANDIR.
#
# nbdkit's own filter has the same file name. It is never overwritten: it is kept
# under a name with ".distrib" in it, and uninstall puts it back. Where
# dpkg owns it this is a diversion, so that an upgrade of nbdkit writes its filter
# to the other name too. With DESTDIR, where a package is made, nothing is moved.
. "$(dirname -- "$0")/common.sh"

destdir=${DESTDIR:-}
dump_config() {
    have nbdkit || return 0
    nbdkit --dump-config 2>/dev/null | sed -n "s/^$1=//p"
}

filterdir=${FILTERDIR:-}
if [ -z "$filterdir" ] && have pkg-config; then
    filterdir=$(pkg-config --variable=filterdir nbdkit 2>/dev/null) || :
fi
[ -n "$filterdir" ] || filterdir=$(dump_config filterdir) || :
[ -n "$filterdir" ] || die 'Neither pkg-config nor nbdkit says where filters go: set FILTERDIR.'
mandir=${MANDIR:-}
[ -n "$mandir" ] || mandir=$(dump_config mandir) || :
[ -n "$mandir" ] || mandir=/usr/share/man

installed_library=$(realpath -ms -- "$destdir$filterdir/nbdkit-cow-filter.so")
installed_page=$(realpath -ms -- "$destdir$mandir/man1/nbdkit-cow-filter.1")
# A page of the distribution's is found before ours whichever way it is packed.
set_aside_names=("$installed_library" "$installed_page" "$installed_page".{gz,bz2,xz,zst})

# A name that is in the library whatever the compiler does (the targets of its
# log messages) but not in the C filter; a sentence of our manual page.
ours() {
    case $1 in
    *.so) grep -qs nbdkit_cow_filter -- "$1" ;;
    *) grep -qs 'nbdkit-cow-filter authors' -- "$1" ;;
    esac
}

# Where the distribution's file goes; a manual page keeps an ending that man knows.
distrib() {
    case $1 in
    *.so) printf '%s\n' "$1.distrib" ;;
    *) printf '%s\n' "${1%/*}/nbdkit-cow-filter.distrib.1${1##*.1}" ;;
    esac
}

can_divert() { [ "$(id -u)" -eq 0 ] && have dpkg-divert && have dpkg-query; }
diverted_to() { dpkg-divert --truename "$1"; }

set_aside() {
    local file=$1 kept to
    kept=$(distrib "$file")
    if can_divert; then
        to=$(diverted_to "$file")
        [ "$to" != "$kept" ] || return 0
        [ "$to" = "$file" ] || die "$file is diverted to $to already."
        if dpkg-query -S "$file" >/dev/null 2>&1; then
            local rename=--rename
            ! ours "$file" || rename=--no-rename
            dpkg-divert --quiet --local "$rename" --divert "$kept" --add "$file"
            say "Kept      $kept"
            return 0
        fi
    fi
    if [ -e "$file" ] && ! ours "$file"; then
        mv -f -- "$file" "$kept"
        say "Kept      $kept"
    fi
}

put_back() {
    local file=$1 kept
    kept=$(distrib "$file")
    if can_divert && [ "$(diverted_to "$file")" = "$kept" ]; then
        [ ! -e "$file" ] || return 0
        dpkg-divert --quiet --local --rename --remove "$file"
    elif [ -e "$kept" ] && [ ! -e "$file" ]; then
        mv -- "$kept" "$file"
    else
        return 0
    fi
    [ ! -e "$file" ] || say "Restored  $file"
}

must_write() {
    local dir
    for dir in "${installed_library%/*}" "${installed_page%/*}"; do
        while [ ! -e "$dir" ]; do dir=$(dirname -- "$dir"); done
        [ -w "$dir" ] || die "$dir is not writable: run this as root, or set DESTDIR."
    done
}

# The mode that the filters beside it have: 0644 on Debian, 0755 elsewhere.
library_mode() {
    local other
    for other in "$filterdir"/nbdkit-*-filter.so; do
        if [ -e "$other" ] && [ "${other##*/}" != nbdkit-cow-filter.so ]; then
            stat -c %a -- "$other"
            return
        fi
    done
    echo 755
}

# Moved into place whole: an nbdkit that starts at this moment sees the old file
# or the new one.
put() {
    local mode=$1 from=$2 to=$3
    [ -d "${to%/*}" ] || install -d -m 755 -- "${to%/*}"
    install -m "$mode" -- "$from" "$to.new"
    mv -f -- "$to.new" "$to"
    say "Installed $to"
}

case ${1:-} in
install)
    library=$(library)
    page=$(manual)
    [ -e "$library" ] || die "There is no $library: run make build first."
    [ -e "$page" ] || die "There is no $page: run make doc first."
    must_write
    if [ -z "$destdir" ]; then
        for name in "${set_aside_names[@]}"; do set_aside "$name"; done
    fi
    put "$(library_mode)" "$library" "$installed_library"
    put 644 "$page" "$installed_page"
    if [ -z "$destdir" ]; then
        say 'nbdkit loads a filter only if it was built for the same version of nbdkit:'
        say 'when nbdkit is upgraded, build and install this again.'
    fi
    ;;
uninstall)
    must_write
    for name in "$installed_library" "$installed_page"; do
        if ours "$name"; then
            rm -- "$name"
            say "Removed   $name"
        elif [ -e "$name" ]; then
            say "Left      $name, which is not from here"
        fi
    done
    if [ -z "$destdir" ]; then
        for name in "${set_aside_names[@]}"; do put_back "$name"; done
    fi
    ;;
*) die 'install.sh: install or uninstall?' ;;
esac
