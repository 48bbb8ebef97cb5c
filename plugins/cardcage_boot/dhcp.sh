#!/bin/busybox sh
# What udhcpc runs in cardcage's initramfs when it has a lease (or lost it).
case "$1" in
bound | renew)
    ip addr flush dev "$interface"
    ip addr add "$ip/${mask:-24}" dev "$interface"
    for gateway in $router; do ip route replace default via "$gateway" dev "$interface"; done
    for server in $dns; do echo "nameserver $server"; done > /etc/resolv.conf
    ;;
deconfig) ip addr flush dev "$interface" ;;
esac
