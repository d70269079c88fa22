"""Writes which crates are linked into the library: sbom.py TARGET DIRECTORY

Two files go to the directory: a bill of materials in the format of CycloneDX 1.5, and the
licences of the crates, whose texts most of them want to be passed on with the library.
The same sources give the same bytes.

Not cargo-cyclonedx: it does not collect the texts, and a package is built without a
network, where it can't be installed.
"""

import json
import pathlib
import re
import subprocess
import sys
import tomllib

LICENCE_FILE = re.compile(r"(licen[cs]e|copying|copyright|notice)", re.IGNORECASE)


def linked(target):
    """Our own package, and those that are linked into it, in the order of their names."""
    # cargo metadata would add what only the features of build and test dependencies ask
    # for; cargo tree knows what is left out, but not where it is.
    tree = output_of(
        *("cargo", "tree", "--locked", "--target", target, "--edges", "normal,no-proc-macro"),
        *("--prefix", "none", "--format", "{p}"),
    )
    names = {tuple(line.split()[:2]) for line in tree.splitlines()}
    metadata = json.loads(
        output_of("cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", target)
    )
    root = metadata["resolve"]["root"]
    packages = [package for package in metadata["packages"] if (package["name"], f"v{package['version']}") in names]
    packages.sort(key=lambda package: (package["name"], package["version"]))
    ours = next(package for package in packages if package["id"] == root)
    return ours, [package for package in packages if package["id"] != root]


def purl(package):
    return f"pkg:cargo/{package['name']}@{package['version']}"


def component(package, checksums):
    described = {
        "type": "library",
        "bom-ref": purl(package),
        "name": package["name"],
        "version": package["version"],
        "licenses": [{"expression": package["license"].replace("/", " OR ")}],
        "purl": purl(package),
    }
    if checksum := checksums.get((package["name"], package["version"])):
        described["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    return described


def standard_library(release):
    return {
        "type": "library",
        "bom-ref": f"pkg:generic/rust-std@{release}",
        "name": "rust-std",
        "version": release,
        "description": "Rust's standard library, as it comes with the compiler",
        "licenses": [{"expression": "MIT OR Apache-2.0"}],
        "purl": f"pkg:generic/rust-std@{release}",
    }


def bill_of_materials(ours, crates, checksums, rust):
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": component(ours, checksums)},
        "components": [*(component(crate, checksums) for crate in crates), standard_library(rust)],
    }


def licences(crates):
    """The licence of each crate, then each text once."""
    lines = ["The crates that are linked into the library, and their licences", ""]
    texts = {}
    for crate in crates:
        name = f"{crate['name']} {crate['version']}"
        lines.append(f"{name}: {crate['license']}")
        directory = pathlib.Path(crate["manifest_path"]).parent
        files = sorted(file for file in directory.iterdir() if LICENCE_FILE.match(file.name) and file.is_file())
        if not files:
            sys.exit(f"{name} comes without the text of its licence: {crate['license']}")
        for file in files:
            texts.setdefault(file.read_text().strip(), []).append(f"{name}, {file.name}")
    for text, places in texts.items():
        lines += ["", "-" * 80, *places, "", text]
    return "\n".join(lines) + "\n"


def output_of(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main():
    target, directory = sys.argv[1], pathlib.Path(sys.argv[2])
    ours, crates = linked(target)
    with open("Cargo.lock", "rb") as file:
        checksums = {
            (package["name"], package["version"]): package["checksum"]
            for package in tomllib.load(file)["package"]
            if "checksum" in package
        }
    rust = output_of("rustc", "--version").split()[1]
    bill = bill_of_materials(ours, crates, checksums, rust)
    (directory / "nbdkit-cow-filter.cdx.json").write_text(json.dumps(bill, indent=2) + "\n")
    (directory / "LICENSES-of-crates").write_text(licences(crates))


main()
