#!/usr/bin/env bash
# Makes the tarballs that a distribution builds from, where cargo builds, in dist/:
#
#   nbdkit-cow-filter-VERSION.tar.xz         the files that git tracks
#   nbdkit-cow-filter-VERSION-vendor.tar.xz  all crates of the lock files, in vendor/, and
#                                            the settings that make cargo use them
#
# Both have the same directory at the top. Unpacked over each other they are built
# without a network: cargo build --release --offline --frozen.
#
# The same files give the same bytes, whoever makes the tarballs and wherever: the order,
# the owners, the modes and the times are set here. The time is that of the last commit,
# or SOURCE_DATE_EPOCH.
. "$(dirname -- "$0")/common.sh"
need_cargo
for command in git tar xz; do
    have "$command" || die "$command is missing: run packaging/deps.sh package."
done
# These would add options to what is called here.
unset TAR_OPTIONS XZ_OPT XZ_DEFAULTS

[ "$(git -C "$root" rev-parse --show-prefix 2>/dev/null || echo no)" = '' ] ||
    die "$root is not a checkout of git, which knows the files that belong in the tarball."
git -C "$root" diff --quiet HEAD -- ||
    say 'The tarballs have changes that are not committed.' >&2
time=${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct)}

name=nbdkit-cow-filter-$(version)
dist=$(target_dir)/dist
mkdir -p -- "$dist"
work=$(mktemp -d -- "$dist/work.XXXXXX")
trap 'rm -rf -- "$work"' EXIT

# Packs the directories that are named, all of them below $name.
pack() {
    local tarball=$1
    shift
    # Written beside and moved: what is there is always whole.
    tar -c --format=gnu --sort=name --owner=root:0 --group=root:0 --mode=a=rX,u+w \
        --mtime="@$time" -C "$work" -- "$@" | xz -T1 >"$dist/$tarball.new"
    mv -- "$dist/$tarball.new" "$dist/$tarball"
    printf '%s\n' "$dist/$tarball"
}

# Of a file that is deleted but tracked, nothing is left to pack.
mkdir -- "$work/$name"
(
    cd -- "$root"
    git ls-files -z | while IFS= read -r -d '' file; do
        if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi
    done | tar -c --no-recursion --null --verbatim-files-from -T - | tar -x -C "$work/$name"
)
pack "$name.tar.xz" "$name"

# For the tests as well: what they need is in the lock file too, and the fuzz target has
# one of its own.
(
    cd -- "$work/$name"
    cargo vendor --quiet --locked --sync tests/fuzz/Cargo.toml vendor
    mkdir -p .cargo
    cat >.cargo/config.toml <<'SETTINGS'
[net]
offline = true

[source.crates-io]
replace-with = "vendored-sources"

[source.vendored-sources]
directory = "vendor"
SETTINGS
)
pack "$name-vendor.tar.xz" "$name/.cargo" "$name/vendor"
