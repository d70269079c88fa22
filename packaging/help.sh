#!/usr/bin/env bash
cat <<'TEXT'
make                the same as make build
make build          the filter (release) and its manual page; needs no network
                    beyond what cargo has to fetch
make run            installs what is missing, builds, and serves a small demo
                    disk until Ctrl-C; DISK=path serves that file instead
make check          installs what is missing and runs every test
make check-clients  only the tests with nbdkit and its clients
make check-packages the tests of the Debian and the RPM package; for a system that is
                    thrown away, which THROW_AWAY_SYSTEM=yes says
make check-reliability
                    what happens when something goes wrong: faults, full file systems,
                    limits, leaks, signals, hostile clients (docs/reliability.md);
                    COW_EVERY_ERRNO=1: each system call fails with each errno
make checkers       Miri and ThreadSanitizer over the core, nbdkit with the library under
                    valgrind; the first two need rustup, which fetches its nightly
make check-versions builds and tests it, packages too, in small systems of Debian 12, 13
                    and sid that it makes; SUITES= names others, DEBIAN_MIRROR=
                    where they come from
make check-v2v      has virt-v2v convert a guest in a Debian 13 system, with the C filter
                    and with this one, and writes docs/v2v.md (ten minutes)
make crash          looks at what crashes leave of a kept overlay, at random, until
                    Ctrl-C; CRASH_SEED= begins with that seed; PART=qemu: at what
                    QEMU and guests do to its image, killed or not
make fuzz           installs what is missing, and feeds damaged images to the filter
                    until Ctrl-C or until it finds something
make soak           everything at once, with a model of each part of the disk; MINUTES=
                    says for how long (3 if not set); SEED=, as it has printed it, repeats
                    its rounds
make bench          installs what is missing, measures, and writes docs/performance
                    (ten minutes); QUICK=1: a minute, into target/bench;
                    ONLY=hosts: this part alone, into target/bench as well
make deps           installs what is missing (Debian, Ubuntu), or lists it
make doc            the manual page only (make man does the same)
make install        the filter and the manual page, as built before;
                    DESTDIR= FILTERDIR= MANDIR= say where,
                    LIBRARY= names a library that was built elsewhere;
                    NAME=cowrs: beside nbdkit's own, for --filter=cowrs;
                    make doc NAME=cowrs makes its page before, and
                    make uninstall NAME=cowrs takes it away;
                    where it went is noted in STATEDIR=, which is /var/lib if
                    not set; for a user who is not root, XDG_STATE_HOME or
                    ~/.local/state
make uninstall      takes both away from where they went, or where FILTERDIR= and
                    MANDIR= say, and puts back what was there before;
                    needs the STATEDIR= of the install
make doctor         which nbdkit and which filter are installed, whether the one was
                    built for the other, and what to do; changes nothing
make dist           the source tarball, and one of the crates for builds without a
                    network, into target/dist
make check-dist     builds from them twice, and compares and looks at what comes out
make sbom           the crates that are linked into the filter and their licences,
                    into target/sbom
make rpm            an RPM for Fedora, of the name nbdkit-cowrs-filter, into target/rpm
make check-rpm      makes one, looks at it and tries its filter
make deb            the Debian package for the nbdkit that is installed, into
                    target/debian
make check-deb      makes, installs, upgrades and removes that package; only on a
                    system that may be spoiled: THROW_AWAY_SYSTEM=yes says so
make lint           formatting, clippy, rustdoc, manual page, shell scripts
make lint-crates    licences and sources of the crates, and advisories that warn of them
make clean          removes what was built
TEXT
