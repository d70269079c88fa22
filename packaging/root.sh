#!/usr/bin/env bash
# root.sh [--name NAME] SUITE [COMMAND [ARGUMENT...]]
#
# Runs a command, as root, in a small Debian system of that suite (bookworm, trixie,
# sid), which is a directory where cargo builds: roots/NAME, by default roots/SUITE.
# Made by debootstrap if it is not there, and again when it is older than a week.
# Without a command it makes the system and prints its directory.
#
# DEBIAN_MIRROR= names another mirror than debootstrap's own.
. "$(dirname -- "$0")/common.sh"
# Others than root have to read what is made in there: apt's user, and those of tests.
umask 022

name=
if [ "${1:-}" = --name ]; then
    name=${2:-}
    shift 2
fi
suite=${1:-}
[[ $suite =~ ^[a-z]+$ ]] || die 'root.sh [--name NAME] SUITE [COMMAND...]: which suite of Debian?'
shift
[[ ${name:=$suite} =~ ^[a-z0-9-]+$ ]] || die "root.sh: '$name' is no name for a directory of roots"

[ "$(id -u)" -eq 0 ] || die 'A Debian system in a directory can be made and entered only as root.'
have debootstrap || die 'debootstrap is missing: run packaging/deps.sh roots.'

roots=$(target_dir)/roots
[[ $roots != *[[:space:]]* ]] || die "debootstrap can't work in $roots, because of the space in the name: set CARGO_TARGET_DIR."
system=$roots/$name
# Written when the system is whole: one that was cut short is made again.
made=$system.made
mkdir -p -- "$roots"

# What apt has to know here to reach a mirror.
apt_settings() { apt-config dump | grep -E '^Acquire::(https?::|Check-)' || :; }

make_system() {
    say "Making a Debian system: $name ($suite)" >&2
    rm -f -- "$made"
    rm -rf --one-file-system -- "$system"
    # It mounts /proc there, which must not stay when it is cut short.
    unshare --mount --propagation private \
        debootstrap --variant=minbase "$suite" "$system" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} \
        >"$system.log" 2>&1 </dev/null || {
        tail -n 20 -- "$system.log" >&2
        die "debootstrap failed; all that it said is in $system.log."
    }
    apt_settings >"$system/etc/apt/apt.conf.d/90host"
    # The compiler of Debian 12 that is new enough comes as a security update.
    if [ "$suite" != sid ]; then
        sed -n "s#^\(deb .*/debian\)/* $suite main#\1-security $suite-security main#p" \
            "$system/etc/apt/sources.list" >>"$system/etc/apt/sources.list.d/security.list"
    fi
    # No package starts a service here.
    printf '#!/bin/sh\nexit 101\n' >"$system/usr/sbin/policy-rc.d"
    chmod 755 -- "$system/usr/sbin/policy-rc.d"
    touch -- "$made"
}

exec {lock}>"$system.lock"
flock "$lock"
if [ -z "$(find "$made" -mtime -7 2>/dev/null)" ]; then
    make_system
fi
if [ $# -eq 0 ]; then
    printf '%s\n' "$system"
    exit
fi
cp -L -- /etc/resolv.conf "$system/etc/resolv.conf"

# What is mounted is seen only by this command and its children, and goes with them.
# The shell that stays is the init of the processes in there: it takes the status of
# those whose parent has ended, and when it ends, all of them do.
# shellcheck disable=SC2016 # it is the inner shell that expands this
exec unshare --mount --propagation private --pid --fork --kill-child bash -c '
    set -e
    system=$1
    shift
    # A root directory that is no mount point would keep unshare --mount from working.
    mount --bind "$system" "$system"
    mount -t proc proc "$system/proc"
    mount -t sysfs sysfs "$system/sys"
    mount --rbind /dev "$system/dev"
    mount -t tmpfs -o mode=1777 tmpfs "$system/tmp"
    mount -t tmpfs -o mode=755 tmpfs "$system/run"
    status=0
    env -i TERM="${TERM:-dumb}" HOME=/root LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        chroot "$system" "$@" || status=$?
    exit "$status"
' bash "$system" "$@"
