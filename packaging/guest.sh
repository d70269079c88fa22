#!/usr/bin/env bash
# Provides a guest, for the tests that boot one from an image: a QEMU that emulates a
# PC, a kernel, and an initial file system in which a shell runs the script that the
# test has written to the second disk.
#
# Nothing is installed. The package of a kernel would touch the boot loader, and that of
# the emulator takes the place of a qemu-utils of another version.
. "$(dirname -- "$0")/common.sh"
. "$root/packaging/debs.sh"

place=$(target_dir)/guest
emulator=qemu-system-x86_64
kernel=$place/vmlinuz
initramfs=$place/initramfs

if [ "$(uname -m)" != x86_64 ]; then
    say 'The tests that boot a guest are for x86-64 only.'
    exit 0
fi
emulates() { "$1" --version >/dev/null 2>&1; }
has_emulator() { have "$emulator" || runs "$place" emulates "usr/bin/$emulator"; }
# The last one that is made.
! [ -e "$initramfs" ] || ! has_emulator || exit 0

if ! have apt-cache || ! have dpkg-deb; then
    has_emulator || die "$emulator is missing: install it, then try again."
    die "The tests boot a kernel of Debian's in a guest, and there is no apt-get here to fetch it.
Make $place with what packaging/guest.sh puts there, on a Debian system."
fi

# What the package needs to be run for a disk and a serial line. It needs another one for
# a module, and not for what that one needs.
needed_by_the_emulator() {
    apt-cache depends --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
        --no-enhances qemu-system-x86 |
        sed -n 's/^ *Depends: \([^<]*\)$/\1/p' | grep -v -x -e qemu-system-common -e ipxe-qemu
}
say 'Fetching a kernel for a guest, and what boots it, to be run by the tests only.'
rm -rf -- "$place"
mkdir -p -- "$place"
# The package that names the newest kernel; newer ones are in two parts.
image=$(apt-cache depends linux-image-cloud-amd64 |
    sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p')
[ -n "$image" ] || die 'There is no linux-image-cloud-amd64 to be had. Run apt-get update as root, then try again.'
mapfile -t parts < <(apt-cache depends "$image" |
    sed -n -E 's/^ *Depends: (linux-(binary|modules)-[^ ]*)$/\1/p')
packages=("$image" "${parts[@]}" busybox-static)
if ! have "$emulator"; then
    mapfile -t needed < <(needed_by_the_emulator)
    mapfile -t needed < <(missing_packages "${needed[@]}")
    packages+=(qemu-system-x86 qemu-system-common "${needed[@]}")
fi
unpack_packages "$place" "${packages[@]}"
has_emulator || die "$place/usr/bin/$emulator does not run: install $emulator."

# The file system: a shell, and the modules for its disks where they are no part of the
# kernel.
files=$place/files
busybox=$(find "$place" -path '*/bin/busybox')
modules=$(find "$place" -type d -path '*/lib/modules/*' -name kernel -prune)
version=$(basename -- "$(dirname -- "$modules")")
mkdir -p -- "$files"/{bin,dev,proc} "$files/lib/modules/$version"
cp -- "$busybox" "$files/bin/busybox"
for module in "$modules"/drivers/{virtio/virtio*,block/virtio_blk}.ko*; do
    [ -e "$module" ] || continue
    cp -- "$module" "$files/lib/modules/$version/"
done
find "$files/lib" -name '*.xz' -exec xz -d {} +
touch -- "$files/lib/modules/$version"/modules.{builtin,order}
"$busybox" depmod -b "$files" "$version"
cat >"$files/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs none /dev
mount -t proc none /proc
modprobe virtio_pci
modprobe virtio_blk
sh /dev/vdb
poweroff -f
INIT
chmod 755 -- "$files/init"

find "$place" -type f -name 'vmlinuz*' -exec mv -- {} "$kernel" \;
(cd -- "$files" && find . | "$busybox" cpio -o -H newc 2>/dev/null) >"$initramfs.new"
rm -rf -- "${files:?}" "${place:?}/boot" "${modules:?}"
mv -- "$initramfs.new" "$initramfs"
