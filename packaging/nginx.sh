#!/usr/bin/env bash
# Provides nginx, for the test of many hosts and its part of the benchmark.
#
# Not by installing Debian's package: that starts a web server for all the network on
# port 80, then and at each boot, and nobody expects this of "make check". The package
# is fetched and its program put below target/nginx instead. What the program needs
# to run is on every Debian that has nbdkit with its curl plugin.
. "$(dirname -- "$0")/common.sh"
. "$root/packaging/debs.sh"

have nginx && exit 0
place=$(target_dir)/nginx
program=$place/usr/sbin/nginx
[ -x "$program" ] && "$program" -v 2>/dev/null && exit 0

if ! have apt-get || ! have dpkg-deb; then
    die 'nginx is missing: install it, then try again.'
fi
say 'Fetching nginx, to be run by the tests only.'
unpack_packages "$place" nginx
"$program" -v 2>/dev/null || die "$program does not run: install nginx."
