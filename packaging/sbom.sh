#!/usr/bin/env bash
# Lists the crates that are linked into the library, where cargo builds, in sbom/: a bill
# of materials for programs (CycloneDX), and the licences with their texts.
. "$(dirname -- "$0")/common.sh"
need_cargo
have python3 || die 'python3 is missing: run packaging/deps.sh package.'
sbom=$(target_dir)/sbom
mkdir -p -- "$sbom"
cd -- "$root"
# Dependencies of other systems are not in there.
host=$(rustc -vV | sed -n 's/^host: //p')
python3 packaging/sbom.py "$host" "$sbom"
printf '%s\n' "$sbom/nbdkit-cow-filter.cdx.json" "$sbom/LICENSES-of-crates"
