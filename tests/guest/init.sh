#!/bin/busybox sh
# The guest's PID 1. The kernel hands unknown NAME=value arguments on as environment, so that is
# how a test configures its guest: workload=sequence|random|files|idle, disks=ID,ID,... (the disks to be
# written, in writing order, by the serial number that QEMU gave them), and what writer.c or files.c reads.
# For `files` each disk is mounted at /mnt/ID. Where there is an agent, it is started, and commands are taken
# from the second serial line.
# Lines for the test bed start with "VMF "; the kernel is kept quiet so that they stay whole.
PATH=/bin
export PATH
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec </dev/console >/dev/console 2>&1

fail() {
    dmesg | tail -n 25
    ls /sys/block
    echo "VMF fatal reason=$1"
    # Not exit: the kernel's panic would hide what has just been said.
    sleep 100000
}

while read -r module; do
    insmod "/modules/$module.ko" || fail "insmod-$module"
done </modules/order

# Prints the serial number of the block device whose sysfs folder is $1.
serial_of() {
    if [ -e "$1/serial" ]; then                # virtio-blk
        cat "$1/serial"
    elif [ -e "$1/device/serial" ]; then       # nvme, padded with spaces
        cat "$1/device/serial"
    elif [ -e "$1/device/vpd_pg80" ]; then     # sd, behind a header of 4 bytes
        tail -c +5 "$1/device/vpd_pg80"
    fi | tr -d ' \000\n'
}

# Sets $device to the disk with serial number $1. Not every bus has been scanned by now: it waits.
find_disk() {
    tries=0
    while [ $tries -lt 150 ]; do
        for folder in /sys/block/vd* /sys/block/sd* /sys/block/nvme?n?; do
            if [ -e "$folder" ] && [ "$(serial_of "$folder")" = "$1" ]; then
                device=/dev/${folder##*/}
                [ -b "$device" ] && return
            fi
        done
        tries=$((tries + 1))
        usleep 100000
    done
    fail "no-disk-$1"
}

start_agent() {
    # No udev here, so no port has a name in /dev.
    port=$(grep -l '^org.qemu.guest_agent.0$' /sys/class/virtio-ports/*/name)
    port=${port%/name}
    # It is busy until one that was killed is gone.
    while pidof qemu-ga >/dev/null; do
        usleep 10000
    done
    qemu-ga -d -m virtio-serial -p "/dev/${port##*/}" -t /run -f /run/qga.pid -l /run/qga.log
}

# Does what each line says, and tells how that ended.
obey() {
    number=0
    while read -r line; do
        eval "$line" </dev/null
        code=$?
        number=$((number + 1))
        echo "VMF done command=$number code=$code"
    done
}

devices=""
folders=""
for id in $(echo "${disks:-}" | tr ',' ' '); do
    find_disk "$id"
    devices="$devices $device"
    if [ "${workload:-idle}" = files ]; then
        mkdir "/mnt/$id"
        mount -t ext4 "$device" "/mnt/$id" || fail "mount-$id"
        folders="$folders /mnt/$id"
    fi
done
if [ -e /bin/qemu-ga ]; then
    start_agent || fail "agent-$?"
    obey </dev/ttyS1 &
fi
echo "VMF boot workload=${workload:-idle} disks=${disks:-} devices=$(echo $devices | tr ' ' ,)"

if [ "${workload:-idle}" = idle ]; then
    echo "VMF ready"
elif [ "$workload" = files ]; then
    files $folders
    fail "files-ended-$?"
else
    writer "$workload" $devices
    fail "writer-ended-$?"
fi
while :; do sleep 100000; done
