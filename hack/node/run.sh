#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# The emulated node: a machine in software emulation whose /dev/kvm is real, with this host's files.
#
#   run.sh [COMMAND]   runs a shell's COMMAND in it, in this directory; without one, a shell on the terminal
#
# Standard output and error are the command's, and so is the exit status: all of 0 to 255. What the command
# puts into $OUT is in NODE_OUT afterwards. The node ends with the command, with this script, however that
# ends, and at its limit. Of its own are the exit statuses 124 (the limit was reached), 125 (it broke, and
# why), 129, 130 and 143 (a signal), 141 (nobody reads its output). hack/node/README.md has its traps.
#
# Environment:
#   NODE_CPUS      processors (2)
#   NODE_MEMORY    MiB (half of what the host has available, 2048 to 8192)
#   NODE_DISK      MiB of its disk, which is sparse (32768)
#   NODE_TIMEOUT   seconds for all of it (3600; for a shell on the terminal 0: none)
#   NODE_BOOT      seconds until the command begins (180)
#   NODE_OUT       where $OUT is on the host (build/node); emptied before if it is that
#   NODE_VERBOSE   tell when it is up, and what it took
#   NODE_CACHE     what setup.sh has made (build/cache/node)

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"

# The end of whoever called, however it comes, is the end of this, and of the machine.
if [[ ${NODE_BOUND:-} != "$PPID" ]]; then
	export NODE_BOUND=$PPID
	exec setpriv --pdeathsig TERM -- "${BASH_SOURCE[0]}" "$@"
fi

# Where mkfs.ext4 lives.
PATH=$PATH:/usr/sbin:/sbin
cache=${NODE_CACHE:-$repo/build/cache/node}
out=${NODE_OUT:-$repo/build/node}
machine='' reader='' failure=''

# broken TEXT: the node's own failure, with the end of its console, or where its kernel panicked.
broken() {
	printf '%serror:%s emulated node: %s\n' "$red" "$reset" "$1" >&2
	[[ -s $work/console ]] || return 0
	cp "$work/console" "$out/console.log" || true
	printf '    its console (all of it is in %s):\n' "$out/console.log" >&2
	# Whatever is found there, the status is the caller's.
	tail -c 65536 "$work/console" | tr -d '\r' | if grep -qs 'Kernel panic' "$work/console"; then
		grep -m 1 -B 20 -A 20 'Kernel panic'
	else
		tail -n 25
	fi | sed 's/^/    | /' >&2 || true
}

# megabytes: what the machine gets unless it is said.
megabytes() {
	local half
	half=$(awk '$1 == "MemAvailable:" { print int($2 / 2048) }' /proc/meminfo)
	((half < 8192)) || half=8192
	((half > 2048)) || half=2048
	echo "$half"
}

# end SIGNAL: of the machine, awaited.
end() {
	if [[ -n $machine ]]; then
		kill "-$1" "$machine" 2>/dev/null || true
		wait "$machine" 2>/dev/null || ended=$?
		machine=
	fi
}

# shellcheck disable=SC2317 # A trap calls it.
clean_up() {
	end KILL
	[[ -z ${terminal:-} ]] || stty "$terminal" 2>/dev/null || true
	rm -rf "$work"
}

# environment: what the command gets of ours.
environment() {
	local name
	for name in PATH BASH_ENV TERM NO_COLOR GOFLAGS CLOUD_HYPERVISOR BUSYBOX $(compgen -e E2E_) ${NODE_ENV:-}; do
		[[ -z ${!name:-} ]] || printf 'export %s=%q\n' "$name" "${!name}"
	done
	printf 'export E2E_CLOCK=1 E2E_TIME_FACTOR=%q E2E_COUNTS=%q\n' "${E2E_TIME_FACTOR:-6}" "${E2E_COUNTS:-small}"
	# Root, whoever called; and what is slow has more time and less to do.
	echo 'export HOME=/root USER=root'
}

# hand_over: what inside.sh finds in /run/node.
hand_over() {
	mkdir "$work/ctl"
	printf '%s\n' "$repo" >"$work/ctl/repo"
	printf '%s\n' "$PWD" >"$work/ctl/directory"
	environment >"$work/ctl/environment"
	if [[ -n $interactive ]]; then
		stty size | tr ' ' '\n' >"$work/ctl/interactive"
		echo 'exec bash -i' >"$work/ctl/command"
	else
		printf '%s\n' "$command" >"$work/ctl/command"
	fi
}

# tell_times: what it took, by the clock and of the host's processors.
tell_times() {
	[[ -n ${NODE_VERBOSE:-} ]] || return 0
	times >"$work/times"
	awk -v took="$SECONDS" 'END {
		for (i = 1; i <= NF; i++) { split($i, t, /[ms]/); sum += t[1] * 60 + t[2] }
		printf "    node: ended after %d s, which took %d s of processors\n", took, sum
	}' "$work/times" >&2
}

# boot: starts the machine in the background.
boot() {
	local qemu=qemu-system-x86_64 threads=multi
	local -a serial
	[[ ! -x $cache/qemu/run ]] || qemu=$cache/qemu/run
	[[ ! -e $cache/single ]] || threads=single
	truncate -s "${NODE_DISK:-32768}M" "$work/disk"
	mkfs.ext4 -q -F -O ^has_journal -E lazy_itable_init=1,nodiscard "$work/disk" 2>"$work/console" || die "mkfs.ext4: $(<"$work/console")"
	if [[ -n $interactive ]]; then
		serial=(-chardev "stdio,id=console,mux=on,signal=off,logfile=$work/console" -serial chardev:console -mon chardev=console)
	else
		mkfifo "$work/stdout" "$work/stderr"
		cat <"$work/stdout" &
		reader=$!
		cat <"$work/stderr" >&2 &
		# shellcheck disable=SC2054 # QEMU's commas.
		serial=(-chardev "file,id=console,path=$work/console" -serial chardev:console
			-device virtio-serial-pci
			-chardev "file,id=out,path=$work/stdout" -device virtserialport,chardev=out,name=out
			-chardev "file,id=err,path=$work/stderr" -device virtserialport,chardev=err,name=err)
	fi
	exec 3<&0
	# Page tables of four levels, not five: in software each step of a walk costs, and a guest's guest takes
	# each of its own steps through its host's. The emulated KVM must not spin for an idle guest either.
	setpriv --pdeathsig KILL -- "$qemu" -name emulated-node -nodefaults -no-user-config -no-reboot -display none \
		-M q35 -accel "tcg,thread=$threads" -cpu max,la57=off -smp "${NODE_CPUS:-2}" -m "${NODE_MEMORY:-$(megabytes)}" \
		-kernel "$cache/vmlinuz" -initrd "$cache/initrd" \
		-append "console=ttyS0 quiet panic=-1 oops=panic mitigations=off nowatchdog apparmor=0 kvm.halt_poll_ns=0" \
		"${serial[@]}" \
		-drive "if=none,id=disk,file=$work/disk,format=raw,cache=unsafe,discard=unmap" -device virtio-blk-pci,drive=disk \
		-fsdev "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap" -device virtio-9p-pci,fsdev=root,mount_tag=root \
		-fsdev "local,id=ctl,path=$work/ctl,security_model=none" -device virtio-9p-pci,fsdev=ctl,mount_tag=ctl \
		-fsdev "local,id=out,path=$out,security_model=none" -device virtio-9p-pci,fsdev=out,mount_tag=out \
		-d cpu_reset -D "$work/resets" <&3 2>"$work/qemu" &
	machine=$!
}

# ticks: of processor time that the machine's processors have taken, which are threads of QEMU's.
ticks() {
	local thread sum=0
	local -a stat
	for thread in "/proc/$machine/task"/*; do
		[[ ${thread##*/} != "$machine" ]] || continue
		# After the name, which is in parentheses: the 12th and 13th of the rest.
		read -r -a stat < <(sed 's/.*) //' "$thread/stat" 2>/dev/null) || continue
		((sum += stat[11] + stat[12])) || true
	done
	echo "$sum"
}

# stands_still: its processors have done nothing at all for two minutes, as an idle system's never do.
stands_still() {
	local now
	((SECONDS >= looked + 120)) || return 1
	now=$(ticks)
	looked=$SECONDS
	[[ $now == "$ticked" ]] && return 0
	ticked=$now
	return 1
}

# attend: until the machine has ended, by itself or because it has to.
attend() {
	local limit=${NODE_TIMEOUT:-$([[ -n $interactive ]] && echo 0 || echo 3600)} boot=${NODE_BOOT:-180} begun='' written=
	SECONDS=0
	while kill -0 "$machine" 2>/dev/null; do
		if [[ -z $begun && -e $work/ctl/started ]]; then
			begun=$SECONDS
			# The machine has it open, and nobody else needs to: it goes with it, however that ends.
			rm -f "$work/disk"
			[[ -z ${NODE_VERBOSE:-} ]] || say "node: up after $begun s" >&2
		fi
		if [[ -z $begun ]] && ((SECONDS >= boot)); then
			failure="it was not up within $boot s (NODE_BOOT)"
			end KILL
		elif ((limit > 0 && SECONDS >= limit)); then
			failure="it was ended at its limit of $limit s (NODE_TIMEOUT)"
			limited=1
			end KILL
		elif [[ -n $begun && -z $interactive ]] && stands_still; then
			failure="its processors stand still"
			end KILL
		elif [[ -n $reader && ! -e $work/ctl/status ]] && ! kill -0 "$reader" 2>/dev/null; then
			# Nobody reads its output any more, which a shell tells as SIGPIPE's end; or it ends just now.
			sleep 1
			! kill -0 "$machine" 2>/dev/null || exit 141
		elif [[ -e $work/ctl/status ]] && ((SECONDS >= ${written:=$((SECONDS + 20))})); then
			# It has done its work, and cannot turn itself off.
			end KILL
		else
			sleep 0.1
		fi
	done
	end KILL
	# The rest of its output. A machine that did not start has not opened it.
	[[ -n $interactive ]] || : <>"$work/stdout" <>"$work/stderr"
	wait
	tell_times
}

# main [COMMAND]: read as a whole before it begins, as the file may change while the node runs.
main() {
	command=${1-}
	if [[ $# -eq 0 ]]; then
		[[ -t 0 && -t 1 ]] || die "usage: run.sh COMMAND (a shell in the node wants a terminal)"
		interactive=1
		terminal=$(stty -g)
	fi
	[[ -e $cache/initrd ]] || die "$cache is not there: run hack/node/setup.sh"
	work=$(mktemp -d "${TMPDIR:-/var/tmp}/node.XXXXXX")
	trap clean_up EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM
	mkdir -p "$out"
	# Until the last process that has this open is gone, the machine's too.
	exec 9<"$out"
	flock -n 9 || die "another node has $out for what it puts out: set NODE_OUT to another directory"
	[[ -n ${NODE_OUT:-} ]] || find "$out" -mindepth 1 -delete
	hand_over
	boot
	attend

	if [[ -e $work/ctl/status && -z $failure ]]; then
		exit "$(<"$work/ctl/status")"
	fi
	if [[ -z $failure ]]; then
		failure="it ended without an exit status: QEMU's is $ended$( ((ended <= 128)) || echo " (SIG$(kill -l "$ended"))"), $(tail -n 3 "$work/qemu" | tr '\n' ' ')"
		if [[ $ended == 0 ]]; then
			failure="it reset itself: $(grep -A 40 'Triple fault' "$work/resets" 2>/dev/null || echo 'no triple fault')"
		fi
		if grep -qs 'Kernel panic' "$work/console"; then
			failure="its kernel panicked"
		fi
	fi
	broken "$failure"
	if [[ -n $limited ]]; then exit 124; fi
	exit 125
}

interactive='' limited='' command='' ended=0 looked=0 ticked=''

main "$@"
