#!/usr/bin/env bash
# Builds the Debian package, for the nbdkit whose header is installed, with cargo-deb.
#
# cargo-deb takes what it packs from Cargo.toml, and knows no variables there. So it
# gets a directory of its own, with a copy in which they are filled in.
. "$(dirname -- "$0")/common.sh"
need_cargo

for command in pkg-config dpkg-shlibdeps dpkg-parsechangelog strip xz; do
    have "$command" || die "$command is missing: make deb needs Debian's packages pkg-config, dpkg-dev, binutils and xz-utils."
done

target=$(target_dir)
need_cargo_deb
# The package is for this system, and takes the library from where cargo builds for it.
unset CARGO_BUILD_TARGET

nbdkit=$(pkg-config --modversion nbdkit) ||
    die "nbdkit's development files were not found by pkg-config: install nbdkit-plugin-dev."
filterdir=$(pkg-config --variable=filterdir nbdkit)
crate_version=$(version)
changelog=$root/packaging/debian/changelog
debian_version=$(dpkg-parsechangelog -l "$changelog" -S Version)
[ "${debian_version%-*}" = "$crate_version" ] ||
    die "$changelog is about version $debian_version, Cargo.toml about $crate_version: add an entry."
# A package for a later nbdkit replaces one for an earlier.
version=$debian_version+nbdkit$nbdkit

"$root/packaging/build.sh"

stage=$target/debian-package
# Only this package is there afterwards: the pattern by which it is installed, and tested,
# would match that of another version as well.
rm -rf -- "$stage" "$target"/debian/nbdkit-cow-filter_*.deb
mkdir -p -- "$stage/scripts" "$stage/files/doc"

# The arguments are files, or the text comes from stdin.
fill_in() { sed -e "s|@NBDKIT@|$nbdkit|g" -e "s|@FILTERDIR@|${filterdir#/}|g" -- "$@"; }
packed() { gzip -9n; }

# The crates that are linked into the library, as Debian's copyright file has them. MIT
# wants the lines of their authors to go with each copy.
linked_crates() {
    local directories crate crate_version licence directory holders
    directories=$(cargo metadata --locked --format-version 1 --manifest-path "$root/Cargo.toml" \
        --filter-platform "$(rustc -vV | sed -n 's/^host: //p')" |
        grep -o '"manifest_path":"[^"]*"' | sed 's|.*:"\(.*\)/Cargo.toml"|\1|')
    while read -r crate crate_version licence; do
        [ "$crate" != nbdkit-cow-filter ] || continue
        [[ $licence == *MIT* ]] || die "$crate can't be had under MIT, but $licence: see packaging/debian/copyright."
        directory=$(grep -E "/$crate(-${crate_version#v})?\$" <<<"$directories")
        # Not the blanks to be filled in that are in the text of Apache's licence.
        holders=$(find "$directory" -maxdepth 1 -iname 'LICEN[CS]E*' -exec sed -nE \
            '/notice|[[{]/d; s/^ *Copyright (\([Cc]\)|©)? *(.*)$/\2/p' {} + | sort -u | paste -sd ';')
        holders=${holders//;/,$'\n' }
        printf '\nFiles: vendor/%s/*\nCopyright: %s\nLicense: MIT\nComment: Version %s.\n' \
            "$crate" "${holders:-the authors of $crate}" "${crate_version#v}"
    done < <(cargo tree --locked -e normal --prefix none -f '{p} {l}' --manifest-path "$root/Cargo.toml" |
        sed 's/ ([/*][^)]*)//' | sort -u)
}

fill_in "$root/Cargo.toml" >"$stage/Cargo.toml"
# cargo asks that they are there.
ln -s -- "$root"/{src,tests,build.rs} "$stage/"
for script in preinst postinst postrm; do
    fill_in "$root/packaging/debian/$script" >"$stage/scripts/$script"
done
packed <"$(manual)" >"$stage/files/nbdkit-cow-filter.1.gz"
cp -- "$root/packaging/debian/lintian-overrides" "$stage/files/"
fill_in "$root/packaging/debian/README.Debian" >"$stage/files/doc/README.Debian"
sed "1s/(.*)/($version)/" "$changelog" | packed >"$stage/files/doc/changelog.Debian.gz"
packed <"$root/CHANGELOG.md" >"$stage/files/doc/changelog.gz"
{
    cat -- "$root/packaging/debian/copyright"
    echo 'License: BSD-3-Clause'
    # The licence without the line of who has the copyright, as the format wants it.
    sed -e '1,/^$/d' -e 's/^$/./' -e 's/^/ /' "$root/LICENSE"
    linked_crates
} >"$stage/files/copyright"

SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(dpkg-parsechangelog -l "$changelog" -S Timestamp)}
CARGO_TARGET_DIR=$target
export SOURCE_DATE_EPOCH CARGO_TARGET_DIR
# Not --quiet, which would keep back that dpkg-shlibdeps has failed.
cargo-deb --no-build --deb-version "$version" --manifest-path "$stage/Cargo.toml"
