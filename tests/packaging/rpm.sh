#!/usr/bin/env bash
# Tests the RPM: what is in it, what it needs, and that its filter works in nbdkit by the
# name of cowrs, beside nbdkit's own. Nothing is installed: nbdkit sees its directory of
# filters with one more file.
. "$(dirname -- "$0")/../../packaging/common.sh"
need_cargo
[ "$(id -u)" -eq 0 ] || die 'This test needs root, to show nbdkit another directory of filters.'
for command in rpm rpm2cpio cpio rpmlint nbdkit qemu-io; do
    have "$command" || die "$command is missing: run packaging/deps.sh package."
done
fail() { die "FAILED: $*"; }
# The first argument is a list, the others are its lines.
is() {
    local found=$1
    shift
    diff <(printf '%s\n' "$@") <(cat <<<"$found") >&2 || fail 'this is not as it should be'
}

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
package=$("$root/packaging/rpm.sh")
[ -f "$package" ] || fail "no package: $package"
query() { rpm --query --package "$package" "$@"; }

nbdkit_version=$(pkg-config --modversion nbdkit)
name=nbdkit-cowrs-filter
version=$(query --queryformat '%{version}-%{release}')
isa=$(rpm --eval '%{?_isa}')
filters=$(rpm --eval '%{_libdir}/nbdkit/filters')
mandir=$(rpm --eval '%{_mandir}')

say 'What is in it'
is "$(query --queryformat '[%{filemodes:perms} %{fileusername} %{filenames}\n]' | grep -v '^d' |
    grep -v '/\.build-id' | sed -e 's/\.gz$//' -e "s,/$name-${version%-*}/,/$name/," | sort -k 3)" \
    "-rwxr-xr-x root $filters/$name.so" \
    "-rw-r--r-- root /usr/share/doc/$name/CHANGELOG.md" \
    "-rw-r--r-- root /usr/share/doc/$name/README.md" \
    "-rw-r--r-- root /usr/share/doc/$name/nbdkit-cow-filter.cdx.json" \
    "-rw-r--r-- root /usr/share/licenses/$name/LICENSE" \
    "-rw-r--r-- root /usr/share/licenses/$name/LICENSES-of-crates" \
    "-rw-r--r-- root $mandir/man1/$name.1"
[ -z "$(query --scripts)$(query --triggers)" ] || fail "it has scripts: $(query --scripts)"

say 'What it needs and offers'
is "$(query --provides | sort)" "$name = $version" "$name$isa = $version"
is "$(query --requires | grep -vE '^(rpmlib|libc\.so\.6|libgcc_s\.so\.1|ld-linux[^ ]*\.so\.[0-9]|rtld)\(')" \
    "nbdkit-server$isa = $nbdkit_version"

say 'rpmlint'
rpmlint --config "$root/packaging/rpm/rpmlint.toml" "$package" "$root/packaging/rpm/$name.spec" >"$work/rpmlint" 2>&1 ||
    fail "$(cat -- "$work/rpmlint")"
grep -qE ' 0 errors, 0 warnings' "$work/rpmlint" || fail "$(cat -- "$work/rpmlint")"

say 'Its filter in nbdkit'
(cd -- "$work" && rpm2cpio "$package" | cpio --extract --make-directories --quiet)
system_filters=$(nbdkit --dump-config | sed -n 's/^filterdir=//p')
mkdir -- "$work/filters"
cp -- "$system_filters"/nbdkit-*-filter.so "$work$filters/$name.so" "$work/filters/"
truncate -s 1M -- "$work/disk"
sum=$(sha256sum -- "$work/disk")
# As a user of the package types it.
# shellcheck disable=SC2016 # for the shell that nbdkit starts
told=$(unshare --mount --propagation private sh -ec '
    mount --bind "$1" "$2"
    nbdkit -v -D cow.verbose=1 --filter=cowrs file file="$3" cow-block-size=8192 --run "
        qemu-io -f raw -c \"write -P 0x58 512 512\" -c \"read -P 0x58 512 512\" \$uri"
' sh "$work/filters" "$system_filters" "$work/disk" 2>&1) || fail "$told"
for words in "registered filter $system_filters/nbdkit-cowrs-filter.so (name cow)" \
    "cow: nbdkit-cow-filter version $(version)" 'block size 8192' 'request: write 512 bytes' 'wrote 512/512' 'read 512/512'; do
    grep -qF -e "$words" <<<"$told" || fail "nbdkit does not say '$words', but: $told"
done
! grep -q 'Pattern verification failed' <<<"$told" || fail "what was written is not there: $told"
[ "$sum" = "$(sha256sum -- "$work/disk")" ] || fail 'the disk has changed'
told=$(man --local-file "$work$mandir/man1/$name.1"* 2>/dev/null | cat) || :
for words in "$name - write to a disk without changing it" 'nbdkit --filter=cowrs PLUGIN'; do
    grep -qF -e "$words" <<<"$told" || fail "the manual page does not say '$words'"
done
say 'The RPM: all tests passed.'
