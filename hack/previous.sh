#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Builds the commit before this one into build/previous, for the test of an upgrade: our binaries and the
# guest's image. The guest's kernel and crun are this checkout's, which take too long to build twice.
#
# Environment:
#   UPGRADE_FROM   the revision to build (HEAD^; of a checkout with changes HEAD)

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"
cd "$repo"

previous=$repo/build/previous

# from: the revision, or nothing where git knows none.
from() {
	if [[ ${UPGRADE_FROM:-} ]]; then
		git rev-parse --verify "$UPGRADE_FROM^{commit}" || die "UPGRADE_FROM=$UPGRADE_FROM: git has no such revision"
	elif [[ -n $(git status --porcelain --untracked-files=no 2>/dev/null) ]]; then
		git rev-parse --verify HEAD
	else
		git rev-parse --verify 'HEAD^' 2>/dev/null || true
	fi
}

# main: read as a whole before it begins.
main() {
	local revision
	revision=$(from)
	step "The build before this one, for the test of an upgrade${revision:+ (${revision:0:12})}"
	if [[ -z $revision ]]; then
		warn "git knows no commit before this one: there is no test of an upgrade"
		rm -rf "$previous"
		return
	fi
	if stamp_matches "$previous/stamp" "$revision"; then
		say "up to date"
		return
	fi
	rm -rf "$previous"
	mkdir -p "$previous/src/build/cache" "$previous/guest"
	git archive "$revision" | tar -x -C "$previous/src"
	# Go must not take it for a part of this module, which build/ is not.
	ln -s "$repo/build/host" "$previous/src/build/host"
	ln "$repo/build/guest/vmlinux" "$previous/guest/vmlinux"
	ln "$repo/build/guest/crun" "$previous/guest/crun"
	(
		cd "$previous/src"
		export VERSION=0.0.0-previous.${revision:0:12}
		hack/build.sh
		OUT=$previous/guest hack/setup/guest.sh image
	) 2>&1 | indent
	ln -s src/build/bin "$previous/bin"
	ln -f "$repo/build/bin/crictl" "$previous/src/build/bin/crictl"
	echo "$revision" >"$previous/stamp"
}

main
