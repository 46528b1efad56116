#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Checks that there is a Go compiler that can build this module, and says what to do when not.

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"
cd "$repo"

wanted=$(awk '$1 == "go" { print $2 }' go.mod)
command -v go >/dev/null || die "there is no go command in PATH or /usr/local/go/bin: install Go $wanted or later (https://go.dev/dl/)"
# With a tool chain too old, and not allowed or able to fetch another, this fails and says so.
version=$(go env GOVERSION) || die "this needs Go $wanted or later"
say "$version, host kernel $(uname -r), $(nproc) processors"
