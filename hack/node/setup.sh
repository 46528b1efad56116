#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# What the emulated node is made of, in build/cache/node, made once (remove the directory for newer ones):
#
#   vmlinuz, modules    a kernel of Debian's with kvm-amd, and those of its modules that are wanted
#   initrd              busybox, the modules and init.sh
#   qemu                a QEMU that bears several threads of emulation, unpacked, where the machine's does not
#   about               what these are, for people
#
# Both come from Debian by an apt with package sources of its own; nothing is installed and /etc/apt stays
# as it is. Exit status 3: they cannot be had here, and why.
#
# Environment:
#   NODE_CACHE   where all that goes (build/cache/node)

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"
# shellcheck source=hack/setup/guest-apt.sh
source "$repo/hack/setup/guest-apt.sh"

export LC_ALL=C
cache=${NODE_CACHE:-$repo/build/cache/node}
# The first major version of QEMU whose threads of emulation do not run stale code.
threads_from=10

# lacking TEXT: what the node takes cannot be had.
lacking() { warn "emulated node: $*"; exit 3; }

# major QEMU: the first number of its version, or nothing.
major() { "$1" -version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9]*\).*/\1/p'; }

# sources: makes the private apt, once.
sources() {
	local release
	[[ ! -e $scratch/apt/sources.list ]] || return 0
	release=$(debian_release) || lacking "its kernel is Debian's, and this machine does not run Debian"
	say "adding $release-backports as a package source for these downloads alone, in $scratch/apt, not in /etc/apt"
	private_apt_init "$scratch/apt" deb "$release" "$release-updates" "$release-security" "$release-backports" \
		>"$scratch/log" 2>&1 || lacking "no package source answers: $(tail -n 3 "$scratch/log")"
}

# download DIRECTORY [-t SUITE] PACKAGE...: and unpack there.
download() {
	local dir=$1 deb
	shift
	mkdir -p "$dir/debs"
	(cd "$dir/debs" && private_apt "$scratch/apt" apt-get download "$@") >>"$scratch/log" 2>&1 ||
		lacking "cannot download $*: $(tail -n 3 "$scratch/log")"
	for deb in "$dir/debs"/*.deb; do
		dpkg-deb -x "$deb" "$dir"
	done
	rm -r "$dir/debs"
}

# newest_kernel: the package of the newest 6.12, else of the newest 6.1. Other flavours lack 9p.
newest_kernel() {
	local series found
	for series in 6.12 6.1; do
		found=$(private_apt "$scratch/apt" apt-cache search --names-only "^linux-image-${series/./\\.}\.[0-9.]+[-+][a-z0-9.+-]*amd64$" |
			awk '$1 !~ /-(rt|cloud)-/ { print $1 }' | sort -V | tail -n 1)
		if [[ -n $found ]]; then
			echo "$found"
			return
		fi
	done
	return 1
}

# unpacked_module FILE: prints a module's bytes, whatever it is packed with.
unpacked_module() {
	case $1 in
	*.xz) xz -dc "$1" ;;
	*.zst) zstd -dc "$1" ;;
	*) cat "$1" ;;
	esac
}

# unsign FILE: takes a module's signature off, which an emulated kernel would check for a quarter of a
# second. It ends with a line of 28 bytes, before that the signature's length, and before the 12 bytes that
# this is a part of the signature.
unsign() {
	local length
	[[ $(tail -c 28 "$1" | tr -d '\0') == '~Module signature appended~' ]] || return 0
	length=$((16#$(tail -c 32 "$1" | head -c 4 | od -An -tx1 | tr -d ' ')))
	truncate -s "-$((length + 40))" "$1"
}

# take_module NAME: puts it and what it depends on into modules/, numbered in the order of loading.
take_module() {
	local name=${1//-/_} depends
	[[ -z ${taken[$name]:-} ]] || return 0
	taken[$name]=1
	# It may be built in, or not be there.
	[[ -n ${module_file[$name]:-} ]] || return 0
	unpacked_module "${module_file[$name]}" >"$scratch/$name.ko"
	unsign "$scratch/$name.ko"
	depends=$(tr '\0' '\n' <"$scratch/$name.ko" | sed -n 's/^depends=//p' | head -n 1)
	for depends in ${depends//,/ }; do
		take_module "$depends"
	done
	number=$((number + 1))
	mv "$scratch/$name.ko" "$(printf '%s/modules/%03d-%s.ko' "$made" "$number" "$name")"
}

# kernel: vmlinuz and modules.
kernel() {
	local package file name number=0
	local -A taken=() module_file=()
	sources
	package=$(newest_kernel) || lacking "no package source of this machine has a Linux 6.12 or 6.1"
	say "downloading $package (100 MB)"
	download "$scratch/kernel" "$package"
	mv "$scratch"/kernel/boot/vmlinuz-* "$made/vmlinuz"
	mkdir "$made/modules"
	while read -r file; do
		name=$(basename "$file")
		name=${name%%.ko*}
		module_file[${name//-/_}]=$file
	done < <(find "$scratch/kernel" -name '*.ko*')
	while read -r name; do
		take_module "$name"
	done < <(sed 's/#.*//' "$here/modules.list" | xargs -n 1)
	[[ -e $(compgen -G "$made/modules/*-kvm_amd.ko") ]] || lacking "$package has no kvm-amd"
	rm -rf "$scratch/kernel"
	say "${package#linux-image-}, with $number modules" | tee -a "$made/about"
}

# initrd: an archive of the first user space. busybox's cpio serves, as no other may be here.
initrd() {
	local busybox root=$cache/initrd.d
	rm -rf "$root"
	busybox=$(static_busybox) || lacking "there is no static busybox (package busybox-static)"
	mkdir -p "$root"/{bin,dev,proc,sys,lower,upper,ctl,new}
	cp "$busybox" "$root/bin/busybox"
	cp -r "$cache/modules" "$root/modules"
	install -m 0755 "$here/init.sh" "$root/init"
	(cd "$root" && find . | "$busybox" cpio -o -H newc 2>/dev/null) >"$cache/initrd"
	rm -r "$root"
}

# static_busybox: its path.
static_busybox() {
	local dir
	while read -r -d : dir; do
		if [[ -x $dir/busybox ]] && ! ldd "$dir/busybox" >/dev/null 2>&1; then
			echo "$dir/busybox"
			return
		fi
	done <<<"$PATH:/bin:"
	return 1
}

# qemu: backports' where the machine's is too old. Of what it depends on come those that backports have
# too, and those that are not here in any version.
qemu() {
	local here_is plan release
	local -a wanted
	here_is=$(major qemu-system-x86_64 || true)
	if [[ ${here_is:-0} -ge $threads_from ]]; then
		say "the machine's own QEMU $here_is, several threads" | tee -a "$made/about"
		return
	fi
	sources
	release=$(debian_release)
	plan=$(private_apt "$scratch/apt" apt-get -s --no-install-recommends -t "$release-backports" \
		-o Dir::State::status=/dev/null install qemu-system-x86 2>>"$scratch/log" | awk '$1 == "Inst" { print $2, $3, $4, $5 }') || plan=
	mapfile -t wanted < <(wanted_packages <<<"$plan")
	if ! grep -q '^qemu-system-x86$' < <(printf '%s\n' "${wanted[@]}"); then
		single_thread "$release-backports has no QEMU"
		return
	fi
	say "downloading ${wanted[*]} (20 MB)"
	(download "$made/qemu" -t "$release-backports" "${wanted[@]}") || { single_thread "its download failed"; return; }
	cat >"$made/qemu/run" <<-'EOT'
		#!/bin/sh
		# QEMU with the libraries that came with it, wherever this directory lies.
		root=$(dirname "$(readlink -f "$0")")
		triplet=$(uname -m)-linux-gnu
		export LD_LIBRARY_PATH="$root/usr/lib/$triplet:$root/lib/$triplet"
		exec "$root/usr/bin/qemu-system-x86_64" -L "$root/usr/share/seabios" -L "$root/usr/share/qemu" "$@"
	EOT
	chmod 0755 "$made/qemu/run"
	if [[ $(major "$made/qemu/run") -lt $threads_from ]]; then
		single_thread "the one of $release-backports does not run here: $("$made/qemu/run" -version 2>&1 | tail -n 1)"
		return
	fi
	say "QEMU $(major "$made/qemu/run") of $release-backports, unpacked, several threads" | tee -a "$made/about"
}

# wanted_packages: of a plan's lines, those to unpack.
wanted_packages() {
	local name rest
	while read -r name rest; do
		if [[ $rest == *-backports* || $(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null) != installed ]]; then
			echo "$name"
		fi
	done
}

# single_thread REASON: the machine's QEMU it is.
single_thread() {
	rm -rf "$made/qemu"
	[[ -n $(major qemu-system-x86_64) ]] || lacking "$1, and there is no QEMU here"
	warn "emulated node: $1. The machine's own, QEMU $(major qemu-system-x86_64), crashes the node's kernel" \
		"with several threads of emulation: it gets one, and takes about twice as long"
	say "the machine's own QEMU $(major qemu-system-x86_64), ONE thread: $1" >>"$made/about"
	touch "$made/single"
}

# foreign: what is others', made aside and moved into place.
foreign() {
	scratch=$(mktemp -d "$(dirname "$cache")/node.XXXXXX")
	trap 'rm -rf "$scratch"' EXIT
	made=$scratch/made
	mkdir "$made"
	kernel
	qemu
	echo "$1" >"$made/.stamp"
	rm -rf "$cache"
	mv "$made" "$cache"
}

step "Emulated node"
mkdir -p "$(dirname "$cache")"
hash=$(hash_files "$here/modules.list")-$(debian_release || true)
if stamp_matches "$cache/.stamp" "$hash"; then
	sed 's/^ */    up to date: /' "$cache/about"
else
	foreign "$hash"
fi
hash=$(hash_files "$here/init.sh" "$here/setup.sh")
if ! stamp_matches "$cache/.initrd" "$hash"; then
	initrd
	echo "$hash" >"$cache/.initrd"
fi
