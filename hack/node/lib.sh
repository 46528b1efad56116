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
	CGO_ENABLED=0 go build -ldflags='-s -w' -o "$programs/hostile" ./e2e/testimage/hostile
	gcc -static -O2 -Wall -Werror -o "$programs/cwho" e2e/testimage/cwho/cwho.c
}

# hypervisors: those to run on. $VMM; if empty, QEMU, and Cloud Hypervisor if there is a binary.
hypervisors() {
	if [[ ${VMM:-} ]]; then
		tr ' ' '\n' <<<"$VMM"
		return
	fi
	echo qemu
	if [[ ${CLOUD_HYPERVISOR:-} ]] || command -v cloud-hypervisor >/dev/null; then
		echo cloudhypervisor
	else
		warn "on Cloud Hypervisor SKIPPED: there is no cloud-hypervisor on PATH, nor in \$CLOUD_HYPERVISOR"
	fi
}

# locate_cloud_hypervisor: $CLOUD_HYPERVISOR by a path that is the same in the node, where /tmp is new.
locate_cloud_hypervisor() {
	local path=${CLOUD_HYPERVISOR:-$(command -v cloud-hypervisor || true)}
	[[ $path ]] || return 0
	[[ -x $path ]] || die "CLOUD_HYPERVISOR=$path: there is no program"
	path=$(readlink -f "$path")
	if [[ $path == /tmp/* ]]; then
		mkdir -p "$programs"
		install -m 0755 "$path" "$programs/cloud-hypervisor"
		path=$programs/cloud-hypervisor
	fi
	export CLOUD_HYPERVISOR=$path
}
