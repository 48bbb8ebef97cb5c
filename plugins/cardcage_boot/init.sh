#!/bin/busybox sh
# The first process of cardcage's initramfs: it mounts what programs expect, loads drivers for the devices that are
# there, then runs one command (when /cardcage/exec is there) or a shell, and powers off.
echo "cardcage: init"
export PATH=/sbin:/bin HOME=/root TERM=linux
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
ln -s /proc/self/fd /dev/fd
hostname cardcage
ip link set lo up
cd /root

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

for nic in /sys/class/net/*; do  # an address for each network card, from whoever gives one within seconds
    nic=${nic##*/}
    [ "$nic" = lo ] && continue
    ip link set "$nic" up
    # 26 is the MTU, 119 the search domains; busybox may be built without the latter's name
    udhcpc -i "$nic" -q -n -t 3 -T 1 -O 26 -O 119 -s /cardcage/dhcp > /dev/null 2>&1 &
done

interactive=1 rows=0 cols=0 shares=
if [ -f /cardcage/settings ]; then . /cardcage/settings; fi

for share in $shares; do
    mkdir -p "/mnt/${share#*:}"
    case $share in 9p:*) options=trans=virtio,version=9p2000.L,msize=524288 ;; *) options=rw ;; esac
    grep -qw "${share%%:*}" /proc/filesystems && mount -t "${share%%:*}" -o "$options" "${share#*:}" "/mnt/${share#*:}" ||
        echo "cardcage: /mnt/${share#*:} is not mounted: this kernel has no driver for ${share%%:*}, or it failed" > /dev/console
done

if [ -f /cardcage/exec ]; then
    wait
    dmesg -n 1  # from here on the console carries the command's error output; only a panic may mix with it
    stty -F /dev/ttyS1 raw -echo
    stty -F /dev/console raw -echo
    printf '\0cardcage-begin %s\n' "$token" > /dev/console
    setsid sh /cardcage/exec < /dev/null > /dev/ttyS1 2> /dev/console
    status=$?
    kill -9 -1  # what it left in the background must not write after the end marks
    printf '\0cardcage-end %s\n' "$token" > /dev/console
    printf '\0cardcage-end %s %d\n' "$token" "$status" > /dev/ttyS1
elif [ "$interactive" = 1 ]; then
    [ "$rows" = 0 ] || stty -F /dev/console rows "$rows" cols "$cols"
    setsid cttyhack sh -l
else
    # Commands come through the console from what is no terminal, and end with its end-of-file character.
    dmesg -n 1
    stty -F /dev/console -echo -onlcr
    printf '\0cardcage-begin %s\n' "$token" > /dev/console
    cat /dev/console | setsid sh > /dev/console 2>&1
    printf '\0cardcage-end %s\n' "$token" > /dev/console
fi
sync
poweroff -f
