#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Builds a static crun from the source package of the Debian release this runs on. The machine's own
# package sources are read to find the mirror and are not changed.
#
# Environment:
#   OUT          where crun goes          (build/guest)
#   CRUN_BUILD   package and object tree  (build/cache/crun)
#   JOBS         parallel jobs            (number of processors)

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../../.." && pwd)
# shellcheck source=hack/setup/guest-apt.sh
. "$repo/hack/setup/guest-apt.sh"

OUT=${OUT:-$repo/build/guest}
CRUN_BUILD=${CRUN_BUILD:-$repo/build/cache/crun}
JOBS=${JOBS:-$(nproc)}

# Libraries that are linked in, as Debian packages.
# Libgcrypt is for the cache of compiled seccomp filters: it hashes the profile.
libraries=(libc6-dev libcap-dev libgcrypt20-dev libgpg-error-dev libseccomp-dev libyajl-dev)

export LC_ALL=C TZ=UTC SOURCE_DATE_EPOCH=0

say() { printf 'guest crun: %s\n' "$*"; }
die() { printf 'guest crun: error: %s\n' "$*" >&2; exit 1; }

# quietly LOG COMMAND...: shows the end of the log when the command fails.
quietly() {
	local log=$1
	shift
	"$@" >"$log" 2>&1 || die "$1 failed:"$'\n'"$(tail -n 15 "$log")"
}

check_tools() {
	local tool package missing=()
	for tool in apt-get dpkg-source dpkg-query gcc make pkg-config python3 strip readelf; do
		command -v "$tool" >/dev/null || missing+=("$tool")
	done
	[[ ${#missing[@]} -eq 0 ]] || die "missing tools: ${missing[*]} (Debian: build-essential dpkg-dev pkg-config python3)"
	for package in "${libraries[@]}"; do
		dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
			[[ -e $repo/build/host/unpacked/$package ]] || missing+=("$package")
	done
	[[ ${#missing[@]} -eq 0 ]] || die "missing packages: ${missing[*]}"
}

# input_hash: of all that shapes crun. Of this script that is what fetches, compiles and checks.
input_hash() {
	{
		declare -f download compile verify
		cat "$repo/hack/setup/guest-apt.sh"
		cat /etc/debian_version
		dpkg-query -W "${libraries[@]}" gcc 2>/dev/null || true
	} | sha256sum | cut -d' ' -f1
}

# download DIR: leaves the unpacked source package in DIR/src. Backports are left out: the release's own
# crun is what was tested.
download() {
	local dir=$1 release
	release=$(debian_release) || die "this machine does not run Debian"
	quietly "$dir/apt-update.log" private_apt_init "$dir/apt" deb-src "$release" "$release-updates" "$release-security"
	(cd "$dir" && quietly "$dir/apt-source.log" \
		private_apt "$dir/apt" apt-get source --download-only --only-source crun)
	rm -rf "$dir/src"
	quietly "$dir/unpack.log" dpkg-source --extract "$dir"/crun_*.dsc "$dir/src"
}

# compile DIR: leaves the stripped binary in DIR/crun.stripped.
compile() {
	local dir=$1 src=$1/src libdir
	libdir=$(gcc -print-file-name=libyajl_s.a)
	cd "$src"
	# Debian calls the static library libyajl_s.a where configure looks for -lyajl.
	mkdir -p static
	if [[ -f $libdir ]]; then
		ln -sf "$libdir" static/libyajl.a
	fi
	# The release tarball lacks the header that a git checkout generates.
	printf '#ifndef GIT_VERSION\n# define GIT_VERSION "%s"\n#endif\n' \
		"debian-$(dpkg-parsechangelog -S Version)" >.tarball-git-version.h

	quietly "$dir/configure.log" ./configure --disable-shared --enable-static \
		--disable-systemd --disable-criu --disable-dl \
		CFLAGS="-O2 -g0 -ffunction-sections -fdata-sections -ffile-prefix-map=$src=." \
		LDFLAGS="-L$src/static" LIBS="-lgcrypt -lgpg-error"
	quietly "$dir/make-headers.log" make git-version.h .version
	quietly "$dir/make-libocispec.log" make -C libocispec -j"$JOBS"
	quietly "$dir/make.log" nice make -j"$JOBS" crun \
		LDFLAGS="-L$src/static -all-static -Wl,--gc-sections -Wl,--build-id=none"
	strip -o "$dir/crun.stripped" crun
}

# verify FILE: it runs, is static, and has what pods rely on.
verify() {
	local version feature
	! readelf -l "$1" | grep -q INTERP || die "$1 is not static"
	version=$("$1" --version) || die "$1 does not run"
	for feature in SECCOMP CAP APPARMOR EBPF; do
		[[ $version == *+$feature* ]] || die "crun was built without $feature: ${version##*$'\n'}"
	done
}

up_to_date() { [[ -x $OUT/crun && -f $OUT/.crun.stamp && $(<"$OUT/.crun.stamp") == "$1" ]]; }

build() {
	local hash stamp=$OUT/.crun.stamp dir start
	if ! up_to_date "$(input_hash)"; then
		check_tools
		mkdir -p "$OUT" "$CRUN_BUILD"
		exec 9>"$CRUN_BUILD/.lock"
		flock 9
	fi
	# Whoever held the lock may have built it.
	hash=$(input_hash)
	if up_to_date "$hash"; then
		say "up to date ($OUT/crun, $(<"$OUT/crun.version"))"
		return
	fi
	start=$SECONDS
	dir=$CRUN_BUILD/work
	rm -rf "$dir"
	mkdir -p "$dir"
	say "fetching the source package"
	download "$dir"
	say "compiling $(basename "$dir"/crun_*.dsc .dsc) (logs in $dir)"
	(compile "$dir")
	verify "$dir/crun.stripped"

	rm -f "$stamp"
	install -m 0755 "$dir/crun.stripped" "$OUT/.crun.new"
	mv -f "$OUT/.crun.new" "$OUT/crun"
	basename "$dir"/crun_*.dsc .dsc | tr _ ' ' >"$OUT/crun.version"
	echo "$hash" >"$stamp"
	say "built $(<"$OUT/crun.version") in $((SECONDS - start)) s: $OUT/crun, $(stat -c %s "$OUT/crun") bytes"
}

build
