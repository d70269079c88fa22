#!/usr/bin/env bash
# Builds the filter and its manual page: build.sh [library|manual].
# build.sh library OPTION... gives cargo these options; build.sh clean removes what it built.
. "$(dirname -- "$0")/common.sh"

build_library() {
    need_cargo
    cargo_release build --release --manifest-path "$root/Cargo.toml" "$@"
}

build_manual() {
    local page version
    have pod2man || die 'pod2man is missing: it comes with perl (package perl or perl-podlators).'
    page=$(manual)
    version=$(version)
    mkdir -p -- "$(dirname -- "$page")"
    # Written beside and moved: a page that failed half-way is never installed.
    # The name of the project, and what is said of nbdkit's own filter, stay as they are
    # in a page of another name.
    sed -e "s/--filter=cow\b/--filter=$filter_name/g" \
        -e "s/nbdkit-cow-filter\( - \|\.so\)/nbdkit-$filter_name-filter\1/" "$manual_source" |
        pod2man --errors=die --utf8 --section=1 --name="nbdkit-$filter_name-filter" \
            --center='nbdkit copy-on-write filter' \
            --release="nbdkit-cow-filter${version:+ $version}" - "$page.new"
    mv -- "$page.new" "$page"
}

case ${1:-all} in
library) build_library "${@:2}" ;;
manual) build_manual ;;
all)
    build_library
    build_manual
    ;;
clean)
    need_cargo
    cargo clean --manifest-path "$root/Cargo.toml"
    ;;
*) die "build.sh: unknown part '$1': library, manual or clean" ;;
esac
