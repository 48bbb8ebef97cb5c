#!/bin/busybox sh
# The first process of the initramfs that "cardcage kernel" writes: it loads drivers for the devices that are there,
# mounts what root= on the kernel's command line names, and goes on with the init of that.
export PATH=/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

fail() {  # the kernel panics when its first process ends, which the machine's owner is told
    echo "cardcage: $*" > /dev/console
    exit 1
}

modules=/lib/modules/$(uname -r)
insert() {
    for module in "$@"; do
        [ -d "/sys/module/$module" ] || insmod "$modules/$module.ko"
    done
}
drivers() {  # for each device id, the modules that drive it, in order
    for file in /sys/bus/*/devices/*/modalias; do
        read -r alias < "$file" || continue
        driver "$alias"
    done
}
. /cardcage/drivers
drivers  # buses and their transports first,
drivers  # then what they carry

root= type= flags= init= mode=ro
for word in $(cat /proc/cmdline); do
    case $word in
        root=*) root=${word#*=} ;;
        rootfstype=*) type=${word#*=} ;;
        rootflags=*) flags=,${word#*=} ;;
        init=*) init=${word#*=} ;;
        ro | rw) mode=$word ;;
    esac
done
case $type in 9p) flags=,trans=virtio,version=9p2000.L,msize=524288$flags ;; esac

[ -n "$root" ] || fail "no root= on the kernel's command line: expected root=/dev/vda, UUID=, LABEL=, or a share's tag"
device=
for try in $(seq 100); do
    case $type:$root in
        virtiofs:* | 9p:*) device=$root ;;
        *:UUID=* | *:LABEL=*) device=$(findfs "$root" 2> /dev/null) ;;
        *) [ -b "$root" ] && device=$root ;;
    esac
    [ -n "$device" ] && break
    sleep 0.1
done
[ -n "$device" ] || fail "root=$root did not appear; block devices here: $(ls /sys/class/block | tr '\n' ' ')"
mount ${type:+-t "$type"} -o "$mode$flags" "$device" /mnt || fail "root=$root cannot be mounted"

there() { [ -e "/mnt$1" ] || [ -L "/mnt$1" ]; }  # a link's target lies below /mnt too
for program in $init /sbin/init /etc/init /bin/init /bin/sh; do
    there "$program" && break
done
there "$program" || fail "root=$root has no $program"
for folder in dev proc sys; do
    [ -d "/mnt/$folder" ] && mount -o move "/$folder" "/mnt/$folder"
done
exec switch_root /mnt "$program" "$@" < /mnt/dev/console > /mnt/dev/console 2>&1
