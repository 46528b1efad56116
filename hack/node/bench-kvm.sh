#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# The benchmark in the emulated node, where KVM is real: ours against runc and the bare VMM, in the same
# node. It is compiled here and runs there. The results are in build/bench-kvm-HYPERVISOR.json.
#
# Environment, besides that of run.sh:
#   VMM        "qemu", "cloudhypervisor" or both, separated by a space; if empty, QEMU, and Cloud Hypervisor
#              where $CLOUD_HYPERVISOR names a binary or cloud-hypervisor is in PATH
#   ROUNDS     pods by each handler (10)
#   SECTIONS   what to measure (start,bare)

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"
cd "$repo"
# shellcheck source=hack/node/lib.sh
source "$here/lib.sh"

# bench VMM: in a node of its own.
bench() {
	local vmm=$1 out=$repo/build/node-bench
	step "Benchmark in the emulated node, vmm = $vmm"
	rm -rf "$out"
	E2E_VMM=$vmm E2E_ACCELERATOR=kvm E2E_PROGRAMS=$programs NODE_VERBOSE=1 NODE_OUT=$out NODE_TIMEOUT=${NODE_TIMEOUT:-3600} \
		"$here/run.sh" "
			cd '$repo'
			'$programs/bench' -o \"\$OUT/bench.json\" -n ${ROUNDS:-10} -warm-up 1 -sections ${SECTIONS:-start,bare}" || return
	mv "$out/bench.json" "build/bench-kvm-$vmm.json"
	say "the results are in build/bench-kvm-$vmm.json"
}

# main: read as a whole before it begins, as the file may change while it runs.
main() {
	local vmm status=0
	"$here/setup.sh"
	compile_images
	go build -o "$programs/bench" ./e2e/bench
	while read -r vmm; do
		bench "$vmm" </dev/null || status=1
	done < <(hypervisors)
	exit "$status"
}

main "$@"
