#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Runs each fuzz test of the module for TIME.   fuzz.sh TIME

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"
cd "$repo"

while IFS=: read -r file name; do
	step "$name in $(dirname "$file"), ${1:-10s}"
	go test -run '^$' -fuzz "^$name\$" -fuzztime "${1:-10s}" "./$(dirname "$file")"
done < <(grep -roE --include='*_test.go' --exclude-dir=build '^func Fuzz[A-Za-z0-9_]*' . | sed 's,^\./,,; s/func //' | sort)
