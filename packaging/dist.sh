#!/usr/bin/env bash
# Makes the tarballs that a distribution builds from, where cargo builds, in dist/:
#
#   nbdkit-cow-filter-VERSION.tar.xz         the files that git tracks
#   nbdkit-cow-filter-VERSION-vendor.tar.xz  all crates of the lock files, in vendor/, and
#                                            the settings that make cargo use them
#
# Both have the same directory at the top. Unpacked over each other they are built
# without a network: cargo build --release --offline --frozen, or, for the same bytes in
# every directory, packaging/build.sh library --offline --frozen.
#
# The same files give the same bytes, whoever makes the tarballs and wherever: the order,
# the owners, the modes and the times are set here. The time is that of the last commit,
# or SOURCE_DATE_EPOCH. Only which files of a crate go to vendor/ is cargo's to say, and
# not the same in all of its versions.
. "$(dirname -- "$0")/common.sh"
need_cargo
# These would add options to what is called here.
unset TAR_OPTIONS XZ_OPT XZ_DEFAULTS

name=nbdkit-cow-filter-$(version)
dist=$(target_dir)/dist
tarballs=("$dist/$name.tar.xz" "$dist/$name-vendor.tar.xz")

# Git knows which files belong in there. Without it, in a tree that comes from such a
# tarball, only the tarballs that somebody has put there can be used.
if ! [ -e "$root/.git" ]; then
    for tarball in "${tarballs[@]}"; do
        [ -e "$tarball" ] || die "$root is no checkout of git: copy $tarball from where it was made."
        printf '%s\n' "$tarball"
    done
    exit
fi

for command in git tar xz; do
    have "$command" || die "$command is missing: run packaging/deps.sh package."
done
git -C "$root" diff --quiet HEAD -- ||
    say 'The tarballs have changes that are not committed.' >&2
time=${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct)}
mkdir -p -- "$dist"
work=$(mktemp -d -- "$dist/work.XXXXXX")
trap 'rm -rf -- "$work"' EXIT

# Packs the directories that are named, all of them below $name.
pack() {
    local tarball=$1
    shift
    # Written beside and moved: what is there is always whole. A higher level of xz takes
    # twice as long and saves a tenth.
    tar -c --format=gnu --sort=name --owner=root:0 --group=root:0 --mode=a=rX,u+w \
        --mtime="@$time" -C "$work" -- "$@" | xz -T1 -3 >"$tarball.new"
    mv -- "$tarball.new" "$tarball"
    printf '%s\n' "$tarball"
}

# Of a file that is deleted but tracked, nothing is left to pack.
mkdir -- "$work/$name"
(
    cd -- "$root"
    git ls-files -z | while IFS= read -r -d '' file; do
        if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi
    done | tar -c --no-recursion --null --verbatim-files-from -T - | tar -x -C "$work/$name"
)
pack "${tarballs[0]}" "$name"

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
pack "${tarballs[1]}" "$name/.cargo" "$name/vendor"
