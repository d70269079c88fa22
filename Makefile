# What each target does is in packaging/*.sh; "make help" lists them.
#
# Settings go to the scripts through the environment, so that a path may
# contain any character.
export CRASH_SEED DEBIAN_MIRROR DISK DESTDIR FILTERDIR MANDIR MINUTES STATEDIR LIBRARY ONLY PART \
	QUICK SEED SUITES THROW_AWAY_SYSTEM

# Only from the command line: some systems have a variable of this name in the environment.
ifeq ($(origin NAME),command line)
export NAME
else
unexport NAME
endif

.PHONY: build run check check-clients check-packages check-reliability checkers check-versions
.PHONY: check-v2v
.PHONY: crash fuzz soak bench
.PHONY: deps doc man install uninstall doctor
.PHONY: dist check-dist sbom deb check-deb rpm check-rpm
.PHONY: lint lint-crates clean help

build:
	@packaging/build.sh

run:
	@packaging/deps.sh run
	@packaging/build.sh library
	@packaging/run-demo.sh

check:
	@packaging/deps.sh check
	@packaging/check.sh

check-clients:
	@packaging/deps.sh check
	@packaging/check.sh clients

check-packages:
	@packaging/deps.sh package
	@packaging/check.sh packages

check-reliability:
	@packaging/deps.sh check
	@packaging/check.sh reliability

checkers:
	@packaging/deps.sh check
	@packaging/checkers.sh

check-versions:
	@packaging/deps.sh roots
	@packaging/check-versions.sh

check-v2v:
	@packaging/deps.sh roots
	@packaging/check-v2v.sh

crash:
	@packaging/deps.sh check
	@packaging/crash.sh

fuzz:
	@packaging/deps.sh check
	@packaging/fuzz.sh

soak:
	@packaging/deps.sh check
	@packaging/soak.sh

bench:
	@packaging/deps.sh bench
	@packaging/bench.sh

deps:
	@packaging/deps.sh

doc man:
	@packaging/build.sh manual

install:
	@packaging/install.sh install

uninstall:
	@packaging/install.sh uninstall

doctor:
	@packaging/doctor.sh

dist:
	@packaging/dist.sh

sbom:
	@packaging/sbom.sh

rpm:
	@packaging/deps.sh package
	@packaging/rpm.sh

check-dist:
	@packaging/deps.sh package
	@tests/packaging/dist.sh
	@tests/packaging/sbom.sh

check-rpm:
	@packaging/deps.sh package
	@tests/packaging/rpm.sh
deb:
	@packaging/deb.sh
check-deb:
	@packaging/deps.sh package
	@tests/packaging/deb.sh

lint:
	@packaging/lint.sh

lint-crates:
	@packaging/lint-crates.sh

clean:
	@packaging/build.sh clean

help:
	@packaging/help.sh
