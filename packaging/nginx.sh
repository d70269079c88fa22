#!/usr/bin/env bash
# Provides nginx, for the test of many hosts and its part of the benchmark.
#
# Not by installing Debian's package: that starts a web server for all the network on
# port 80, then and at each boot, and nobody expects this of "make check". The package
# is fetched and its program put below target/nginx instead. What the program needs
# to run is on every Debian that has nbdkit with its curl plugin.
. "$(dirname -- "$0")/common.sh"

have nginx && exit 0
place=$(target_dir)/nginx
program=$place/usr/sbin/nginx
[ -x "$program" ] && "$program" -v 2>/dev/null && exit 0

if ! have apt-get || ! have dpkg-deb; then
    die 'nginx is missing: install it, then try again.'
fi
say 'Fetching nginx, to be run by the tests only.'
mkdir -p -- "$place"
cd -- "$place"
rm -f -- nginx_*.deb
# As root apt would become another user, who can't write here.
fetch() { apt-get -q -o APT::Sandbox::User=root -o Acquire::Retries=3 download nginx </dev/null; }
if ! fetch; then
    # The package lists may be older than the archive.
    [ "$(id -u)" -ne 0 ] || apt-get -q update </dev/null || :
    fetch || die 'Could not fetch nginx. Run apt-get update as root, then try again; or install nginx.'
fi
dpkg-deb -x nginx_*.deb .
rm -f -- nginx_*.deb
"$program" -v 2>/dev/null || die "$program does not run: install nginx."
