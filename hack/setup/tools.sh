#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Tools that are Go programs of others, into build/bin, at the versions that the modules in
# hack/tools and hack/lint pin.
#
#   tools.sh TOOL...   crictl, critest, ginkgo, gotestsum, golangci-lint, protoc-gen-go, protoc-gen-go-ttrpc, protoc-gen-go-grpc

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"
cd "$repo"

bin=$repo/build/bin

# tool NAME MODULE_DIRECTORY PACKAGE VERSION_VARIABLE [go COMMAND]: builds it unless this module's sums did so.
tool() {
	local name=$1 module=$2 package=$3 variable=$4 command=${5:-build} hash version stamp start=$SECONDS
	hash=$(hash_files "$module/go.mod" "$module/go.sum")-$(go env GOVERSION)
	stamp=$bin/.$name.stamp
	if [[ -x $bin/$name ]] && stamp_matches "$stamp" "$hash"; then
		say "$name: up to date"
		return
	fi
	version=$(go -C "$module" list -f '{{with .Module}}{{.Version}}{{end}}' "$package")
	say "$name: building $version"
	rm -f "$stamp"
	# Not our flags: they are for one build cache with our own code.
	# shellcheck disable=SC2086 # A command of several words.
	GOFLAGS=-buildvcs=false CGO_ENABLED=0 go -C "$module" $command -trimpath \
		-ldflags "-s -w ${variable:+-X $variable=$version}" -o "$bin/$name" "$package"
	echo "$hash" >"$stamp"
	say "$name: built in $((SECONDS - start)) s"
}

mkdir -p "$bin"
step "Tools ($*)"
for name in "$@"; do
	case $name in
	crictl) tool crictl hack/tools sigs.k8s.io/cri-tools/cmd/crictl sigs.k8s.io/cri-tools/pkg/version.Version ;;
	critest) tool critest hack/tools sigs.k8s.io/cri-tools/cmd/critest sigs.k8s.io/cri-tools/pkg/version.Version 'test -c' ;;
	ginkgo) tool ginkgo hack/tools github.com/onsi/ginkgo/v2/ginkgo '' ;;
	gotestsum) tool gotestsum hack/tools gotest.tools/gotestsum gotest.tools/gotestsum/cmd.version ;;
	golangci-lint) tool golangci-lint hack/lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint main.version ;;
	protoc-gen-go) tool protoc-gen-go . google.golang.org/protobuf/cmd/protoc-gen-go '' ;;
	protoc-gen-go-ttrpc) tool protoc-gen-go-ttrpc . github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc '' ;;
	protoc-gen-go-grpc) tool protoc-gen-go-grpc . google.golang.org/grpc/cmd/protoc-gen-go-grpc '' ;;
	*) die "unknown tool $name" ;;
	esac
done
