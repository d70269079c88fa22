#!/usr/bin/env bash
# Checks the crates that the filter is built from, by packaging/deny.toml: their licences,
# where they come from, which are there twice, and whether an advisory warns of one.
. "$(dirname -- "$0")/common.sh"
need_cargo

# The last one that Debian 13's compiler builds.
need_cargo_program cargo-deny 0.18.3

deny() { cargo-deny --manifest-path "$root/Cargo.toml" --locked "$@" --config "$root/packaging/deny.toml"; }
deny check licenses bans sources
# A database that is out of reach says nothing of the crates.
if deny fetch db; then
    deny check --disable-fetch advisories
else
    say 'The database of advisories is out of reach: they were not checked.'
fi
