#!/bin/busybox sh
# The first process of cardcage's initramfs: it mounts what programs expect, loads drivers for the devices that are
# there, then runs one command (when /cardcage/exec is there) or a shell, and powers off.
# With a root file system of its own (root in /cardcage/settings) it mounts that and goes on inside, as the same script in
# /run/cardcage.
base=${CARDCAGE_BASE:-/cardcage}
export HOME=/root TERM=linux
if [ "$base" = /cardcage ]; then
    echo "cardcage: init"
    export PATH=/sbin:/bin
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev
    mkdir -p /dev/pts /dev/shm
    mount -t devpts devpts /dev/pts
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs tmpfs /tmp
    mount -t tmpfs tmpfs /run
    ln -s /proc/self/fd /dev/fd
    for name in stdin:0 stdout:1 stderr:2; do ln -s "/proc/self/fd/${name#*:}" "/dev/${name%:*}"; done
    modules=/lib/modules/$(uname -r)
else
    export PATH=$base/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    modules=$base/modules/$(uname -r)
    [ -e "/lib/modules/$(uname -r)" ] || { mkdir -p /lib/modules && ln -s "$modules" /lib/modules; }
fi
rows=0 cols=0 shares= token= root= strict=
if [ -f "$base/settings" ]; then . "$base/settings"; fi
begin() {  # the programs of cards; not children of ours, which are waited for below
    for program in "$base"/programs/*; do
        [ -x "$program" ] && ("$program" < /dev/null > /dev/null 2>&1 &)
    done
}
fail() {  # the kernel panics when its first process ends, which the machine's owner is told
    echo "cardcage: $*" > /dev/console
    exit 1
}
[ -n "$strict" ] || begin
hostname cardcage
ip link set lo up
cd /root || cd /

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
. "$base/drivers"
drivers  # buses and their transports first,
drivers  # then what they carry
[ ! -d /sys/module/virtio_scsi ] || modprobe sr_mod 2> /dev/null  # discs appear when their bus has been looked through

options_of() { case $1 in 9p) echo trans=virtio,version=9p2000.L,msize=524288 ;; *) echo rw ;; esac; }
enter() {  # go on in $1, TYPE:TAG of a share or a directory here, under a layer that keeps what is changed in memory
    mkdir /below /layer /inside
    case $1 in
        /*) mount -o bind "$1" /below ;;
        *) mount -t "${1%%:*}" -o "ro,$(options_of "${1%%:*}")" "${1#*:}" /below ;;
    esac || fail "root=$1 cannot be mounted"
    mount -t tmpfs tmpfs /layer
    mkdir /layer/upper /layer/work
    layers=lowerdir=/below,upperdir=/layer/upper,workdir=/layer/work
    insert overlay 2> /dev/null
    mount -t overlay -o "$layers" overlay /inside || fail "this kernel has no overlay file system, which root= needs"
    for folder in proc sys dev run tmp root; do
        [ -d "/inside/$folder" ] || mkdir "/inside/$folder" || fail "root=$1: /$folder is no directory"
    done
    mount -t tmpfs tmpfs /inside/run
    mount -t tmpfs tmpfs /inside/tmp
    chmod 1777 /inside/tmp
    for folder in proc sys dev; do mount -o move "/$folder" "/inside/$folder"; done
    mkdir /inside/run/cardcage
    cp -a /cardcage/* /bin /lib/modules /init /inside/run/cardcage/
    export CARDCAGE_BASE=/run/cardcage
    sed -i '1s|/bin/busybox|/run/cardcage/bin/busybox|' "/inside$CARDCAGE_BASE/dhcp"
    cd /inside || exit
    mount -o move . /
    exec chroot . $CARDCAGE_BASE/bin/busybox sh $CARDCAGE_BASE/init
}
[ -z "$root" ] || [ "$base" != /cardcage ] || enter "$root"

addresses=
for nic in /sys/class/net/*; do  # an address for each network card, from whoever gives one within seconds
    nic=${nic##*/}
    [ "$nic" = lo ] && continue
    ip link set "$nic" up
    # 26 is the MTU, 119 the search domains; busybox may be built without the latter's name
    udhcpc -i "$nic" -q -n -t 3 -T 1 -O 26 -O 119 -s "$base/dhcp" > /dev/null 2>&1 &
    addresses="$addresses $!"
done

# The command's streams: descriptor 7 for its input, 8 for its output and its status. They are open from here to the
# end: a serial port that is being closed by processes which the command left behind cannot be opened again.
port() {  # the device of the virtio port called $1, once it is there
    for name in /sys/class/virtio-ports/*/name; do
        if read -r is < "$name" && [ "$is" = "$1" ]; then
            name=${name%/name}
            echo "/dev/${name##*/}"
            return
        fi
    done 2> /dev/null
    return 1
}
has_ports() {  # the driver adds ports some time after it was loaded
    for device in /sys/bus/virtio/devices/*; do
        read -r id < "$device/device" && [ "$id" = 0x0003 ] && [ -e "$device/driver" ] && break
        false
    done 2> /dev/null || return
    tries=500
    until port cardcage.in > /dev/null && port cardcage.err > /dev/null && port cardcage.out > /dev/null; do
        [ $((tries -= 1)) -gt 0 ] && usleep 10000 || return
    done
}
mark() { printf '\0cardcage-%s %s%s\n' "$1" "$token" "$2"; }
pump() {  # a process that carries what comes from descriptor $1 to $2; its number is in $pid
    dd bs=32k <&"$1" >&"$2" 2> /dev/null &
    pid=$!
}
settle() {  # wait until the host has all up to the last mark on descriptor $1, which fifo $2 comes to by process $3
    pid=$3
    until read -r -t 2 answer <&"$1" && [ "$answer" = "cardcage-ok $token" ]; do
        [ -z "$2" ] || [ -e "/proc/$pid/exe" ] || pump "$2" "$1"  # the command may have ended it
        mark again >&"$1"
    done
}
ports=0
if [ -f /cardcage/exec ]; then
    dmesg -n 1  # from here on only a panic comes from the kernel
    if has_ports; then
        ports=1
        exec 7<> "$(port cardcage.in)" 8<> "$(port cardcage.out)" 9<> "$(port cardcage.err)"
    else
        stty -F /dev/ttyS1 raw -echo
        exec 8<> /dev/ttyS1
        exec 7<&8
    fi
fi

for share in $shares; do
    folder=/mnt/${share#*:} form=${share%%:*}
    mkdir -p "$folder"
    problem=$(mount -t "$form" -o "$(options_of "$form")" "${share#*:}" "$folder" 2>&1) && continue  # the kernel loads the module
    grep -qw "$form" /proc/filesystems || problem="this kernel has no driver for $form"
    if [ -f /cardcage/exec ]; then  # a command must not take an empty directory for what was shared
        mark fail " $folder is not mounted: $(echo $problem)" >&8
        settle 8
        poweroff -f
    fi
    [ -z "$strict" ] || fail "$folder is not mounted: $problem"
    echo "cardcage: $folder is not mounted: $problem" > /dev/console
done
[ -z "$strict" ] || begin

if [ -f /cardcage/exec ]; then
    [ -z "$addresses" ] || wait $addresses
    # Pipes stand between the command and its streams: /dev/stdout can be opened again, and the status goes the same
    # way as the last byte of output.
    mkfifo -m 600 /cardcage/out
    exec 5<> /cardcage/out
    pump 5 8
    out=$pid err= errors=/dev/console
    if [ $ports = 1 ]; then
        errors=/cardcage/err
        mkfifo -m 600 $errors
        exec 6<> $errors
        pump 6 9
        err=$pid
    else
        stty -F /dev/console raw -echo
        mark begin > /dev/console
    fi
    # Not a FIFO for its input: opened again after the end of input, as /dev/stdin, one would wait for a writer.
    {
        while mark more >&7 && read -r size <&7 && [ "$size" -gt 0 ] && dd bs="$size" count=1 iflag=fullblock <&7; do
            :
        done 2> /dev/null &
    } | setsid sh /cardcage/exec > /cardcage/out 2> $errors 5>&- 6>&- 7>&- 8>&- 9>&-
    status=$?
    # End what it left behind, but not what carries its output: stopped first, so that nothing escapes by forking.
    kill -STOP -1
    for process in /proc/[0-9]*; do
        process=${process#/proc/}
        case " 1 $out $err " in *" $process "*) ;; *) kill -9 "$process" ;; esac
    done 2> /dev/null
    kill -CONT $out $err 2> /dev/null
    if [ $ports = 1 ]; then
        mark end >&6
        settle 9 6 "$err"
    else
        mark end > /dev/console
        stty -F /dev/console raw  # returns once all is written
    fi
    mark end " $status" >&5
    settle 8 5 "$out"
else
    # The power button ends the guest. It is heard from before the prompt on: what is pressed while nobody has the device
    # open is lost.
    insert evdev 2> /dev/null
    for name in /sys/class/input/event*/device/name; do
        read -r is < "$name" && [ "$is" = "Power Button" ] || continue
        event=${name#/sys/class/input/}
        [ -c "/dev/input/${event%%/*}" ] || continue
        exec 3< "/dev/input/${event%%/*}"
        { dd bs=24 count=1 && sync && poweroff -f; } <&3 > /dev/null 2>&1 &
        exec 3<&-
    done 2> /dev/null
    [ "$rows" = 0 ] || stty -F /dev/console rows "$rows" cols "$cols"
    shell=sh
    [ "$base" = /cardcage ] || [ ! -x /bin/bash ] || shell=/bin/bash
    setsid cttyhack $shell -l
fi
sync
poweroff -f
