#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Our binaries, and those of containerd that a node of ours runs, into build/bin: static, with the
# version that git tells. The Go tool chain knows what changed, so this asks it each time.
#
#   build.sh              what is installed on a node
#   build.sh failpoints   containerd and our shim with points at which tests stop them or let them
#                         fail (vmpool/failpoint), into build/bin/failpoints: never for a node

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"
cd "$repo"

bin=$repo/build/bin
upstream=github.com/containerd/containerd/v2

version=$("$repo/hack/version.sh")
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
base=$(go list -m -f '{{.Version}}' "$upstream")

# A static libc warns of dlopen, which only PKCS#11 modules for encrypted images use.
flags="-s -w '-extldflags=-static -Wl,--no-warnings'"
flags+=" -X $upstream/version.Version=$base+cloudhv.$version"
flags+=" -X $upstream/version.Revision=$revision"
flags+=" -X $upstream/version.Package=github.com/cloudhv/containerd-cloudhv"
flags+=" -X main.version=$version -X main.revision=$revision"

# build NAME PACKAGE
build() {
	local start=$SECONDS
	go build -ldflags "$flags" -o "$bin/$1" "$2"
	say "$(printf '%-28s %4d MB  %3d s' "$1" "$(($(stat -c %s "$bin/$1") >> 20))" $((SECONDS - start)))"
}

if [[ ${1:-} == failpoints ]]; then
	step "Binaries with failpoints, for tests"
	mkdir -p "$bin/failpoints"
	export GOFLAGS="${GOFLAGS:--tags=}"
	GOFLAGS="${GOFLAGS/-tags=/-tags=failpoints,}"
	[[ $GOFLAGS == *failpoints* ]] || GOFLAGS+=" -tags=failpoints"
	build failpoints/containerd ./containerd-build/containerd
	build failpoints/containerd-shim-cloudhv-v1 ./containerd-build/containerd-shim-cloudhv-v1
	for name in cloudhvctl containerd-shim-runc-v2 crictl; do
		ln -sfn "../$name" "$bin/failpoints/$name"
	done
	exit
fi
mkdir -p "$bin"
step "Binaries, version $version on containerd $base (a first build takes minutes)"
build containerd ./containerd-build/containerd
build containerd-shim-cloudhv-v1 ./containerd-build/containerd-shim-cloudhv-v1
build cloudhvctl ./containerd-build/cloudhvctl
build containerd-shim-runc-v2 "$upstream/cmd/containerd-shim-runc-v2"
build ctr "$upstream/cmd/ctr"
