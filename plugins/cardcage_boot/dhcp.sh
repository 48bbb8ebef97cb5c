#!/bin/busybox sh
# What udhcpc runs in cardcage's initramfs when it has a lease (or lost it).
case "$1" in
bound | renew)
    ip addr flush dev "$interface"
    [ -z "$mtu" ] || ip link set dev "$interface" mtu "$mtu"
    ip addr add "$ip/${mask:-24}" dev "$interface"
    read -r metric < "/sys/class/net/$interface/ifindex"  # of several network cards the first leads outside
    for gateway in $router; do ip route replace default via "$gateway" dev "$interface" metric "$metric"; done
    # Their clients run at once: each leaves what it was told, and the last one finds all of it.
    echo "${search:-$domain}" > "/run/search.$interface"
    for server in $dns; do echo "nameserver $server"; done > "/run/nameservers.$interface"
    domains=
    for name in $(cat /run/search.*); do
        case "$domains " in *" $name "*) ;; *) domains="$domains $name" ;; esac
    done
    { [ -z "$domains" ] || echo "search$domains"; cat /run/nameservers.*; } > "/run/resolv.$interface"
    mv "/run/resolv.$interface" /etc/resolv.conf
    ;;
deconfig) ip addr flush dev "$interface" ;;
esac
