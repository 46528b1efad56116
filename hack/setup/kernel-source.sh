#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Puts the source of the guest kernel at build/cache/linux-source-6.12.tar.xz: from the installed package
# linux-source-6.12 where there is one, else from the release or its backports, without installing it.
#
# Environment:
#   CACHE   where the tarball goes (build/cache)

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
# shellcheck source=hack/setup/guest-apt.sh
. "$here/guest-apt.sh"

CACHE=${CACHE:-$repo/build/cache}
package=linux-source-6.12
tarball=$CACHE/$package.tar.xz
installed=/usr/src/$package.tar.xz

say() { printf 'kernel source: %s\n' "$*"; }
die() { printf 'kernel source: error: %s\n' "$*" >&2; exit 1; }

fetch() {
	local dir release
	release=$(debian_release) || die "this machine does not run Debian: fetch $package yourself and set LINUX_SOURCE"
	dir=$(mktemp -d "$CACHE/$package.XXXXXX")
	# shellcheck disable=SC2064 # The directory of now.
	trap "rm -rf '$dir'" EXIT
	say "looking for $package"
	private_apt_init "$dir/apt" deb "$release" "$release-updates" "$release-security" "$release-backports" \
		>"$dir/log" 2>&1 || die "$(tail -n 5 "$dir/log")"
	say "downloading $package (150 MB)"
	(cd "$dir" && private_apt "$dir/apt" apt-get download "$package") >>"$dir/log" 2>&1 || die "$(tail -n 5 "$dir/log")"
	dpkg-deb -x "$dir/$package"_*.deb "$dir/root"
	mv -f "$dir/root/usr/src/$package.tar.xz" "$tarball"
}

mkdir -p "$CACHE"
if [[ -r $installed ]]; then
	ln -sfn "$installed" "$tarball"
	say "using $installed"
elif [[ -r $tarball ]]; then
	say "up to date ($tarball)"
else
	fetch
	say "fetched $tarball"
fi
