#!/usr/bin/env bash
# Tests packaging/doctor.sh with the nbdkit of this machine, to which a stand-in gives
# another directory of filters, and with the library that cargo has built. A copy of that
# library has the version of nbdkit changed, so that nbdkit does not load it.
. "$(dirname -- "$0")/../../packaging/common.sh"
need_cargo
have nbdkit || die 'nbdkit is missing: run make deps first.'

work=$(realpath -- "$(mktemp -d)")
trap 'rm -rf -- "$work"' EXIT

messages=$(cargo build -q --manifest-path "$root/Cargo.toml" --message-format=json-render-diagnostics)
built=$(sed -n 's/.*"\([^"]*\/libnbdkit_cow_filter\.so\)".*/\1/p' <<<"$messages")
export CARGO_TARGET_DIR=$work/target
"$root/packaging/build.sh" manual
our_page=$(manual)

nbdkit=$(type -P nbdkit)
version=$("$nbdkit" --dump-config | sed -n 's/^version=//p')
other=${version//[0-9]/9} # as long, so that it can take its place
name="nbdkit-cow-filter $(version)"
stale=$work/stale.so
sed "s/${version//./\\.}/$other/g" -- "$built" >"$stale"

# The commands of this machine, but for those that know what is installed on it.
mkdir -- "$work/commands"
while IFS= read -r -d : directory; do
    for command in "$directory"/*; do
        case ${command##*/} in
        nbdkit | pkg-config | dpkg* | rpm | man | cargo) ;;
        *) ln -sf -- "$command" "$work/commands/" ;;
        esac
    done
done <<<"/sbin:/bin:/usr/sbin:/usr/bin:"

fs="$work/file system"
filters=$fs/filters
pages=$fs/man
cow=$filters/nbdkit-cow-filter.so
page=$pages/man1/nbdkit-cow-filter.1
export LC_ALL=C MANPATH=$pages DPKG_ADMINDIR=$fs/dpkg
# The last three are what the scripts add to any PATH.
export PATH=$fs/bin:$work/commands:/nowhere:/usr/local/sbin:/usr/sbin:/sbin

fail() { die "FAILED, $case_name: $*
$(cat -- "$work/output")"; }

stand_in() {
    mkdir -p -- "${1%/*}"
    printf '#!/bin/sh\n%s\n' "$2" >"$1"
    chmod 755 -- "$1"
}
# Has pkg-config say this version and this directory of filters.
header_of() {
    stand_in "$fs/bin/pkg-config" "case \$1 in
--modversion) echo '$1' ;;
--variable=filterdir) echo '$2' ;;
*) exit 1 ;;
esac"
}
# The commands that know a system are there as well.
with() {
    local command
    for command; do ln -s -- "$(PATH=/usr/bin:/bin type -P "$command")" "$fs/bin/$command"; done
}

# An empty system with nbdkit, its header, and its own filter and page.
new_case() {
    case_name=$1
    rm -rf -- "$fs"
    mkdir -p -- "$filters" "$pages/man1" "$fs/dpkg/info"
    : >"$fs/dpkg/status"
    stand_in "$fs/bin/nbdkit" "[ \"\$*\" = --dump-config ] || exec '$nbdkit' \"\$@\"
'$nbdkit' --dump-config | sed 's,^filterdir=.*,filterdir=$filters,'"
    header_of "$version" "$filters"
    printf 'another filter' >"$cow"
    printf '.TH nbdkit-cow-filter 1\n' | gzip >"$page.gz"
    LIBRARY=$built
}
install_ours() {
    rm -f -- "$page.gz"
    cp -- "$built" "$cow"
    gzip -c -- "$our_page" >"$page.gz"
}

# Runs it, and compares its status and what it asks for.
asks_for() {
    local status=0 expected=0 asked
    [ $# -eq 0 ] || expected=1
    LIBRARY=$LIBRARY "$root/packaging/doctor.sh" >"$work/output" 2>&1 || status=$?
    [ "$status" -eq "$expected" ] || fail "status $status"
    asked=$(sed '1,/^To do:$/d' "$work/output")
    [ "$asked" = "$(for one; do printf -- '- %s\n' "$one"; done)" ] || fail "it should ask for: $*"
    [ $# -gt 0 ] || shows 'Nothing has to be done.'
}
shows() { grep -qxF -- "$1" "$work/output" || fail "it does not show: $1"; }

build='make, then sudo make install'
not_installed="This filter is not installed. Install the package nbdkit-cow-filter, or build it:"

new_case 'nothing at all'
rm -r -- "$fs"
LIBRARY=$work/none
asks_for 'Install nbdkit.'
shows 'nbdkit       missing'
shows 'built here   nothing yet'
shows 'header       missing, so nothing can be built here (Debian: nbdkit-plugin-dev)'
shows 'manual       not looked for, because man is missing'

new_case 'no file in the place of the filter'
rm -- "$cow"
mkdir -- "$cow"
asks_for "$cow is not a file that you can read, so nothing can be said of it. See what it is as root."
shows "cow          unknown: $cow"

new_case "nbdkit's own filter"
with man
asks_for "$not_installed $build."
shows "nbdkit       $version: $fs/bin/nbdkit"
shows "filters      $filters"
shows "cow          nbdkit's own: $cow"
shows "built here   $name for nbdkit $version: $built"
shows "header       of nbdkit $version, which is what a build is for"
shows "manual       nbdkit's own: $page.gz"

new_case 'no filter'
rm -- "$cow"
asks_for "$not_installed $build."
shows "cow          missing: there is no $cow"

new_case 'all is well'
install_ours
with man
asks_for
shows "cow          $name for nbdkit $version: $cow"
shows "manual       this filter's: $page.gz"

new_case 'the page of the other filter'
with man
cp -- "$built" "$cow"
asks_for 'man shows the page of the other filter. Install this one again, with its page.'

new_case 'under another name'
with man
cp -- "$built" "$filters/nbdkit-cowrs-filter.so"
cp -- "$our_page" "$pages/man1/nbdkit-cowrs-filter.1"
asks_for
shows "cow          nbdkit's own: $cow"
shows "cowrs        $name for nbdkit $version: $filters/nbdkit-cowrs-filter.so"
shows "manual       this filter's: $pages/man1/nbdkit-cowrs-filter.1"

refusal="nbdkit does not load it: nbdkit: $cow: filter is incompatible with this version of nbdkit (_version = $other, need $version)"

new_case 'after an upgrade of nbdkit'
install_ours
cp -- "$stale" "$cow"
asks_for "$refusal" "Build it for nbdkit $version: $build."
shows "cow          $name for nbdkit $other: $cow"

new_case 'after an upgrade of nbdkit, without its new header'
install_ours
cp -- "$stale" "$cow"
header_of "$other" "$filters"
LIBRARY=$stale
first="install the development files of nbdkit $version (Debian: nbdkit-plugin-dev), then"
asks_for "$refusal" "Build it for nbdkit $version: $first $build." \
    "What was built here is not for nbdkit $version. Build it again: $first $build." \
    "The header is that of nbdkit $other: what is built with it is not for nbdkit $version. Set PKG_CONFIG_PATH to where nbdkit.pc of $version is, or install its development files."

new_case 'a library that is broken'
install_ours
printf '%s for nbdkit %s' "$name" "$version" >"$cow"
said=$("$nbdkit" --version --filter="$cow" null 2>&1) && fail 'nbdkit loads it'
asks_for "nbdkit does not load it: ${said%%$'\n'*}" "Build it for nbdkit $version: $build."

new_case 'built before an upgrade of nbdkit'
install_ours
LIBRARY=$stale
asks_for "What was built here is not for nbdkit $version. Build it again: $build."

new_case 'a library of an earlier version'
install_ours
sed "s/$name for nbdkit/$name FOR nbdkit/" -- "$built" >"$cow"
asks_for
shows "cow          nbdkit-cow-filter, which does not say for which nbdkit it was built: $cow"

new_case 'filters in another place'
install_ours
mkdir -- "$fs/elsewhere"
header_of "$version" "$fs/elsewhere"
asks_for "make install would go to $fs/elsewhere, where nbdkit does not look: use FILTERDIR=$filters."

new_case 'two of nbdkit'
install_ours
stand_in "$fs/more/nbdkit" 'echo version=1.0.0'
PATH=$fs/bin:$fs/more:${PATH#*:} asks_for
shows "nbdkit       $version: $fs/bin/nbdkit"
shows "             1.0.0: $fs/more/nbdkit, which comes later on PATH and is not used"

if PATH=/usr/bin:/bin type -P dpkg-divert >/dev/null; then
    # Puts these files into the database of dpkg as those of a package.
    package() {
        local package=$1
        shift
        printf '%s\n' "$@" >"$fs/dpkg/info/$package.list"
        printf 'Package: %s\nStatus: install ok installed\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: stand-in\n\n' \
            "$package" >>"$fs/dpkg/status"
    }

    new_case 'packages'
    with dpkg-divert dpkg-query
    package nbdkit "$fs/bin/nbdkit" "$cow"
    asks_for "$not_installed $build."
    shows "nbdkit       $version: $fs/bin/nbdkit, of the package nbdkit"
    shows "cow          nbdkit's own: $cow, of the package nbdkit"

    new_case 'a package for another nbdkit'
    with dpkg-divert dpkg-query
    mv -- "$cow" "$cow.aside"
    cp -- "$stale" "$cow"
    package nbdkit "$cow"
    package nbdkit-cow-filter "$cow"
    printf '%s\n' "$cow" "$cow.aside" nbdkit-cow-filter >"$fs/dpkg/diversions"
    asks_for "$refusal" "Install the version of the package nbdkit-cow-filter that is for nbdkit $version."
    shows "cow          $name for nbdkit $other: $cow, of the package nbdkit-cow-filter"
    shows "             nbdkit's own is kept as $cow.aside"

    new_case 'make install'
    with dpkg-divert dpkg-query
    mv -- "$cow" "$cow.distrib"
    install_ours
    package nbdkit "$cow"
    printf '%s\n' "$cow" "$cow.distrib" : >"$fs/dpkg/diversions"
    asks_for
    shows "cow          $name for nbdkit $version: $cow"
    shows "             nbdkit's own is kept as $cow.distrib"
fi

say 'The test of the doctor passed.'
