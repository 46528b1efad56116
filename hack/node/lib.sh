# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# What test-kvm.sh and bench-kvm.sh share. Source it after hack/lib.sh, in the repository's directory.

# Where what runs in the node is compiled to.
programs=$PWD/build/kvm

# compile_images: the programs of the tests' images.
compile_images() {
	mkdir -p "$programs"
	CGO_ENABLED=0 go build -ldflags='-s -w' -o "$programs/helper" ./e2e/testimage/helper
	gcc -static -O2 -Wall -Werror -o "$programs/cwho" e2e/testimage/cwho/cwho.c
}

# hypervisors: those to run on. $VMM; if empty, QEMU, and Cloud Hypervisor if there is a binary.
hypervisors() {
	if [[ ${VMM:-} ]]; then
		tr ' ' '\n' <<<"$VMM"
		return
	fi
	echo qemu
	if CLOUD_HYPERVISOR=${CLOUD_HYPERVISOR:-$(command -v cloud-hypervisor)}; then
		echo cloudhypervisor
	fi
}
