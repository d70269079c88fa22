#!/usr/bin/env bash
# Tests that make dist gives the same bytes from every checkout, that its tarballs build
# without a network to the same bytes in every directory, and what a distribution wants of
# the library: how it is linked, what it exports and needs, and no path of this machine.
# dist.sh tarballs: only the first of these, which needs a checkout.
. "$(dirname -- "$0")/../../packaging/common.sh"
need_cargo
name=nbdkit-cow-filter-$(version)
library=target/release/libnbdkit_cow_filter.so

# Where cargo builds, because /tmp is often small and in memory.
mkdir -p -- "$(target_dir)"
work=$(mktemp -d -- "$(target_dir)/dist-test.XXXXXX")
trap 'rm -rf -- "$work"' EXIT
# Whatever the user builds with is not what is tested.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS SOURCE_DATE_EPOCH

fail() { die "FAILED: $*"; }

# Runs the command of both, at the same time, in two directories.
twice() {
    local directory command=$1 pids=() pid status=0
    for directory in "$work/one" "$work/the other/of two"; do
        mkdir -p -- "$directory"
        (cd -- "$directory" && "$command") >"$directory.log" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=1; done
    [ "$status" -eq 0 ] || fail "$command: $(tail -n 20 -- "$work"/one.log "$work"/the\ other/*.log)"
}
same() {
    cmp -- "$work/one/$1" "$work/the other/of two/$1" || fail "two runs have made different files $1"
}

# A checkout with the files of this one, as they are here. In one of them with the umask
# of a careful user.
make_dist() {
    [ "${PWD##*/}" = one ] || umask 077
    git clone -q --no-checkout "$root" checkout
    git -C "$root" ls-files -z | while IFS= read -r -d '' file; do
        [ ! -e "$root/$file" ] || printf '%s\0' "$file"
    done | tar -c -C "$root" --null --verbatim-files-from -T - | tar -x --no-same-permissions -C checkout
    git -C checkout add --all --force
    CARGO_TARGET_DIR=$PWD/target checkout/packaging/dist.sh
    mv -- target/dist .
}
copy_dist() {
    "$root/packaging/dist.sh"
    cp -R -- "$(target_dir)/dist" .
}

# No crate can come from anywhere but from the tarball.
build() {
    local offline=()
    if [ "$(id -u)" -eq 0 ] && unshare --net true 2>/dev/null; then
        offline=(unshare --net)
    fi
    tar -x --no-same-permissions -f "dist/$name.tar.xz"
    tar -x --no-same-permissions -f "dist/$name-vendor.tar.xz"
    cd -- "$name"
    # With a home of cargo's that is empty. rustup's, which has the toolchain, stays.
    RUSTUP_HOME=${RUSTUP_HOME:-$HOME/.rustup} CARGO_HOME=$PWD/home CARGO_TARGET_DIR=$PWD/target \
        "${offline[@]}" packaging/build.sh library --offline --frozen
}

# The lines of readelf that are not as they have to be.
linked_as_it_should() {
    local file=$1 dynamic segments exported
    dynamic=$(readelf --wide --dynamic -- "$file")
    segments=$(readelf --wide --segments -- "$file")
    grep -q BIND_NOW <<<"$dynamic" || fail "$file: symbols are bound late"
    ! grep -q TEXTREL <<<"$dynamic" || fail "$file: there are relocations in the code"
    grep -q GNU_RELRO <<<"$segments" || fail "$file: what is relocated stays writable"
    grep -qE 'GNU_STACK .* RW +0' <<<"$segments" || fail "$file: the stack is executable"
    if sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' <<<"$dynamic" |
        grep -vxE 'libc\.so\.6|libgcc_s\.so\.1|ld-linux[^/]*'; then
        fail "$file: it needs that, too"
    fi
    exported=$(readelf --wide --dyn-syms -- "$file" |
        awk '$7 ~ /^[0-9]+$/ && $5 != "LOCAL" { print $8 }' | sort | paste -sd ' ')
    [ "$exported" = 'cow_debug_verbose filter_init' ] || fail "$file: it exports $exported"
}

no_path_of_this_machine() {
    local file=$1 path
    for path in "$root" "$work" "${CARGO_HOME:-$HOME/.cargo}" "$HOME/"; do
        # Without what stands for the paths, which may end as the real one does. Not
        # grep -q, which would end before sed does, and fail it.
        ! LC_ALL=C sed 's|/usr/src/||g' -- "$file" | grep -aF -e "$path" >/dev/null ||
            fail "$file: the path $path is in it"
    done
}

if [ -e "$root/.git" ]; then
    say 'make dist, in two checkouts'
    twice make_dist
else
    # The tree comes from tarballs, which are there.
    twice copy_dist
fi
same "dist/$name.tar.xz"
same "dist/$name-vendor.tar.xz"
[ "${1:-}" != tarballs ] || exit 0
say 'Building twice from the tarballs, without a network'
twice build
same "$name/$library"
linked_as_it_should "$work/one/$name/$library"
no_path_of_this_machine "$work/one/$name/$library"
told=$(nbdkit -fv --filter="$work/one/$name/$library" null --run true 2>&1)
grep -qxF "nbdkit: debug: cow: nbdkit-cow-filter version $(version)" <<<"$told" ||
    fail "the library does not say its version: $told"
say 'The library of make'
"$root/packaging/build.sh" library
linked_as_it_should "$(library)"
no_path_of_this_machine "$(library)"
say 'The tarballs and what is built from them: all tests passed.'
