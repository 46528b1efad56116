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

# remove_nodes: not those that run, and never through a mount, which leads elsewhere.
remove_nodes() {
	local dir
	for dir in "$nodes"/*/; do
		[[ -d $dir ]] || continue
		if grep -q " $dir" /proc/self/mountinfo || { [[ -e ${dir}lock ]] && ! as_root flock -n "${dir}lock" true; }; then
			warn "$dir belongs to a node that runs, or that died with its mounts in place: left alone"
			continue
		fi
		announce "rm -r $dir"
		as_root rm -rf "$dir"
	done
	if [[ -d $nodes ]]; then
		as_root rmdir --ignore-fail-on-non-empty "$nodes"
	fi
}

step "Clean"
case ${1:-} in
outputs) rm -rf "$repo"/build/{bin,critest,guest,kvm,node,bench.json} ;;
all) rm -rf "$repo/build" ;;
*) die "usage: clean.sh outputs|all" ;;
esac
remove_nodes
