#!/usr/bin/env bash
# Builds the RPM for the nbdkit whose header is installed, from the tarballs of make dist,
# and says where it is. Also on Debian, whose rpmbuild makes a package for Fedora.
. "$(dirname -- "$0")/common.sh"
need_cargo
have rpmbuild || die 'rpmbuild is missing: run packaging/deps.sh package.'
pkg-config --exists nbdkit || die "nbdkit's development files were not found by pkg-config: install them."

spec=$root/packaging/rpm/nbdkit-cowrs-filter.spec
packaged=$(sed -n 's/^Version: *//p' "$spec")
[ "$packaged" = "$(version)" ] ||
    die "$spec is for version $packaged, Cargo.toml for $(version): set it there, and add an entry to its changelog."

top=$(target_dir)/rpm
[[ $top != *[[:space:]]* ]] || die "rpmbuild can't work in $top, because of the space in the name: set CARGO_TARGET_DIR."
"$root/packaging/dist.sh" >/dev/null
rm -rf -- "$top"
mkdir -p -- "$top"

# Where the packages of the system are not rpm's it finds none of what it needs.
options=()
rpm -q rpm >/dev/null 2>&1 || options=(--nodeps)
# The build has a tree of its own, and a directory in there where cargo builds.
(
    unset CARGO_TARGET_DIR
    rpmbuild -bb "${options[@]}" --define "_topdir $top" --define "_sourcedir ${top%/*}/dist" "$spec"
) >"$top/log" 2>&1 || die "rpmbuild failed; all it said is in $top/log
$(tail -n 20 -- "$top/log")"
# Where there are the means, rpmbuild puts debugging symbols into a package of their own.
find "$top/RPMS" -name '*.rpm' ! -name '*-debuginfo-*'
