#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Removes what was built and what test nodes left behind.
#
#   clean.sh outputs   binaries, guest image and kernel; the caches stay
#   clean.sh all       build/ altogether

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"

nodes=/var/tmp/chv

# remove_nodes: never through a mount, as a live node's mounts lead elsewhere.
remove_nodes() {
	[[ -e $nodes ]] || return 0
	if grep -q " $nodes/" /proc/self/mountinfo; then
		warn "$nodes has mounts in it, so a node runs there or died there: left alone"
		return
	fi
	announce "rm -r $nodes"
	as_root rm -rf "$nodes"
}

step "Clean"
case ${1:-} in
outputs) rm -rf "$repo"/build/{bin,guest,bench.json} ;;
all) rm -rf "$repo/build" ;;
*) die "usage: clean.sh outputs|all" ;;
esac
remove_nodes
