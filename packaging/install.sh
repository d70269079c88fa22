#!/usr/bin/env bash
# install.sh install|uninstall, with DESTDIR, FILTERDIR, MANDIR, STATEDIR and NAME.
#
# Normally nbdkit's own filter has the same file name. It is never overwritten: it is kept
# under a name that ends in ".distrib", and uninstall puts it back. Where
# dpkg owns it this is a diversion, so that an upgrade of nbdkit writes its filter
# to the other name too. With DESTDIR, where a package is made, nothing is moved. By another
# NAME, such as cowrs, ours is beside that one; a filter that has the name is not touched.
#
# What was installed is noted in a record, because nbdkit, which says where filters
# go, may be gone by the time of the uninstall, or say something else.
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
mandir=${MANDIR:-}
[ -n "$mandir" ] || mandir=$(dump_config mandir) || :
[ -n "$mandir" ] || mandir=/usr/share/man

library_in() { realpath -ms -- "$destdir$1/nbdkit-$filter_name-filter.so"; }
page_in() { realpath -ms -- "$destdir$1/man1/nbdkit-$filter_name-filter.1"; }

# The record: an install on each line, the paths of its library and its page with a tab
# between, for all names. Several installs may share one of these files. A user who is not
# root has a record of their own.
record=
if [ -z "$destdir" ]; then
    state=${STATEDIR:-}
    if [ -z "$state" ]; then
        state=/var/lib
        [ "$(id -u)" -eq 0 ] || state=${XDG_STATE_HOME:-${HOME:+$HOME/.local/state}}
    fi
    [ -n "$state" ] || die 'HOME is not set, so there is no place for the record of what is installed: set STATEDIR.'
    record=$(realpath -ms -- "$state/nbdkit-cow-filter/installed")
fi
recorded=()
if [ -n "$record" ] && [ -e "$record" ]; then
    mapfile -t recorded < <(grep -xE $'/[^\t]*/nbdkit-([A-Za-z0-9-]+)-filter\\.so\t/[^\t]*/man1/nbdkit-\\1-filter\\.1' -- "$record")
fi

# Whether the first argument is one of the others.
is_among() {
    local word=$1 other
    shift
    for other; do [ "$word" != "$other" ] || return 0; done
    return 1
}

remember() {
    local library=$1 page=$2
    [[ $library$page != *[$'\t\n']* ]] || die "The path of $library or $page has a tab or a line break in it."
    is_among "$library"$'\t'"$page" "${recorded[@]}" || recorded+=("$library"$'\t'"$page")
    write_record
}

write_record() {
    if [ "${#recorded[@]}" -eq 0 ]; then
        rm -f -- "$record" "$record.new"
        [ ! -d "${record%/*}" ] || rmdir --ignore-fail-on-non-empty -- "${record%/*}"
        return
    fi
    [ -d "${record%/*}" ] || install -d -m 755 -- "${record%/*}"
    printf '%s\n' "${recorded[@]}" >"$record.new"
    mv -f -- "$record.new" "$record"
}

# A page of the distribution's is found before ours whichever way it is packed.
names_of() {
    case $1 in
    *.so) names=("$1") ;;
    *) names=("$1" "$1".{gz,bz2,xz,zst}) ;;
    esac
}

# A name that is in the library whatever the compiler does (the targets of its
# log messages) but not in the C filter; a sentence of our manual page, in which some
# versions of pod2man write "\-" for a hyphen.
ours() {
    case $1 in
    *.so) grep -qs nbdkit_cow_filter -- "$1" ;;
    *) grep -qs 'nbdkit\\\?-cow\\\?-filter authors' -- "$1" ;;
    esac
}

# Where the distribution's file goes. A page leaves man1: there man -k would show it, or
# man would warn of a name that it can't read.
distrib() {
    case $1 in
    *.so) printf '%s\n' "$1.distrib" ;;
    *) printf '%s\n' "${1%/*/*}/${1##*/}.distrib" ;;
    esac
}

can_divert() { [ "$(id -u)" -eq 0 ] && have dpkg-divert && have dpkg-query; }
diverted_to() { dpkg-divert --truename "$1"; }

# The Debian package diverts the same files.
packaged() {
    local name
    have dpkg-divert || return 1
    names_of "$1"
    for name in "${names[@]}"; do
        [ "$(dpkg-divert --listpackage "$name")" != nbdkit-cow-filter ] || return 0
    done
    return 1
}

must_not_be_packaged() {
    local file
    for file; do
        ! packaged "$file" || die "$file belongs to the package nbdkit-cow-filter: remove that first (apt-get remove nbdkit-cow-filter), or set FILTERDIR and MANDIR to install beside it."
    done
}

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

# An install of an earlier version kept the page in man1: from there to where it goes
# now. Whatever step this ends at, it can be done again.
take_over() {
    local file=$1 kept before
    [[ $file != *.so ]] || return 0
    kept=$(distrib "$file")
    before=${file%.1*}.distrib.1${file##*.1}
    [ ! -e "$before" ] || mv -f -- "$before" "$kept"
    if can_divert && [ "$(diverted_to "$file")" = "$before" ]; then
        dpkg-divert --quiet --local --no-rename --remove "$file"
        dpkg-divert --quiet --local --no-rename --divert "$kept" --add "$file"
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
    local file dir
    for file; do
        dir=${file%/*}
        while [ ! -e "$dir" ]; do dir=$(dirname -- "$dir"); done
        [ -w "$dir" ] || die "$dir is not writable: run this as root, or set DESTDIR."
    done
}

# man -k, which looks into an index, shows the other page until that is made anew.
renew_index() {
    local dir
    have mandb && have manpath || return 0
    for dir; do
        [[ :$(manpath -q 2>/dev/null): != *":$dir:"* ]] || mandb -q -- "$dir" 2>/dev/null || :
    done
}

# The mode that the filters beside it have: 0644 on Debian, 0755 elsewhere.
library_mode() {
    local other
    for other in "$filterdir"/nbdkit-*-filter.so; do
        if [ -e "$other" ] && [ "${other##*/}" != "nbdkit-$filter_name-filter.so" ]; then
            stat -c %a -- "$other"
            return
        fi
    done
    echo 755
}

# Only the filter that ours stands in for is set aside.
must_be_free() {
    local name names
    names_of "$1"
    for name in "${names[@]}"; do
        [ ! -e "$name" ] || ours "$name" ||
            die "$name is there, and not from here: choose another NAME."
    done
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
    [ -n "$filterdir" ] || die 'Neither pkg-config nor nbdkit says where filters go: set FILTERDIR.'
    installed_library=$(library_in "$filterdir")
    installed_page=$(page_in "$mandir")
    must_write "$installed_library" "$installed_page" ${record:+"$record"}
    if [ -z "$destdir" ]; then
        must_not_be_packaged "$installed_library" "$installed_page"
        if [ "$filter_name" != cow ]; then
            must_be_free "$installed_library"
            must_be_free "$installed_page"
        fi
        # First of all, so that an install that is cut short can be taken away as well.
        remember "$installed_library" "$installed_page"
        for file in "$installed_library" "$installed_page"; do
            names_of "$file"
            for name in "${names[@]}"; do
                take_over "$name"
                set_aside "$name"
            done
        done
    fi
    put "$(library_mode)" "$library" "$installed_library"
    put 644 "$page" "$installed_page"
    if [ -z "$destdir" ]; then
        renew_index "${installed_page%/*/*}"
        say 'nbdkit loads a filter only if it was built for the same version of nbdkit:'
        say 'when nbdkit is upgraded, build and install this again.'
    fi
    ;;
uninstall)
    # The installs of this name that are recorded. Who names a directory means those in it.
    libraries=() pages=() remaining=() in_use=()
    for entry in "${recorded[@]}"; do
        library=${entry%$'\t'*} page=${entry#*$'\t'}
        if [[ $library == */"nbdkit-$filter_name-filter.so" ]] &&
            { [ -z "${FILTERDIR:-}" ] || [ "$library" = "$(library_in "$filterdir")" ]; } &&
            { [ -z "${MANDIR:-}" ] || [ "$page" = "$(page_in "$mandir")" ]; }; then
            libraries+=("$library")
            pages+=("$page")
        else
            remaining+=("$entry")
            in_use+=("$library" "$page")
        fi
    done
    if [ "${#libraries[@]}" -eq 0 ]; then
        [ -n "$filterdir" ] || die 'No such installation is recorded, and neither pkg-config nor nbdkit says where filters go: set FILTERDIR.'
        libraries=("$(library_in "$filterdir")")
        pages=("$(page_in "$mandir")")
        [ "$destdir" ] || must_not_be_packaged "${libraries[@]}" "${pages[@]}"
    fi
    files=()
    for file in "${libraries[@]}" "${pages[@]}"; do
        ! is_among "$file" "${files[@]}" || continue
        if is_among "$file" "${in_use[@]}"; then
            say "Left      $file, which another install has too"
        elif [ -z "$destdir" ] && packaged "$file"; then
            say "Left      $file, which belongs to the package nbdkit-cow-filter"
        else
            files+=("$file")
        fi
    done
    for file in "${files[@]}"; do
        [ ! -d "${file%/*}" ] || must_write "$file"
    done
    for file in "${files[@]}"; do
        if ours "$file"; then
            rm -- "$file"
            say "Removed   $file"
        elif [ -e "$file" ]; then
            say "Left      $file, which is not from here"
        fi
        rm -f -- "$file.new" # of an install that was cut short
        [ -z "$destdir" ] || continue
        names_of "$file"
        for name in "${names[@]}"; do
            take_over "$name"
            put_back "$name"
        done
    done
    if [ -z "$destdir" ]; then
        recorded=("${remaining[@]}")
        write_record
        renew_index "${pages[@]%/*/*}"
    fi
    ;;
*) die 'install.sh: install or uninstall?' ;;
esac
