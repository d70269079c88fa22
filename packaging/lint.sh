#!/usr/bin/env bash
# Everything that is checked without running the filter. Goes on after a
# failure, so that one run shows all there is to mend.
. "$(dirname -- "$0")/common.sh"
need_cargo
cd -- "$root"

failed=()
section() {
    local name=$1
    shift
    printf '\n--- %s\n' "$name"
    "$@" || failed+=("$name")
}

documentation() { RUSTDOCFLAGS='-D warnings' cargo doc --no-deps; }

manual_page() {
    podchecker -warnings -warnings "$manual_source" &&
        pod2man --errors=die --utf8 "$manual_source" >/dev/null
}

scripts=(packaging/*.sh tests/packaging/*.sh .ci/run)
# Of the Debian package, for sh.
package_scripts=(packaging/debian/{preinst,postinst,postrm,tests/smoke})
syntax() {
    local script status=0
    for script in "${scripts[@]}"; do
        bash -n "$script" || status=1
    done
    for script in "${package_scripts[@]}"; do
        sh -n "$script" || status=1
    done
    return "$status"
}

# The figures in README.md are those that make bench wrote, not typed ones.
figures() {
    local page=docs/performance/README.md line count=0 status=0
    while IFS= read -r line; do
        count=$((count + 1))
        if ! grep -qxF -e "$line" "$page"; then
            printf 'README.md: not a line of %s: %s\n' "$page" "$line" >&2
            status=1
        fi
    done < <(sed -n '/^## How fast$/,/^## /p' README.md | grep '^|')
    if [ "$count" -eq 0 ]; then
        echo 'README.md: there is no table under "How fast".' >&2
        status=1
    fi
    return "$status"
}

section 'cargo fmt' cargo fmt --check
section 'cargo fmt, fuzz target' cargo fmt --check --manifest-path tests/fuzz/Cargo.toml
section 'cargo clippy' cargo clippy --all-targets -- -D warnings
section 'cargo clippy, fuzz target' packaging/fuzz.sh clippy
section 'cargo doc' documentation
section 'manual page' manual_page
section 'figures in README.md' figures
section 'shell syntax' syntax
section 'shellcheck' shellcheck --external-sources --source-path=SCRIPTDIR "${scripts[@]}" "${package_scripts[@]}"

echo
if [ "${#failed[@]}" -gt 0 ]; then
    printf -v list '%s, ' "${failed[@]}"
    die "Failed: ${list%, }"
fi
say 'All lints passed.'
