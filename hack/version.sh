#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Prints the version of this checkout: $VERSION, or what git tells, or "unknown".

set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
echo "${VERSION:-$(git describe --tags --always --dirty --match 'v[0-9]*' 2>/dev/null || echo unknown)}"
