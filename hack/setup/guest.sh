#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# What runs in a pod's VM, under build/guest. Each part is built again only when its inputs changed.
#
#   guest.sh foreign   the kernel and crun, from Debian's sources
#   guest.sh image     the agent, and the root image with agent and crun

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"
cd "$repo"

export OUT=${OUT:-$repo/build/guest}

foreign() {
	# Others' sources lie there, with Go among them that is no part of this module.
	mkdir -p build/cache
	echo "module cache" >build/cache/go.mod
	step "Guest kernel"
	if [[ -z ${LINUX_SOURCE:-} ]]; then
		hack/setup/kernel-source.sh | sed -u "s/^kernel source: /    source: /"
		export LINUX_SOURCE=$repo/build/cache/linux-source-6.12.tar.xz
	fi
	guest/kernel/build.sh 2>&1 | sed -u 's/^guest kernel: /    /'
	step "Guest crun"
	guest/rootfs/crun/build.sh 2>&1 | sed -u 's/^guest crun: /    /'
}

image() {
	local hash stamp=$OUT/.rootfs.stamp
	step "Guest agent and image"
	mkdir -p "$OUT" build/bin
	go build -ldflags "-s -w -X main.version=$("$repo/hack/version.sh")" -o "$OUT/agent" ./guest/agent
	go build -o build/bin/mkimage ./guest/rootfs/mkimage
	hash=$(hash_files "$OUT/agent" "$OUT/crun" build/bin/mkimage)
	if [[ -f $OUT/rootfs.erofs ]] && stamp_matches "$stamp" "$hash"; then
		say "up to date ($OUT/rootfs.erofs, $(stat -c %s "$OUT/rootfs.erofs") bytes)"
		return
	fi
	rm -f "$stamp"
	build/bin/mkimage -agent "$OUT/agent" -crun "$OUT/crun" -o "$OUT/rootfs.erofs" | sed -u 's/^/    /'
	echo "$hash" >"$stamp"
}

case ${1:-} in
foreign | image) "$1" ;;
*) sed -n '5,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
esac
