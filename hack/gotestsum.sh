#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Runs tests as "go test -v" does. Its last words are the names of what was skipped and what failed, and the
# assertions that failed: where they happen, containerd's log follows them, and whoever keeps but the end of
# a long output would not see them.
#
#   gotestsum.sh ARGUMENT...   as "go test" has them

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"
cd "$repo"

log=$(mktemp)
trap 'rm -f "$log"' EXIT

status=0
gotestsum --format standard-verbose --hide-summary output -- "$@" | tee "$log" || status=$?
if [[ $status != 0 ]]; then
	step 'What failed, and why'
	awk -f hack/assertions.awk "$log"
fi
exit "$status"
