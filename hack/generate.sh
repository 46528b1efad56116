#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Generates Go from the protobuf files.
#
#   generate.sh           in place
#   generate.sh --check   elsewhere, and fail where the checked-in code differs. Exit status 3: what it
#                         takes to find out is missing

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"
cd "$repo"

# Generated code names the compiler's version, so another one would differ everywhere.
wanted=3.21.12
PATH=$repo/build/bin:$repo/build/host/bin:$PATH
module=$(go list -m)
mapfile -t protos < <(find . -path ./build -prune -o -name '*.proto' -printf '%P\n' | sort)

# Services are served by ttrpc, but for those that containerd serves on its gRPC socket.
grpc=controller/ctlapi

# generate DIRECTORY
generate() {
	local -a own=() ttrpc=()
	local proto
	for proto in "${protos[@]}"; do
		if [[ $proto == "$grpc"/* ]]; then own+=("$proto"); else ttrpc+=("$proto"); fi
	done
	protoc -I . --go_out="$1" --go_opt="module=$module" --go-ttrpc_out="$1" --go-ttrpc_opt="module=$module" "${ttrpc[@]}"
	protoc -I . --go_out="$1" --go_opt="module=$module" --go-grpc_out="$1" --go-grpc_opt="module=$module" "${own[@]}"
}

case ${1:-} in
--check)
	found=$(protoc --version 2>/dev/null || echo none)
	if [[ $found != "libprotoc $wanted" ]]; then
		say "generated code: NOT CHECKED, as protoc $wanted is not here (found: $found)"
		exit 3
	fi
	for plugin in protoc-gen-go protoc-gen-go-ttrpc protoc-gen-go-grpc; do
		command -v "$plugin" >/dev/null || { say "generated code: NOT CHECKED, as $plugin is not here"; exit 3; }
	done
	scratch=$(mktemp -d)
	trap 'rm -rf "$scratch"' EXIT
	generate "$scratch"
	while read -r file; do
		cmp -s "$scratch/$file" "$file" || die "$file is not what its .proto generates: run make generate"
	done < <(cd "$scratch" && find . -name '*.go' -printf '%P\n')
	say "generated code: current (${#protos[@]} files)"
	;;
'')
	step "Protobufs"
	[[ $(protoc --version) == "libprotoc $wanted" ]] || warn "protoc is $(protoc --version), not $wanted: expect more changes than you made"
	generate .
	printf '    %s\n' "${protos[@]}"
	;;
*) die "usage: generate.sh [--check]" ;;
esac
