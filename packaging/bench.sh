#!/usr/bin/env bash
# Measures the filter against no filter, the C filter and qemu-nbd, and writes
# docs/performance; with QUICK=1 for a minute only, and into target/bench.
. "$(dirname -- "$0")/common.sh"
need_cargo
cd -- "$root"
cargo bench --bench bench
