#!/usr/bin/env bash
# Runs every test. The tests under nbdkit load the library that cargo builds for
# them, so nothing has to be built before.
. "$(dirname -- "$0")/common.sh"
need_cargo
cd -- "$root"
cargo test --no-fail-fast
tests/packaging/install.sh
packaging/model-check.sh
packaging/fuzz.sh 45
