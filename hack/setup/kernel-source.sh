#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Puts the source of the guest kernel at build/cache/linux-source-6.12.tar.xz: from the installed package
# linux-source-6.12 where there is one, else from the release or its backports, without installing it.
# Backports are added as a package source for this download alone, in a directory that goes with it: the
# machine's package sources stay as they are. `make clean-system` has nothing of this to undo.
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
	local dir release archive
	release=$(debian_release) || die "this machine does not run Debian: fetch $package yourself and set LINUX_SOURCE"
	dir=$(mktemp -d "$CACHE/$package.XXXXXX")
	# shellcheck disable=SC2064 # The directory of now.
	trap "rm -rf '$dir'" EXIT
	say "$package is not installed; adding $release-backports as a package source for this download alone"
	say "in $dir/apt, not in /etc/apt: the machine's package sources stay as they are"
	private_apt_init "$dir/apt" deb "$release" "$release-updates" "$release-security" "$release-backports" \
		>"$dir/log" 2>&1 || die "$(tail -n 5 "$dir/log")"
	archive=$(private_apt "$dir/apt" apt-cache policy "$package" |
		awk '$1 == "Candidate:" { c = $2; next } hit { print $2, $3; hit = 0; c = "" } c && ($1 == c || $2 == c) { hit = 1 }')
	say "downloading $package (150 MB) from ${archive:-where it is}"
	(cd "$dir" && private_apt "$dir/apt" apt-get download "$package") >>"$dir/log" 2>&1 || die "$(tail -n 5 "$dir/log")"
	dpkg-deb -x "$dir/$package"_*.deb "$dir/root"
	mv -f "$dir/root/usr/src/$package.tar.xz" "$tarball"
	rm -rf "$dir"
	say "removed that package source again"
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
