#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Runs the tests of packages. Those that boot virtual machines come last, a package at a time: in software
# emulation each of them takes the whole machine, and others' time limits would not bear that.
#
#   unit.sh PACKAGE... -- COMMAND...   COMMAND is "go test" with its flags

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"

packages=() quiet=() machines=()
while [[ $# -gt 0 && $1 != -- ]]; do
	packages+=("$1")
	shift
done
[[ $# -gt 1 && ${#packages[@]} -gt 0 ]] || die "usage: unit.sh PACKAGE... -- COMMAND..."
shift

# Whoever boots a machine names its kernel, or the package with the tests that do.
list=$(go list -f '{{.ImportPath}} {{.Dir}}' "${packages[@]}")
while read -r path dir; do
	if grep -qsE "vmlinux|realvm" "$dir"/*_test.go; then
		machines+=("$path")
	else
		quiet+=("$path")
	fi
done <<<"$list"

status=0
if [[ ${#quiet[@]} -gt 0 ]]; then
	"$@" "${quiet[@]}" || status=$?
fi
if [[ ${#machines[@]} -gt 0 ]]; then
	"$@" -p 1 "${machines[@]}" || status=$?
fi
exit "$status"
