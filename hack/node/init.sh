#!/bin/busybox sh
# shellcheck shell=dash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# The emulated node's first process, run by busybox from its initrd: modules, the host's root read-only
# under a memory overlay, and what a system has mounted. Then inside.sh of the checkout takes over. What
# fails here ends the node: its kernel panics without a first process, and the console tells why.

set -eu

/bin/busybox mkdir -p /bin
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in /modules/*.ko; do
	insmod "$module" || echo "node: $module cannot be loaded"
done

# share TAG DIRECTORY OPTIONS
share() { mount -t 9p -o "trans=virtio,version=9p2000.L,msize=524288,$3" "$1" "$2"; }

share root /lower ro,cache=loose
share ctl /ctl rw
mount -t tmpfs -o mode=0755 upper /upper
mkdir /upper/root /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/root,workdir=/upper/work root /new

# New inside: what belongs to a running system, and what is for a while.
disk=/new/mnt/node
mkdir -p "$disk"
mount -t ext4 -o noatime /dev/vda "$disk"
mkdir -p "$disk/tmp" "$disk/var-tmp"
chmod 1777 "$disk/tmp" "$disk/var-tmp"
mount --bind "$disk/tmp" /new/tmp
mount --bind "$disk/var-tmp" /new/var/tmp
# CNI keeps there what addresses are given away: the host's own change under this machine.
mkdir -p /new/var/lib/cni
mount -t tmpfs -o mode=0755,nosuid,nodev cni /new/var/lib/cni
mount -t tmpfs -o mode=0755,nosuid,nodev run /new/run
mkdir -p /new/run/node /new/run/out /new/run/lock
mount --move /ctl /new/run/node
share out /new/run/out rw
mount --move /proc /new/proc
mount --move /sys /new/sys
mount --move /dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm /new/dev/mqueue
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /new/dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev shm /new/dev/shm
mount -t mqueue mqueue /new/dev/mqueue
mount -t cgroup2 -o nsdelegate cgroup /new/sys/fs/cgroup
mount -t bpf bpf /new/sys/fs/bpf
ln -sf /proc/self/fd /new/dev/fd
ip link set lo up

# The checkout is where it is on the host, also below what is new inside.
repo=$(cat /new/run/node/repo)
if [ ! -e "/new$repo/hack/node/inside.sh" ]; then
	mkdir -p "/new$repo" /upper/repo /upper/repo-work
	mount -t overlay -o "lowerdir=/lower$repo,upperdir=/upper/repo,workdir=/upper/repo-work" repo "/new$repo"
fi
exec switch_root /new /bin/bash "$repo/hack/node/inside.sh"
