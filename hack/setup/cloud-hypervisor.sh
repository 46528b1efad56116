#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Fetches the pinned release of Cloud Hypervisor, a static program, into build/bin, if its SHA-256 is what
# it has to be. Nothing else needs it: it is for tests of that driver, where the network allows it.
#
# Environment:
#   CLOUD_HYPERVISOR_URL      where to fetch it instead (file:// too)
#   CLOUD_HYPERVISOR_SHA256   the sum that it must have instead

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"

version=v53.0
bin=${BIN:-$repo/build/bin}
program=$bin/cloud-hypervisor

# The sums of the release's files, as several projects that fetch them have written them down. They were
# not computed from a download of our own.
case $(uname -m) in
x86_64)
	asset=cloud-hypervisor-static
	sum=448af3d4e59b22c2987f7df94c213ad40fb53a10d437e42b5ee6c4fce7c29ecc
	;;
aarch64)
	asset=cloud-hypervisor-static-aarch64
	sum=f192b510eea1c710cbc439d716bb0573c223fc463dbe3e6523788a2b7ef62850
	;;
*) die "Cloud Hypervisor $version has no release for $(uname -m)" ;;
esac
url=${CLOUD_HYPERVISOR_URL:-https://github.com/cloud-hypervisor/cloud-hypervisor/releases/download/$version/$asset}
sum=${CLOUD_HYPERVISOR_SHA256:-$sum}

# download FILE: prints why it fails.
download() {
	if command -v curl >/dev/null; then
		curl -fsSL --retry 2 --connect-timeout 20 --max-time 300 -o "$1" "$url" 2>&1
	elif command -v wget >/dev/null; then
		wget -nv -t 2 -T 20 -O "$1" "$url" 2>&1
	else
		echo "there is neither curl nor wget"
		return 1
	fi
}

# has_sum FILE: whether it is what is wanted.
has_sum() { [[ $(sha256sum "$1" | cut -d' ' -f1) == "$sum" ]]; }

step "Cloud Hypervisor $version"
if [[ -x $program ]] && has_sum "$program"; then
	say "up to date ($program)"
	exit 0
fi
mkdir -p "$bin"
scratch=$(mktemp "$bin/.cloud-hypervisor.XXXXXX")
trap 'rm -f "$scratch"' EXIT
say "downloading $url"
if ! why=$(download "$scratch"); then
	die "cannot be downloaded here: ${why:-no reason given}
Nothing but tests of that driver needs it. A binary of your own serves too: name it in CLOUD_HYPERVISOR."
fi
has_sum "$scratch" || die "what came has the SHA-256 $(sha256sum "$scratch" | cut -d' ' -f1)
and not $sum, so it is not installed. If you know better, set CLOUD_HYPERVISOR_SHA256."
chmod 0755 "$scratch"
mv "$scratch" "$program"
say "$("$program" --version 2>&1 | head -n 1), in $program"
