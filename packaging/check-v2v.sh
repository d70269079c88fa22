#!/usr/bin/env bash
# Has virt-v2v convert a small guest twice, with the cow filter that nbdkit ships and with
# this one, in a Debian 13 system of its own (roots/v2v where cargo builds), and compares:
# the guest is unchanged, the two outputs have the same files but for what is made anew
# each time, and both boot. Without KVM; takes ten minutes or so on two free cores.
#
# Writes the result to docs/v2v.md. What virt-v2v said stays where cargo builds, in v2v/.
. "$(dirname -- "$0")/common.sh"

# Below: the steps that run in that system, each as "check-v2v.sh STEP".

# In there /dev is the host's. The packages of qemu and udev would change the owner of
# /dev/kvm, and what finds it would use it.
hide_kvm() {
    [ -e /dev/kvm ] || return 0
    touch /run/no-kvm
    mount --bind /run/no-kvm /dev/kvm
}

step_build() {
    hide_kvm
    # Where cargo finds the settings that make it use the tarball's crates.
    cd -- "$root"
    apt-get update -q
    # libguestfs boots a kernel of this system, out of which it makes its appliance.
    apt-get install -y -q --no-install-recommends make rustc cargo debootstrap fdisk \
        linux-image-amd64 libguestfs-tools procps qemu-system-x86 qemu-utils virt-v2v
    "$root/packaging/deps.sh" build
    "$root/packaging/build.sh" library
}

# The partition of an image, as a loop device: where the kernel finds no partitions in
# those, an offset does the same.
attach() { losetup --find --show --offset 1M "$@"; }

# Detaches what a step has attached and mounted.
loop=
release() {
    cd /
    if mountpoint -q /mnt; then umount -R /mnt; fi
    [ -z "$loop" ] || losetup --detach "$loop"
}

# A guest as debootstrap makes it, with a kernel and GRUB.
step_guest() {
    local uuid image=/v2v/guest.img grub=/usr/lib/grub/i386-pc
    rm -rf /v2v
    mkdir /v2v
    truncate -s 1G "$image"
    sfdisk -q "$image" <<<'start=2048, type=83, bootable'
    trap release EXIT
    loop=$(attach "$image")
    mkfs.ext4 -q "$loop"
    mount "$loop" /mnt
    debootstrap --variant=minbase --cache-dir=/var/cache/apt/archives \
        --include=systemd-sysv,linux-image-cloud-amd64,grub-pc,e2fsprogs,zstd trixie /mnt \
        "$(sed -n 's/^deb \([^ ]*\) trixie main.*/\1/p' /etc/apt/sources.list)"
    rm -f /mnt/var/cache/apt/archives/*.deb
    uuid=$(blkid -s UUID -o value "$loop")
    echo guest >/mnt/etc/hostname
    echo "UUID=$uuid / ext4 errors=remount-ro 0 1" >/mnt/etc/fstab
    # By hand, because update-grub does not know what disk a loop device will be.
    cp -a "/mnt$grub" /mnt/boot/grub/
    cat >/mnt/boot/grub/grub.cfg <<GRUB
set timeout=0
menuentry Debian {
    linux /vmlinuz root=UUID=$uuid ro console=ttyS0
    initrd /initrd.img
}
GRUB
    chroot /mnt grub-mkimage -O i386-pc -p '(hd0,msdos1)/boot/grub' -o /boot/grub/core.img \
        biosdisk part_msdos ext2
    dd if="/mnt$grub/boot.img" of="$image" bs=440 count=1 conv=notrunc status=none
    dd if=/mnt/boot/grub/core.img of="$image" bs=512 seek=1 conv=notrunc status=none
}

# The most space that the overlay of virt-v2v's nbdkit has taken, in bytes, and how much
# nbdkit has read from files, into a file that always has the newest.
watch_overlay() {
    local pid fd blocks most=0 read
    until pid=$(pgrep -f -- '--filter cow file'); do sleep 1; done
    while read=$(sed -n 's/^rchar: //p' "/proc/$pid/io" 2>/dev/null); do
        for fd in "/proc/$pid/fd"/*; do
            [[ $(readlink "$fd") = /var/tmp/*' (deleted)' ]] || continue
            blocks=$(stat -L -c %b "$fd" 2>/dev/null) || continue
            [ $((blocks * 512)) -le "$most" ] || most=$((blocks * 512))
        done
        echo "$most $read" >"$1.new"
        mv "$1.new" "$1"
        sleep 1
    done
}

# convert c|ours
step_convert() {
    local which=$1 filter start
    filter=$(nbdkit --dump-config | sed -n 's/^filterdir=//p')/nbdkit-cow-filter.so
    hide_kvm
    # Only this step sees it there.
    [ "$which" = c ] || mount --bind "$(library)" "$filter"
    sha256sum <"$filter" >"/v2v/$which.filter"
    rm -rf "/v2v/$which"
    mkdir "/v2v/$which"
    export LIBGUESTFS_BACKEND=direct LIBGUESTFS_BACKEND_SETTINGS=force_tcg
    watch_overlay "/v2v/$which.overlay" &
    start=$SECONDS
    virt-v2v -v -x -i disk /v2v/guest.img -o local -os "/v2v/$which" -of raw \
        >"/v2v/$which.log" 2>&1 || {
        tail -n 20 "/v2v/$which.log" >&2
        die "virt-v2v failed ($which)."
    }
    echo $((SECONDS - start)) >"/v2v/$which.seconds"
}

# tree IMAGE: every file with its kind, mode, owner, links, and what is in it.
step_tree() {
    trap release EXIT
    loop=$(attach --read-only "$1")
    # It was unmounted cleanly, or this is where it shows.
    mount -o ro,noload "$loop" /mnt
    cd /mnt
    find . -xdev \( -type f -printf '%p\t%y %m %U:%G %n %s\t' -exec sh -c 'sha256sum <"$1"' sh {} \; \
        \) -o -printf '%p\t%y %m %U:%G\t%l\n' | LC_ALL=C sort
}

# initramfs IMAGE DIRECTORY: unpacks the one that its kernel boots with.
step_initramfs() {
    trap release EXIT
    loop=$(attach --read-only "$1")
    mount -o ro,noload "$loop" /mnt
    mkdir "$2"
    unmkinitramfs /mnt/initrd.img "$2"
}

# boot IMAGE: until it asks who logs in, in ten minutes; the image does not change.
step_boot() {
    local qemu
    hide_kvm
    qemu-system-x86_64 -accel tcg -m 512 -snapshot -no-reboot -nic none -display none \
        -serial "file:$1.console" -drive "file=$1,format=raw,if=virtio" &
    qemu=$!
    for _ in {1..300}; do
        sleep 2
        kill -0 "$qemu" 2>/dev/null || break
        if grep -q 'guest login:' "$1.console"; then
            kill "$qemu"
            exit 0
        fi
    done
    die 'It does not ask.'
}

if [ $# -gt 0 ]; then
    step=step_$1
    declare -F "$step" >/dev/null || die "check-v2v.sh: there is no step '$1'"
    shift
    "$step" "$@"
    exit
fi

# From here on: on the host.
[ "$(id -u)" -eq 0 ] || die 'make check-v2v needs root, to make and enter a Debian system.'

logs=$(target_dir)/v2v
system=$("$root/packaging/root.sh" --name v2v trixie)
tree=$system/src/nbdkit-cow-filter
v2v=$system/v2v
mkdir -p -- "$logs"

heading() { say "--- $* ($(date -u '+%H:%M:%S'))"; }
step() {
    "$root/packaging/root.sh" --name v2v trixie \
        /src/nbdkit-cow-filter/packaging/check-v2v.sh "$@" </dev/null
}
logged() {
    heading "$@"
    step "$@" >"$logs/$1.log" 2>&1 || {
        tail -n 20 -- "$logs/$1.log" >&2
        die "Failed: $*. All that it said is in $logs/$1.log."
    }
}
seal() { printf '%s %s' "$(sha256sum <"$v2v/guest.img")" "$(stat -c %.Y "$v2v/guest.img")"; }

"$root/packaging/dist.sh"
rm -rf --one-file-system -- "$tree"
mkdir -p -- "$tree"
for part in '' -vendor; do
    tar -x --touch --strip-components=1 -C "$tree" \
        -f "$(target_dir)/dist/nbdkit-cow-filter-$(version)$part.tar.xz"
done
logged build
logged guest

before=$(seal)
for which in c ours; do
    heading convert "$which"
    step convert "$which"
    cp -- "$v2v/$which.log" "$logs/"
    [ "$(seal)" = "$before" ] || die "The guest's disk has changed ($which)."
done

# Which filter was loaded: nbdkit's, as its package has it, or the one that logs by the
# name of our crate.
md5sum <"$system$(sed -n 's/.*debug: registering filter //p;T;q' "$logs/c.log")" |
    grep -qFf - <(sed 's/ .*/  -/' "$system"/var/lib/dpkg/info/nbdkit*.md5sums) ||
    die "The first run had another filter than that of Debian's nbdkit."
for which in c ours; do
    count=$(grep -c ': debug: nbdkit_cow_filter::' "$logs/$which.log") || :
    case $which:$count in
    c:0 | ours:[1-9]*) ;;
    *) die "$which.log has $count messages of this filter." ;;
    esac
done
[ "$(cat "$v2v/ours.filter")" = "$(sha256sum <"$tree/target/release/libnbdkit_cow_filter.so")" ] ||
    die 'The second run had another filter than the one that was built.'

heading compare
step tree /v2v/guest.img >"$logs/guest.tree"
for which in c ours; do
    step tree "/v2v/$which/guest-sda" >"$logs/$which.tree"
    # Lines that only one of them has; the paths are what virt-v2v has changed.
    comm -3 -- "$logs/guest.tree" "$logs/$which.tree" |
        sed 's/^\t//; s/\t.*//' | sort -u >"$logs/$which.changed"
done
[ -s "$logs/c.changed" ] || die 'virt-v2v has changed nothing in the guest.'
diff -- "$logs/c.changed" "$logs/ours.changed" >&2 ||
    die 'With the two filters virt-v2v has changed other files.'

comm -3 -- "$logs/c.tree" "$logs/ours.tree" | sed 's/^\t//; s/\t.*//' | sort -u >"$logs/differ"
# update-initramfs packs it anew, with the times of that moment.
if unexplained=$(grep -vE '^\./boot/initrd\.img-[^/]*-amd64$' "$logs/differ"); then
    die "These files differ, and should not: $unexplained"
fi
rm -rf -- "$v2v"/initramfs-*
for which in c ours; do
    step initramfs "/v2v/$which/guest-sda" "/v2v/initramfs-$which"
done
diff -r --no-dereference -- "$v2v/initramfs-c" "$v2v/initramfs-ours" >&2 ||
    die 'What is packed in the initramfs differs.'

for which in c ours; do
    heading boot "$which"
    step boot "/v2v/$which/guest-sda" || {
        tail -n 20 -- "$v2v/$which/guest-sda.console" >&2
        die "The converted guest does not boot ($which)."
    }
done

versions() {
    # shellcheck disable=SC2016 # dpkg-query fills them in
    chroot "$system" dpkg-query -W -f '${Package} ${Version}\n' nbdkit virt-v2v \
        libguestfs-tools qemu-system-x86 | sed 's/ / | /; s/^/| /; s/$/ |/'
}
# The row of a figure: its name, then the command that prints it of c and of ours.
row() {
    local what=$1
    shift
    printf '| %s | %s | %s |\n' "$what" "$("$@" c)" "$("$@" ours)"
}
seconds() { cat "$v2v/$1.seconds"; }
mebibytes() { echo $((($1 + (1 << 19)) >> 20)); }
overlay() { mebibytes "$(cut -d ' ' -f 1 "$v2v/$1.overlay")"; }
reads() { mebibytes "$(cut -d ' ' -f 2 "$v2v/$1.overlay")"; }
output() { mebibytes "$(($(stat -c %b "$v2v/$1/guest-sda") * 512))"; }
files() { grep -c . "$logs/$1.tree"; }
changed() { grep -c . "$logs/$1.changed"; }

page=$root/docs/v2v.md
cat >"$page.new" <<PAGE
# A conversion by virt-v2v

Written by \`make check-v2v\` ($(date -u +%F), version $(version)). In a Debian 13 system
virt-v2v converts a small Debian 13 guest twice, with nbdkit's own cow filter and with
this one:

    virt-v2v -v -x -i disk guest.img -o local -os DIRECTORY -of raw

| package | version |
|---|---|
$(versions)

| | C filter | this filter |
|---|---|---|
$(row 'time of the conversion (s)' seconds)
$(row 'most space that the overlay took (MiB)' overlay)
$(row 'read by nbdkit from files, base and overlay (MiB)' reads)
$(row 'space that the converted disk takes (MiB)' output)
$(row 'files, directories and links in it' files)
$(row 'of these made, changed or removed by virt-v2v' changed)

Without KVM (\`LIBGUESTFS_BACKEND=direct\`, \`force_tcg\`), on $(nproc) processors
($(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)), load
$(cut -d ' ' -f 1-3 /proc/loadavg) at the end: the times say that neither is slow, no
more. Space and reads were looked at once a second.

Checked, and so with both:

- The guest's disk is unchanged, in every byte and in its modification time.
- virt-v2v ended with success, and its nbdkit had loaded the filter that it should.
- The same files were made, changed and removed. In all of the converted disk the kinds,
  modes, owners, link targets, sizes and contents are the same in both, except for:
$(if [ -s "$logs/differ" ]; then sed "s/^\.\(.*\)/  - \`\1\`, which update-initramfs packs anew with the times of that\n    moment. Unpacked, it has the same files./" "$logs/differ"; else echo '  - nothing.'; fi)
- Modification times were not compared: they are those of each run.
- The converted guest boots from a virtio disk, up to the login prompt.
PAGE
mv -- "$page.new" "$page"
say "Passed; the result is in $page."
