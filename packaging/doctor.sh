#!/usr/bin/env bash
# Says which nbdkit is installed, which filter --filter=cow is, for which nbdkit each was
# built, and what has to be done so that this filter is used. Status 1 if something has.
#
# What a library was built for is read from its bytes (LONG_NAME in
# src/nbdkit/vtable.rs): nbdkit does not load one that was built for another version.
. "$(dirname -- "$0")/common.sh"

line() { printf '%-12s %s\n' "$1" "$2"; }
todo=()
to_do() { todo+=("- $*"); }

config_of() { "$1" --dump-config 2>/dev/null | sed -n "s/^$2=//p" || :; }

# What a library says of itself: nbdkit-cow-filter VERSION for nbdkit VERSION.
built_as() {
    local said
    said=$(grep -saoE -m1 'nbdkit-cow-filter [^ ]+ for nbdkit [0-9][0-9.]*' -- "$1") || said=
    if [ -z "$said" ] && grep -qs nbdkit_cow_filter -- "$1"; then
        said='nbdkit-cow-filter, which does not say for which nbdkit it was built'
    fi
    printf '%s' "$said"
}

# Who has put a file there: a package, or make install, which notes it as a diversion.
origin() {
    local package=
    if have dpkg-divert && have dpkg-query; then
        package=$(dpkg-divert --listpackage "$1")
        [ "$package" != LOCAL ] || return 0
        [ -n "$package" ] || package=$(dpkg-query -S "$1" 2>/dev/null | sed -n 's/^\([^ ,:]*\)[,:].*/\1/p; q') || package=
    fi
    if [ -z "$package" ] && have rpm; then
        package=$(rpm -qf --queryformat '%{NAME}' -- "$1" 2>/dev/null) || package=
    fi
    printf '%s' "$package"
}
# A file with its package.
placed() {
    local package
    package=$(origin "$1")
    printf '%s' "$1${package:+, of the package $package}"
}

# The nbdkit that runs, and others that it hides.
nbdkit='' version='' filters='' seen=$'\n'
while IFS= read -r candidate; do
    real=$(realpath -- "$candidate")
    [[ $seen != *$'\n'"$real"$'\n'* ]] || continue
    seen+=$real$'\n'
    if [ -z "$nbdkit" ]; then
        nbdkit=$candidate
        version=$(config_of "$nbdkit" version)
        filters=$(config_of "$nbdkit" filterdir)
        line nbdkit "$version: $(placed "$nbdkit")"
    else
        line '' "$(config_of "$candidate" version): $candidate, which comes later on PATH and is not used"
    fi
done < <(type -aP nbdkit || :)
if [ -z "$nbdkit" ]; then
    line nbdkit missing
    to_do 'Install nbdkit.'
elif [ -z "$version" ] || [ -z "$filters" ]; then
    to_do "Repair nbdkit: $nbdkit --dump-config does not say its version and filterdir."
fi

# The header, which is what a build is for.
header='' header_filters=''
if have pkg-config; then
    header=$(pkg-config --modversion nbdkit 2>/dev/null) || header=
    header_filters=$(pkg-config --variable=filterdir nbdkit 2>/dev/null) || header_filters=
fi
build='make, then sudo make install'
[ "$header" ] && [ "$header" = "${version:-$header}" ] ||
    build="install the development files of nbdkit $version (Debian: nbdkit-plugin-dev), then $build"

# Says what --filter=NAME loads. If it is this filter, our_name is set to it, and if nbdkit
# takes it, works to yes.
our_name='' works='' cow_is_unknown=''
look_at() {
    local file=$filters/nbdkit-$1-filter.so what said package aside
    if ! [ -e "$file" ]; then
        line "$1" "missing: there is no $file"
        return
    fi
    if ! [ -f "$file" ] || ! [ -r "$file" ]; then
        line "$1" "unknown: $(placed "$file")"
        to_do "$file is not a file that you can read, so nothing can be said of it. See what it is as root."
        [ "$1" != cow ] || cow_is_unknown=yes
        return
    fi
    what=$(built_as "$file")
    line "$1" "${what:-"nbdkit's own"}: $(placed "$file")"
    [ "$what" ] || return 0
    our_name=$1
    aside=$file.distrib
    ! have dpkg-divert || aside=$(dpkg-divert --truename "$file")
    [ "$aside" = "$file" ] || ! [ -e "$aside" ] || line '' "nbdkit's own is kept as $aside"
    if said=$("$nbdkit" --version --filter="$file" null 2>&1); then
        works=yes
        return
    fi
    # After the first line comes only a hint at --help.
    to_do "nbdkit does not load it: ${said%%$'\n'*}"
    package=$(origin "$file")
    if [ "$package" ]; then
        to_do "Install the version of the package $package that is for nbdkit $version."
    else
        to_do "Build it for nbdkit $version: $build."
    fi
}
if [ "$filters" ]; then
    line filters "$filters"
    look_at cow
    # A package for a system without diversions gives it another name.
    for file in "$filters"/nbdkit-*-filter.so; do
        name=${file##*/nbdkit-}
        name=${name%-filter.so}
        [ "$name" = cow ] || [ -z "$(built_as "$file")" ] || look_at "$name"
    done
    [ "$our_name" ] || [ "$cow_is_unknown" ] || to_do "This filter is not installed. Install the package nbdkit-cow-filter, or build it: $build."
fi

library=$(library)
if [ -e "$library" ]; then
    what=$(built_as "$library")
    line 'built here' "${what:-not this filter}: $library"
    [ -z "$version" ] || [[ $what == *" for nbdkit $version" ]] ||
        to_do "What was built here is not for nbdkit $version. Build it again: $build."
else
    line 'built here' 'nothing yet'
fi

if [ -z "$header" ]; then
    line header 'missing, so nothing can be built here (Debian: nbdkit-plugin-dev)'
else
    line header "of nbdkit $header, which is what a build is for"
    if [ "$header" != "${version:-$header}" ]; then
        to_do "The header is that of nbdkit $header: what is built with it is not for nbdkit $version. Set PKG_CONFIG_PATH to where nbdkit.pc of $version is, or install its development files."
    elif [ "$filters" ] && [ "$header_filters" ] && ! [ "$header_filters" -ef "$filters" ]; then
        to_do "make install would go to $header_filters, where nbdkit does not look: use FILTERDIR=$filters."
    fi
fi

is_our_page() {
    # Not grep -q, which would end before the page does, and fail the other command.
    case $1 in
    *.gz) gzip -dc -- "$1" ;;
    *.bz2) bzip2 -dc -- "$1" ;;
    *.xz) xz -dc -- "$1" ;;
    *.zst) zstd -dcq -- "$1" ;;
    *) cat -- "$1" ;;
    esac | grep 'nbdkit\\\?-cow\\\?-filter authors' >/dev/null
}
if ! have man; then
    line manual 'not looked for, because man is missing'
elif ! page=$(man -w "nbdkit-${our_name:-cow}-filter" 2>/dev/null); then
    line manual 'missing'
elif is_our_page "$page"; then
    line manual "this filter's: $(placed "$page")"
else
    line manual "nbdkit's own: $(placed "$page")"
    [ -z "$works" ] || to_do 'man shows the page of the other filter. Install this one again, with its page.'
fi

say
if [ "${#todo[@]}" -eq 0 ]; then
    say 'Nothing has to be done.'
    exit 0
fi
say 'To do:'
printf '%s\n' "${todo[@]}"
exit 1
