#!/usr/bin/env bash
# Tests that the bill of materials names all crates that are linked into the library, and
# no others.
. "$(dirname -- "$0")/../../packaging/common.sh"
need_cargo
fail() { die "FAILED: $*"; }

"$root/packaging/build.sh" library
"$root/packaging/sbom.sh" >/dev/null
sbom=$(target_dir)/sbom
# Each component as: name, licence, checksum.
listed=$(python3 - "$sbom/nbdkit-cow-filter.cdx.json" <<'EOP'
import json, sys
bill = json.load(open(sys.argv[1]))
assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
assert bill["metadata"]["component"]["name"] == "nbdkit-cow-filter"
for component in bill["components"]:
    hashes = component.get("hashes", [{"content": "none"}])
    print(component["name"], hashes[0]["content"], component["licenses"][0]["expression"])
EOP
)
std='rust-std none MIT OR Apache-2.0'
grep -qxF "$std" <<<"$listed" || fail "no line '$std' in: $listed"
crates=$(grep -vxF "$std" <<<"$listed")
! grep -vE '^[a-zA-Z0-9_-]+ [0-9a-f]{64} [A-Z(].*' <<<"$crates" || fail 'these have no checksum or no licence'

# What the symbols of the library are from, but for the crates of the standard library,
# which has copies of its own.
linked=$(nm --demangle -- "$(library)" |
    sed -nE 's/^[0-9a-f]+ [a-zA-Z] <*([a-z_0-9]+)::.*/\1/p' | sort -u |
    grep -vxE 'core|alloc|std|panic_unwind|rustc_demangle|compiler_builtins|gimli|addr2line|object|hashbrown|miniz_oxide|adler2?|memchr|unwind|nbdkit_cow_filter|__rustc')
names=$(cut -d ' ' -f 1 <<<"$crates" | tr - _ | sort)
grep -qxF tempfile <<<"$linked" || fail "the library has no symbols of its crates, but of: $linked"
missing=$(comm -23 <(cat <<<"$linked") <(cat <<<"$names"))
[ -z "$missing" ] || fail "linked, but not listed: $missing"

# What only builds or tests the library.
for name in bindgen pkg-config proptest plotters regex; do
    ! grep -q "^$name " <<<"$crates" || fail "$name is listed, but not linked"
done
while read -r name _; do
    grep -qE "^$name [0-9].*: " "$sbom/LICENSES-of-crates" || fail "the licence of $name is missing"
    grep -qE "^$name [0-9].*, [^ ]+$" "$sbom/LICENSES-of-crates" || fail "the text of the licence of $name is missing"
done <<<"$crates"
say 'The bill of materials: all tests passed.'
