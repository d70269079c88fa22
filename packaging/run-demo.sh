#!/usr/bin/env bash
# Serves a disk through the filter until Ctrl-C: a small ext4 disk made here, or
# the file that DISK names. LIBRARY names another filter than the one built here.
. "$(dirname -- "$0")/common.sh"

# Ctrl-C at a terminal reaches every process of the foreground job, and make
# would then say "Interrupt" and fail although all went well. So at a terminal
# the demo is a job of its own. Only where we are in the foreground: a shell that
# is not must not touch the terminal.
foreground() {
    local stat
    stat=$(cat "/proc/$$/stat" 2>/dev/null) || return 1
    # After the name in parentheses: state ppid pgrp session tty tpgid ...
    read -r _ _ pgrp _ _ tpgid _ <<<"${stat##*) }"
    [ "$pgrp" = "$tpgid" ]
}
# Where it was started with "&" from a script, SIGINT is ignored, and bash can't
# trap what was ignored when it started: env resets that.
if [ "${1:-}" != --inner ]; then
    inner=("$BASH" "$0" --inner)
    if env --default-signal=INT true 2>/dev/null; then
        inner=(env --default-signal=INT "${inner[@]}")
    fi
    foreground || exec "${inner[@]}"
    set -m
    "${inner[@]}"
    exit
fi

work= # removed at the end
nbdkit_pid=

# shellcheck disable=SC2317,SC2329 # both are called by trap
finish() {
    local status=$?
    trap '' INT TERM HUP
    trap - EXIT
    if [ -n "$nbdkit_pid" ] && kill "$nbdkit_pid" 2>/dev/null; then
        wait "$nbdkit_pid" 2>/dev/null || :
    fi
    [ -z "$work" ] || rm -rf -- "$work"
    exit "$status"
}
# shellcheck disable=SC2317,SC2329
stop() {
    printf '\nStopped.\n'
    exit 0
}
trap finish EXIT
trap stop INT TERM HUP

filter=$(library)
[ -e "$filter" ] || die "There is no $filter: run make build first."
have nbdkit || die 'nbdkit is missing: run make deps first.'

if [ -n "${DISK:-}" ]; then
    [ -e "$DISK" ] || die "DISK=$DISK: there is no such file."
    [ -f "$DISK" ] || [ -b "$DISK" ] || die "DISK=$DISK is neither a file nor a block device."
    [ -r "$DISK" ] || die "DISK=$DISK can't be read by user $(id -un)."
fi

# A Unix socket's path has to be shorter than 108 bytes, and not every client
# takes a URI with quoted characters.
tmp=$(realpath -- "${TMPDIR:-/tmp}" 2>/dev/null) || tmp=/tmp
if [ "${#tmp}" -gt 70 ] || [ ! -w "$tmp" ] || [[ $tmp =~ [^A-Za-z0-9/._-] ]]; then
    tmp=/tmp
fi
work=$(mktemp -d -- "$tmp/nbdkit-cow-demo.XXXXXX")
socket=$work/sock

# Where the three commands read and write; on the demo disk, in a file.
offset=0 length=64
if [ -n "${DISK:-}" ]; then
    disk=$(realpath -- "$DISK")
    what="the first bytes of the disk"
else
    disk=$work/disk.img
    what="the start of the file hello.txt"
    mkdir -- "$work/files" "$work/files/docs"
    printf '%s\n' 'Hello from the disk. A client may write here as it likes: the file' \
        'that nbdkit serves stays as it is.' >"$work/files/hello.txt"
    cp -- "$root/LICENSE" "$manual_source" "$work/files/docs/"
    truncate -s 64M -- "$disk"
    mke2fs -q -t ext4 -b 4096 -L cow-demo -d "$work/files" -F "$disk"
    rm -rf -- "$work/files"
    block=$(debugfs -R 'blocks /hello.txt' "$disk" 2>/dev/null) || block=
    read -r block _ <<<"$block"
    offset=$((block * 4096))
fi

if [ -b "$disk" ]; then
    size=$(blockdev --getsize64 "$disk")
else
    size=$(stat -c %s -- "$disk")
fi
[ "$size" -gt 0 ] || die "DISK=$DISK is empty: there is nothing to serve."
[ "$size" -ge "$length" ] || length=$size

# One word for the shell, whatever it contains.
quoted() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

# Reading all of a big disk takes too long; then its size and time must do.
if [ "$size" -le $((1 << 30)) ]; then
    read -r sum _ < <(sha256sum <"$disk")
    compare="printf '%s\n' $(quoted "$sum  $disk") | sha256sum -c"
    compare_what='its checksum is what it was before nbdkit started'
else
    now=$(stat -c '%s %y' -- "$disk")
    compare="[ \"\$(stat -c '%s %y' $(quoted "$disk"))\" = $(quoted "$now") ] && echo unchanged"
    compare_what='its size and modification time are what they were'
fi

options=()
if [[ $(nbdkit --dump-config) == *exit_with_parent=yes* ]]; then
    options+=(--exit-with-parent)
fi
nbdkit -f -U "$socket" -P "$work/pid" "${options[@]}" \
    --filter="$filter" file "file=$disk" </dev/null &
nbdkit_pid=$!

# The pid file appears when nbdkit listens.
for ((i = 0; i < 200; i++)); do
    [ ! -s "$work/pid" ] || break
    if ! kill -0 "$nbdkit_pid" 2>/dev/null; then
        nbdkit_pid=
        die 'nbdkit did not start; its message is above.'
    fi
    sleep 0.05
done
[ -s "$work/pid" ] || die 'nbdkit did not get ready within ten seconds.'

uri="nbd+unix:///?socket=$socket"
cat <<TEXT

Serving   $disk ($size bytes)
Through   $filter
URI       $uri

Try these in another terminal:

1. Read: $what, as a hex dump.

    qemu-io -r -f raw -c 'read -v $offset $length' $(quoted "$uri")

2. Write over it, and read it again with the first command.

    qemu-io -f raw -c 'write -P 0x58 $offset $length' $(quoted "$uri")

3. See that the disk is unchanged: $compare_what.

    $compare

Ctrl-C stops nbdkit and throws away what was written.
TEXT

status=0
wait "$nbdkit_pid" || status=$?
nbdkit_pid=
die "nbdkit ended by itself, with status $status."
