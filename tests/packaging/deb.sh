#!/usr/bin/env bash
# Makes the Debian package, and tries it on this very system: installs, upgrades and
# removes it and nbdkit, in every order, and breaks off in between. The system has to
# be one that can be thrown away, because a test that fails leaves it as it is.
. "$(dirname -- "$0")/../../packaging/common.sh"
[ "${THROW_AWAY_SYSTEM:-}" = yes ] ||
    die 'This test installs and breaks packages: run it in a container or chroot, with THROW_AWAY_SYSTEM=yes.'
[ "$(id -u)" -eq 0 ] || die 'This test needs root, as an installation does.'
umask 022
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
unset DESTDIR FILTERDIR MANDIR STATEDIR LIBRARY NAME MANPATH

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
chmod 755 -- "$work" # apt reads packages as another user

"$root/packaging/deb.sh"
packages=("$(target_dir)"/debian/nbdkit-cow-filter_*.deb)
[ "${#packages[@]}" -eq 1 ] || die "deb.sh has not made one package: ${packages[*]}"
ours=$work/ours.deb
cp -- "${packages[0]}" "$ours"

filters=$(pkg-config --variable=filterdir nbdkit)
library=$filters/nbdkit-cow-filter.so
man1=/usr/share/man/man1
page=$man1/nbdkit-cow-filter.1
kept_page=/usr/share/man/nbdkit-cow-filter.1.gz.distrib
record=/var/lib/nbdkit-cow-filter/installed
version=$(pkg-config --modversion nbdkit)

case_name='beginning'
fail() { die "FAILED, $case_name: $*"; }
begin() {
    case_name=$1
    say "... $1"
}

# Runs a command, of which only a failure is of interest.
quietly() { "$@" >"$work/output" 2>&1 </dev/null || fail "$*: $(cat -- "$work/output")"; }
refused() {
    { ! "$@" >"$work/output" 2>&1 </dev/null; } 2>/dev/null ||
        fail "not refused: $*: $(cat -- "$work/output")"
}
said() { grep -q -- "$1" "$work/output" || fail "does not say '$1': $(cat -- "$work/output")"; }
apt_get() { quietly apt-get -y -q "$@"; }
make_it() { quietly "$root/packaging/install.sh" "$@"; }
sum() { sha256sum <"$1"; }
gone() { [ ! -e "$1" ] || fail "$1 is there"; }
status() { dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null || :; }

# A package changed: FROM TO, then commands that are run in its directory.
repack() {
    local from=$1 to=$2 commands=$3
    rm -rf -- "$work/package"
    quietly dpkg-deb -R "$from" "$work/package"
    (cd -- "$work/package" && eval "$commands")
    quietly dpkg-deb -Znone -b "$work/package" "$to"
}
in_control() { sed -i -e "$1" DEBIAN/control; }

# nbdkit's package, from what is installed: an archive may have only a newer one by now.
pack_nbdkit() {
    local package=$work/package control
    mkdir -p -- "$package/DEBIAN"
    dpkg-query -L nbdkit | sed 's|^/|./|' | tar -c --no-recursion -C / -T - | tar -x -C "$package"
    while IFS= read -r control; do
        cp -- "$(dpkg-query --control-path nbdkit "$control")" "$package/DEBIAN/"
    done < <(dpkg-query --control-list nbdkit)
    dpkg-query -s nbdkit | grep -v '^Status:' >"$package/DEBIAN/control"
    quietly dpkg-deb -Znone -b "$package" "$work/nbdkit.deb"
}

# All that packages put anywhere, but for logs, caches and what dpkg writes anew each
# time. A file's time is that of its package.
snapshot() {
    find /etc /opt /usr /var -xdev \( -path "$root" -o -path "$work" -o -path /var/cache \
        -o -path /var/log -o -path /var/tmp -o -path /var/lib/apt -o -path '/var/lib/dpkg/*-old' \
        -o -path '/var/lib/dpkg/lock*' -o -path /var/lib/dpkg/status -o -path /var/lib/dpkg/available \
        -o -path /var/lib/dpkg/diversions -o -path /var/lib/dpkg/triggers -o -path /var/lib/dpkg/tmp.ci \) -prune -o \
        \( -type d -o -path '/var/lib/dpkg/info/*' \) -printf '%p %y %m %u %g\n' -o \
        -printf '%p %y %m %u %g %s %T@ %l\n' | sort
    dpkg-query -W -f '${Package} ${Version} ${Status}\n'
    dpkg-divert --list | sort
}
unchanged() {
    diff <(cat <<<"$before") <(snapshot) >&2 || fail 'not all is as it was before'
    [ "$c_filter" = "$(sum "$library")" ] || fail "nbdkit's filter has other bytes than before"
    [ "$c_page" = "$(sum "$page.gz")" ] || fail "nbdkit's manual page has other bytes than before"
}

purge_leaves_nothing() {
    quietly dpkg -P nbdkit-cow-filter
    unchanged
}

# The package is in place, and nothing beside it; nbdkit's own files are set aside.
installed() {
    local list
    [ "$(status nbdkit-cow-filter)" = 'ii ' ] || fail "the package is $(status nbdkit-cow-filter)"
    [ "$(status nbdkit)" = 'ii ' ] || fail "nbdkit is $(status nbdkit)"
    quietly dpkg --verify nbdkit-cow-filter
    [ ! -s "$work/output" ] || fail "changed: $(cat -- "$work/output")"
    [ "${1:-$c_filter}" = "$(sum "$library.distrib")" ] || fail "$library.distrib is not nbdkit's filter"
    [ "${2:-$c_page}" = "$(sum "$kept_page")" ] || fail "$kept_page is not nbdkit's page"
    list=$(find /etc /opt /usr /var -xdev \( -path "$root" -o -path "$work" -o -path /var/cache \) -prune -o \
        -name '*nbdkit-cow-filter*' ! -path '/var/lib/dpkg/info/*' -print | sort)
    [ "$list" = "$our_files" ] || fail "these files are there: $list"
    list=$(dpkg-divert --list '*nbdkit-cow-filter*' | sort)
    [ "$list" = "diversion of $library to $library.distrib by nbdkit-cow-filter
diversion of $page.gz to $kept_page by nbdkit-cow-filter" ] || fail "these diversions are there: $list"
}
works() { quietly "$root/packaging/debian/tests/smoke"; }
# What man shows, and that it shows it once.
shown() {
    local list
    list=$(man -wa nbdkit-cow-filter)
    [ "$list" = "$page.gz" ] || fail "man shows: $list"
    list=$(apropos nbdkit-cow-filter)
    [[ $list == "nbdkit-cow-filter (1) "*"$1"* && $list != *$'\n'* ]] || fail "man -k shows: $list"
}
our_title='without changing it'

# ---------------------------------------------------------------------------------

begin 'lintian, and what the package depends on'
quietly lintian --fail-on error,warning "$ours"
quietly lintian --fail-on none --show-overrides "$ours"
while read -r _ tag _; do
    said "^O: nbdkit-cow-filter: $tag" # none that is not needed
done < <(grep -v '^#' -- "$root/packaging/debian/lintian-overrides")
depends=", $(dpkg-deb -f "$ours" Depends),"
for bound in "nbdkit (>= $version)" "nbdkit (<< $version.0~)" libgcc-s1; do
    [[ $depends == *", $bound,"* ]] || fail "does not depend on $bound: $depends"
done
[[ $depends == *', libc6 (>= '* ]] || fail "does not depend on a version of libc6: $depends"
[ "$(dpkg-deb -f "$ours" Conflicts)" = "nbdkit (>= $version.0~)" ] || fail 'does not conflict with later versions'
next=${version%.*}.$((${version##*.} + 1))
will_do() { dpkg --compare-versions "$1" ge "$version" && dpkg --compare-versions "$1" lt "$version.0~"; }
for other in "$version"{-1,-1+deb13u1,-1+b1,-0ubuntu1,-1~bpo1,+dfsg-1}; do
    will_do "$other" || fail "nbdkit $other would not do"
done
for other in "$version~rc1-1" "$version.1-1" "$next~rc1-1" "$next-1" "${version}0-1"; do
    ! will_do "$other" || fail "nbdkit $other would do"
done

begin 'preparations'
if [ ! -e "$page.gz" ]; then
    # A container's dpkg may be told to leave manual pages out.
    echo 'path-include=/usr/share/man/*' >/etc/dpkg/dpkg.cfg.d/zz-with-manual-pages
    apt_get install --reinstall nbdkit
fi
pack_nbdkit
nbdkit_version=$(dpkg-query -W -f '${Version}' nbdkit)
# Other bytes in the filter and the page, to see where they get to. nbdkit loads a
# filter with something behind it.
change_files="echo >>.$library; printf '.\\\\\"\n' | gzip >>.$page.gz; rm -f DEBIAN/md5sums"
repack "$work/nbdkit.deb" "$work/nbdkit-revision.deb" \
    "in_control 's/^Version: .*/Version: $nbdkit_version+b9/'; $change_files"
repack "$work/nbdkit.deb" "$work/nbdkit-next.deb" "in_control 's/^Version: .*/Version: $next-1/'; $change_files"
rm -rf -- "$work/changed"
quietly dpkg-deb -x "$work/nbdkit-next.deb" "$work/changed"
changed_filter=$(sum "$work/changed$library") changed_page=$(sum "$work/changed$page.gz")
repack "$ours" "$work/ours-newer.deb" "in_control 's/^Version: .*/&.1/'"
repack "$ours" "$work/ours-next.deb" "in_control 's/$version/$next/g'"
# One that can't be unpacked, and one whose unpacking ends with the power.
repack "$ours" "$work/ours-broken.deb" \
    "in_control 's/^Version: .*/&.2/'; mkdir -p usr/bin; echo >usr/bin/nbdkit"
repack "$ours" "$work/ours-cut.deb" "in_control 's/^Version: .*/&.2/'; echo 'kill -9 \$PPID' >>DEBIAN/preinst"
our_files=$({ dpkg-deb --fsys-tarfile "$ours" | tar -t | sed -n 's|^\./|/|; s|/$||; /nbdkit-cow-filter[^/]*$/p'
    printf '%s\n' "$library.distrib" "$kept_page"; } | sort)

# An archive with what is newer, and apt's memory of it, apart from the system's.
mkdir -- "$work/archive" "$work/lists" "$work/cache"
echo "deb [trusted=yes] file:$work/archive ./" >"$work/sources.list"
archive=(-o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache")
offer() {
    rm -f -- "$work"/archive/*
    for package; do cp -- "$package" "$work/archive/"; done
    (cd -- "$work/archive" && dpkg-scanpackages -m . >Packages 2>/dev/null)
    apt_get "${archive[@]}" update
}

quietly dpkg -i "$work/nbdkit.deb"
c_filter=$(sum "$library") c_page=$(sum "$page.gz")
before=$(snapshot)

# ---------------------------------------------------------------------------------

begin 'installed by one command'
apt_get install "$ours"
installed
works
shown "$our_title"
nbdkit --version --filter=cow null | grep -qx "cow $version" || fail 'nbdkit does not load the filter'
[ "$(stat -c %a "$library")" = "$(stat -c %a "$filters/nbdkit-log-filter.so")" ] || fail "mode of $library"
with_package=$(snapshot)
same_package() { diff <(cat <<<"$with_package") <(snapshot) >&2 || fail 'the package has changed'; }

begin 'make install and make uninstall beside the package'
for what in install uninstall; do
    refused "$root/packaging/install.sh" "$what"
    said 'apt-get remove nbdkit-cow-filter'
done
same_package
FILTERDIR=$work/other MANDIR=$work/other/man make_it install
FILTERDIR=$work/other MANDIR=/usr/share/man refused "$root/packaging/install.sh" install
make_it uninstall
same_package

begin 'nbdkit and the package installed again'
quietly dpkg -i "$work/nbdkit.deb"
same_package
# Which apt takes for an older one, because it is not the one of the archive.
apt_get install --reinstall --allow-downgrades "$work/nbdkit.deb"
same_package
quietly dpkg -i "$ours"
same_package
installed

begin 'a newer build'
apt_get install "$work/ours-newer.deb"
installed
works
begin 'a newer build that can not be unpacked'
refused dpkg -i "$work/ours-broken.deb"
installed
begin 'a Debian revision of nbdkit'
apt_get install "$work/nbdkit-revision.deb"
installed "$changed_filter" "$changed_page"
quietly dpkg -i "$work/nbdkit.deb"
installed

begin 'the next nbdkit, by dpkg'
refused dpkg -i "$work/nbdkit-next.deb"
said 'conflicts with nbdkit'
installed
works

begin 'the next nbdkit, in the archive'
offer "$work/nbdkit-next.deb"
apt_get "${archive[@]}" upgrade
installed
apt_get "${archive[@]}" dist-upgrade
if [ "$(status nbdkit-cow-filter)" = 'ii ' ]; then
    installed # held back
    apt_get install "$work/nbdkit-next.deb"
fi
[ "$changed_filter" = "$(sum "$library")" ] || fail "$library is not that of the new nbdkit"
[ "$changed_page" = "$(sum "$page.gz")" ] || fail "$page.gz is not that of the new nbdkit"
gone "$library.distrib"
gone "$kept_page"
quietly dpkg -P nbdkit-cow-filter
quietly dpkg -i "$work/nbdkit.deb"
unchanged

begin 'the next nbdkit together with the package for it'
apt_get install "$ours"
offer "$work/nbdkit-next.deb" "$work/ours-next.deb"
apt_get "${archive[@]}" dist-upgrade
[ "$(dpkg-query -W -f '${Version}' nbdkit-cow-filter)" = "$(dpkg-deb -f "$work/ours-next.deb" Version)" ] ||
    fail 'the package was not upgraded'
[ "$(dpkg-query -W -f '${Version}' nbdkit)" = "$next-1" ] || fail 'nbdkit was not upgraded'
[ "$changed_filter" = "$(sum "$library.distrib")" ] || fail "$library.distrib is not that of the new nbdkit"
dpkg --verify nbdkit-cow-filter >"$work/output"
[ ! -s "$work/output" ] || fail "changed: $(cat -- "$work/output")"
quietly dpkg -P nbdkit-cow-filter
quietly dpkg -i "$work/nbdkit.deb"
unchanged

begin 'removed and purged'
apt_get install "$ours"
apt_get remove nbdkit-cow-filter
[ "$c_filter" = "$(sum "$library")" ] || fail "nbdkit's filter is not back"
[ "$c_page" = "$(sum "$page.gz")" ] || fail "nbdkit's manual page is not back"
gone "$library.distrib"
gone "$kept_page"
shown 'nbdkit'
apt_get purge nbdkit-cow-filter
unchanged

begin 'before nbdkit, and after it'
quietly dpkg --force-depends -P nbdkit
quietly dpkg -i "$ours" "$work/nbdkit.deb"
installed
quietly dpkg --force-depends -P nbdkit
quietly dpkg -P nbdkit-cow-filter
gone "$library"
gone "$library.distrib"
quietly dpkg -i "$work/nbdkit.deb"
unchanged

begin 'without manual pages'
quietly dpkg --path-exclude='/usr/share/man/*' -i "$work/nbdkit.deb" "$ours"
gone "$page.gz"
quietly dpkg -i "$ours"
quietly dpkg -i "$ours" # whose page must not be taken for nbdkit's
gone "$kept_page"
quietly dpkg -P nbdkit-cow-filter
gone "$page.gz"
quietly dpkg -i "$work/nbdkit.deb"
unchanged

# ---------------------------------------------------------------------------------

begin 'over a make install'
make_it install
by_hand=$(snapshot)
refused dpkg -i "$work/ours-broken.deb"
diff <(cat <<<"$by_hand") <(snapshot) >&2 || fail 'a package that can not be unpacked has changed it'
apt_get install "$ours"
installed
works
shown "$our_title"
gone "$record"
purge_leaves_nothing

begin 'over a make install of an earlier version'
make_it install
for file in "$library" "$page.gz"; do quietly dpkg-divert --local --no-rename --remove "$file"; done
mv -- "$kept_page" "$man1/nbdkit-cow-filter.distrib.1.gz"
quietly dpkg-divert --local --no-rename --divert "$library.distrib" --add "$library"
quietly dpkg-divert --local --no-rename --divert "$man1/nbdkit-cow-filter.distrib.1.gz" --add "$page.gz"
rm -r -- "${record%/*}"
quietly dpkg -i "$ours"
installed
purge_leaves_nothing

begin 'over a make install with leftovers, and beside another'
make_it install
FILTERDIR=$work/other MANDIR=$work/other/man make_it install
touch -- "$library.new" "$page.new" "$record.new"
quietly dpkg -i "$ours"
grep -qxF "$work/other/nbdkit-cow-filter.so"$'\t'"$work/other/man/man1/nbdkit-cow-filter.1" "$record" ||
    fail 'the other install is forgotten'
[ "$(wc -l <"$record")" -eq 1 ] || fail "the record is: $(cat -- "$record")"
make_it uninstall
installed
gone "$work/other/nbdkit-cow-filter.so"
purge_leaves_nothing

begin 'over a make install that nbdkit has been upgraded under'
make_it install
quietly dpkg -i "$work/nbdkit-revision.deb"
quietly dpkg -i "$ours"
installed "$changed_filter" "$changed_page"
quietly dpkg -P nbdkit-cow-filter
quietly dpkg -i "$work/nbdkit.deb"
unchanged

# Stand-ins for what changes something in the scripts. The one that is called when so
# many have been called as the file "left" says ends its script as kill -9 does, and
# does nothing itself.
mkdir -- "$work/cut"
for command in dpkg-divert install mv rm; do
    cat >"$work/cut/$command" <<STAND_IN
#!/bin/sh
case " \$*" in
*" --truename "* | *" --listpackage "*) ;;
*)
    left=\$(cat "$work/left")
    echo \$((left - 1)) >"$work/left"
    if [ "\$left" -eq 0 ]; then kill -9 \$PPID; exit 1; fi
    ;;
esac
exec $(type -P "$command") "\$@"
STAND_IN
done
chmod 755 -- "$work"/cut/*
# Whether the command was cut short at this step.
cut_short_at() {
    echo "$1" >"$work/left"
    shift
    # Without the shell's word that it was killed.
    { PATH=$work/cut:$PATH "$@" >"$work/output" 2>&1 </dev/null || :; } 2>/dev/null
    [ "$(cat -- "$work/left")" -lt 0 ]
}

begin 'over a make install that was cut short'
steps=0
while cut_short_at "$steps" "$root/packaging/install.sh" install; do
    quietly dpkg -i "$ours"
    installed
    gone "$record"
    purge_leaves_nothing
    steps=$((steps + 1))
done
[ "$steps" -ge 8 ] || fail "only $steps steps"
say "    at $steps steps"
make_it uninstall
quietly dpkg-divert --local --no-rename --divert "$library.distrib" --add "$library" # before it was moved
quietly dpkg -i "$ours"
installed
purge_leaves_nothing

begin 'over a file that is left of a diversion'
echo old >"$library.distrib"
quietly dpkg -i "$ours"
installed
purge_leaves_nothing

begin 'over a package that was cut short'
for earlier in nothing make_it; do
    steps=0
    while
        [ "$earlier" = nothing ] || make_it install
        cut_short_at "$steps" dpkg -i "$ours"
    do
        [ "$(status nbdkit-cow-filter)" != 'ii ' ] || fail "step $steps was not cut short"
        quietly dpkg -i "$ours"
        installed
        gone "$record"
        purge_leaves_nothing
        steps=$((steps + 1))
    done
    [ "$steps" -ge 4 ] || fail "only $steps steps"
    say "    at $steps steps, after $earlier"
    purge_leaves_nothing
done

begin 'a package that was cut short, and is given up'
steps=0
while cut_short_at "$steps" dpkg -i "$ours"; do
    purge_leaves_nothing
    steps=$((steps + 1))
done
[ "$steps" -ge 4 ] || fail "only $steps steps"
say "    at $steps steps"
purge_leaves_nothing

begin 'a package that is given up after its removal was cut short'
steps=0
while
    quietly dpkg -i "$ours"
    cut_short_at "$steps" dpkg -P nbdkit-cow-filter
do
    purge_leaves_nothing
    steps=$((steps + 1))
done
[ "$steps" -ge 2 ] || fail "only $steps steps"
say "    at $steps steps"
unchanged

begin 'a package that can not be unpacked'
refused dpkg -i "$work/ours-broken.deb"
said 'trying to overwrite'
purge_leaves_nothing # which dpkg may remember

begin 'over a package whose unpacking has ended with the power'
refused dpkg -i "$work/ours-cut.deb"
[[ $(dpkg-divert --list '*nbdkit-cow-filter*') == *' by nbdkit-cow-filter'* ]] || fail 'nothing was diverted'
refused "$root/packaging/install.sh" install
said 'apt-get remove nbdkit-cow-filter'
quietly dpkg -i "$ours"
installed
purge_leaves_nothing

begin 'a package whose preinst has ended with the power, under which nbdkit is upgraded'
# The diversion is there, and nothing is moved.
repack "$ours" "$work/ours-early.deb" \
    "in_control 's/^Version: .*/&.2/'; sed -i '/mv -f .* ..kept.\$/s/.*/kill -9 \$PPID \$\$/' DEBIAN/preinst"
refused dpkg -i "$work/ours-early.deb"
[[ $(dpkg-divert --list "$library") == *' by nbdkit-cow-filter' ]] || fail 'nothing was diverted'
quietly dpkg -i "$work/nbdkit-revision.deb"
{ [ -e "$library" ] && [ -e "$library.distrib" ]; } || fail 'no older file is in the way'
quietly dpkg -i "$ours"
installed "$changed_filter" "$changed_page"
quietly dpkg -P nbdkit-cow-filter
quietly dpkg -i "$work/nbdkit.deb"
unchanged

begin "an administrator's own filter"
quietly dpkg-divert --local --rename --add "$library" # dpkg-divert chooses the name
echo own >"$library"
theirs=$(snapshot)
refused dpkg -i "$ours"
said "$library is in the place of nbdkit's own"
quietly dpkg -P nbdkit-cow-filter
diff <(cat <<<"$theirs") <(snapshot) >&2 || fail 'it has been changed'
rm -- "$library"
quietly dpkg-divert --local --rename --remove "$library"
unchanged
mkdir -- "$library.distrib"
refused dpkg -i "$ours"
said "$library.distrib is a directory"
quietly dpkg -P nbdkit-cow-filter
rmdir -- "$library.distrib"
unchanged

begin 'what somebody else has diverted'
for whose in --local '--package somebody'; do
    # shellcheck disable=SC2086 # two words
    quietly dpkg-divert $whose --rename --divert "$page.gz.theirs" --add "$page.gz"
    theirs=$(snapshot)
    refused dpkg -i "$ours"
    said "$page.gz is diverted to $page.gz.theirs"
    quietly dpkg -P nbdkit-cow-filter
    diff <(cat <<<"$theirs") <(snapshot) >&2 || fail 'it has been changed'
    # shellcheck disable=SC2086
    quietly dpkg-divert $whose --rename --remove "$page.gz"
    unchanged
done

say 'The Debian package: all tests passed.'
