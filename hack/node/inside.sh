#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# The emulated node's first process after init.sh. It runs what run.sh has put into /run/node, hands its
# output to the host as it comes, writes down its exit status and turns the machine off.

set -uo pipefail

ctl=/run/node

# port NAME: the device of a virtio port.
port() {
	local dir
	for dir in /sys/class/virtio-ports/*; do
		[[ $(<"$dir/name") != "$1" ]] || echo "/dev/$(basename "$dir")"
	done
}

# turn_off: not by the way of a system, of which there is none.
turn_off() {
	sync
	echo o >/proc/sysrq-trigger
	# The kernel does it by and by, and must not lose its first process before.
	sleep 3600
}

# run_command: by a shell of its own, in a session of its own. Its output goes through pipes, which it may
# open anew by /dev/stdout, while a port can be opened once.
run_command() {
	local out err i status=0
	mkfifo /run/stdout /run/stderr
	out=$(port out) err=$(port err)
	cat /run/stdout >"$out" &
	cat /run/stderr >"$err" &
	setsid --wait bash "$ctl/command" </dev/null >/run/stdout 2>/run/stderr || status=$?
	# What the command left running may hold its output open for ever.
	for ((i = 0; i < 100; i++)); do
		[[ -n $(jobs -r) ]] || break
		sleep 0.1
	done
	echo "$status" >"$ctl/status.new"
	mv "$ctl/status.new" "$ctl/status"
}

# run_shell: on the console.
run_shell() {
	local status=0
	setsid --ctty --wait bash "$ctl/command" <"/dev/$1" >"/dev/$1" 2>&1 || status=$?
	echo "$status" >"$ctl/status"
}

# open_kvm: gives /dev/kvm to a group, as udev would: confined VMMs are no root.
open_kvm() {
	[[ -e /dev/kvm ]] || return 0
	chgrp kvm /dev/kvm 2>/dev/null || chgrp 104 /dev/kvm
	chmod 0660 /dev/kvm
}

hostname node
open_kvm
# shellcheck source=/dev/null
source "$ctl/environment"
export OUT=/run/out
cd "$(<"$ctl/directory")" || cd /
touch "$ctl/started"
if [[ -e $ctl/interactive ]]; then
	stty -F /dev/ttyS0 rows "$(sed -n 1p "$ctl/interactive")" cols "$(sed -n 2p "$ctl/interactive")" 2>/dev/null
	run_shell ttyS0
else
	run_command
fi
turn_off
