#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Builds the guest kernel from Debian's linux-source package.
#
#   build.sh                      build it, unless the one at hand is from the same inputs
#   build.sh --check-config ARCH  only resolve the fragments for ARCH (x86_64, arm64) and verify them, unless
#                                 that has been done from the same inputs. This needs no compiler for ARCH.
#                                 Exit status 3: a tool or the source is missing
#
# Environment:
#   LINUX_SOURCE   source tarball          (/usr/src/linux-source-6.12.tar.xz)
#   OUT            where the kernel goes   (build/guest)
#   KERNEL_BUILD   source and object tree  (build/cache/kernel)
#   JOBS           parallel jobs           (number of processors)

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)

LINUX_SOURCE=${LINUX_SOURCE:-/usr/src/linux-source-6.12.tar.xz}
OUT=${OUT:-$repo/build/guest}
KERNEL_BUILD=${KERNEL_BUILD:-$repo/build/cache/kernel}
JOBS=${JOBS:-$(nproc)}

# The same inputs give the same kernel, whoever builds it and when.
export KBUILD_BUILD_TIMESTAMP='1970-01-01 00:00:00 +0000'
export KBUILD_BUILD_USER=cloudhv KBUILD_BUILD_HOST=cloudhv KBUILD_BUILD_VERSION=1
export LC_ALL=C TZ=UTC

say() { printf 'guest kernel: %s\n' "$*"; }
die() { printf 'guest kernel: error: %s\n' "$*" >&2; exit 1; }

host_arch() {
	case $(uname -m) in
	x86_64) echo x86_64 ;;
	aarch64 | arm64) echo arm64 ;;
	*) die "no configuration for $(uname -m)" ;;
	esac
}

# fragments ARCH: the files that make up the configuration, in a fixed order.
fragments() {
	local f name
	[[ -f $here/config/$1.config ]] || die "no configuration for architecture $1"
	for f in "$here"/config/*.config; do
		name=$(basename "$f" .config)
		case $name in
		x86_64 | arm64) [[ $name == "$1" ]] || continue ;;
		esac
		echo "$f"
	done
}

# configure_tools are what resolving a configuration takes, build_tools what compiling does beyond.
configure_tools=(make gcc ld flex bison xz patch)
build_tools=(bc perl readelf strip)

# missing_tools TOOL...: prints which are not there.
missing_tools() {
	local tool
	for tool in "$@"; do
		command -v "$tool" >/dev/null || echo "$tool"
	done
}

check_tools() {
	local -a missing
	mapfile -t missing < <(missing_tools "${configure_tools[@]}" "${build_tools[@]}")
	[[ ${#missing[@]} -eq 0 ]] || die "missing tools: ${missing[*]} (Debian: build-essential flex bison bc xz-utils patch)"
	gcc -E -include libelf.h -x c /dev/null >/dev/null 2>&1 || die "missing libelf headers (Debian: libelf-dev)"
}

# source_id: identifies the tarball without reading 150 MB of it.
source_id() {
	[[ -r $LINUX_SOURCE ]] || die "no kernel source at $LINUX_SOURCE (Debian: linux-source-6.12, from bookworm-backports on Debian 12; or set LINUX_SOURCE)"
	stat -L -c '%s-%Y' "$LINUX_SOURCE"
}

# patches: our changes to the source, in a fixed order.
patches() { find "$here/patches" -name '*.patch' | sort; }

# patches_id: identifies them.
patches_id() { patches | xargs -r cat | sha256sum | cut -c1-8; }

# unused are two thirds of the source: no fragment asks for any of it, and what Kconfig reads stays.
unused=(
	'*/drivers/gpu/drm/*/*.[ch]' '*/drivers/media/*/*.[ch]' '*/drivers/staging/*/*.[ch]' '*/drivers/infiniband/hw/*.[ch]'
	'*/drivers/net/ethernet/*.[ch]' '*/drivers/net/wireless/*.[ch]' '*/sound/*/*.[ch]'
	'*/tools/testing/*' '*/tools/perf/*' '*.rst' '*.dts' '*.dtsi' '*/Documentation/*.yaml'
)

# unpack: prints the source tree, which it extracts and patches once.
unpack() {
	local dir tmp patch
	dir=$KERNEL_BUILD/src-$(source_id)-$(patches_id)
	if [[ ! -d $dir ]]; then
		say "unpacking $LINUX_SOURCE" >&2
		mkdir -p "$KERNEL_BUILD"
		tmp=$(mktemp -d "$KERNEL_BUILD/unpack.XXXXXX")
		if ! XZ_OPT=-T0 tar -C "$tmp" --strip-components=1 "${unused[@]/#/--exclude=}" -xf "$LINUX_SOURCE"; then
			rm -rf "$tmp"
			die "cannot unpack $LINUX_SOURCE"
		fi
		while read -r patch; do
			if ! patch -s -p1 -d "$tmp" <"$patch" >&2; then
				rm -rf "$tmp"
				die "$patch does not fit $LINUX_SOURCE"
			fi
		done < <(patches)
		find "$KERNEL_BUILD" -mindepth 1 -maxdepth 1 -name 'src-*' -exec rm -rf {} +
		mv -T "$tmp" "$dir"
	fi
	echo "$dir"
}

# configure SRC OBJ ARCH: everything off but what the fragments ask for and what that needs.
configure() {
	local src=$1 obj=$2 arch=$3 all
	local -a list
	mapfile -t list < <(fragments "$arch")
	mkdir -p "$obj"
	all=$obj/fragments.config
	cat "${list[@]}" >"$all"
	make -s -C "$src" O="$obj" ARCH="$arch" KCONFIG_ALLCONFIG="$all" allnoconfig >"$obj/configure.log" 2>&1 ||
		die "allnoconfig failed: $(tail -n 3 "$obj/configure.log")"
	make -s -C "$src" O="$obj" ARCH="$arch" olddefconfig >>"$obj/configure.log" 2>&1 ||
		die "olddefconfig failed: $(tail -n 3 "$obj/configure.log")"
	verify_config "$obj/.config" "$arch" "${list[@]}"
}

# verify_config CONFIG ARCH FRAGMENT...: Kconfig drops in silence what lacks a dependency. Find that out now.
verify_config() {
	local config=$1 arch=$2 wrong
	shift 2
	wrong=$(awk '
		FNR == 1 { file++ }
		file == 1 && /^CONFIG_[A-Za-z0-9_]+=/ { i = index($0, "="); have[substr($0, 1, i - 1)] = substr($0, i + 1) }
		file > 1 && /^CONFIG_[A-Za-z0-9_]+=/ {
			i = index($0, "="); k = substr($0, 1, i - 1); want = substr($0, i + 1)
			got = (k in have) ? have[k] : "n"
			n = split(FILENAME, part, "/")
			if (got != want) printf "  %s: %s=%s, got %s\n", part[n], k, want, got
		}' "$config" "$@")
	[[ -z $wrong ]] || die "options that did not take effect for $arch:"$'\n'"$wrong"
	say "configuration for $arch: all requested options are in effect"
}

# has_pvh_note FILE: both hypervisors boot vmlinux by the entry point in this ELF note.
has_pvh_note() { readelf -n "$1" 2>/dev/null | grep -Eq 'Xen .*0x00000012'; }

# input_hash ARCH: of all that shapes the kernel. Of this script that is what compiles.
input_hash() {
	local -a list
	mapfile -t list < <(fragments "$1")
	{
		cat "${list[@]}"
		declare -f configure verify_config compile
		env | grep ^KBUILD_BUILD_ | sort
		source_id
		patches_id
		gcc --version
		ld --version
	} | sha256sum | cut -d' ' -f1
}

# install_as SRC NAME: replaces at once, so that nobody ever sees half a kernel.
install_as() {
	install -m 0644 "$1" "$OUT/.$2.new"
	mv -f "$OUT/.$2.new" "$OUT/$2"
}

up_to_date() { [[ -f $OUT/vmlinux && -f $OUT/.kernel.stamp && $(<"$OUT/.kernel.stamp") == "$1" ]]; }

# compile SRC OBJ ARCH: prints the file that the hypervisors boot.
compile() {
	local src=$1 obj=$2 arch=$3 image=vmlinux
	[[ $arch == x86_64 ]] || image=Image
	nice make -s -C "$src" O="$obj" ARCH="$arch" -j"$JOBS" "$image" >"$obj/build.log" 2>&1 ||
		die "compilation failed:"$'\n'"$(grep -E 'error|Error' "$obj/build.log" | head -n 20)"
	if [[ $arch != x86_64 ]]; then
		echo "$obj/arch/$arch/boot/Image"
		return
	fi
	strip -o "$obj/vmlinux.stripped" "$obj/vmlinux" || die "strip failed"
	has_pvh_note "$obj/vmlinux.stripped" || die "vmlinux lacks the PVH entry note"
	echo "$obj/vmlinux.stripped"
}

# lock: one process at a time works below KERNEL_BUILD.
lock() {
	mkdir -p "$KERNEL_BUILD"
	exec 9>"$KERNEL_BUILD/.lock"
	flock 9
}

build() {
	local arch src obj hash stamp=$OUT/.kernel.stamp start image
	arch=$(host_arch)
	if ! up_to_date "$(input_hash "$arch")"; then
		check_tools
		mkdir -p "$OUT"
		lock
	fi
	# Whoever held the lock may have built it, or the fragments may have changed meanwhile.
	hash=$(input_hash "$arch")
	if up_to_date "$hash"; then
		say "up to date ($OUT/vmlinux, $(<"$OUT/kernel.version"))"
		return
	fi
	start=$SECONDS
	src=$(unpack)
	obj=$KERNEL_BUILD/obj-$arch
	configure "$src" "$obj" "$arch"

	say "compiling with $JOBS jobs (about five minutes of processor time; log in $obj/build.log)"
	image=$(compile "$src" "$obj" "$arch")

	rm -f "$stamp"
	install_as "$image" vmlinux
	install_as "$obj/.config" kernel.config
	install_as "$obj/include/config/kernel.release" kernel.version
	echo "$hash" >"$stamp"
	say "built $(<"$OUT/kernel.version") in $((SECONDS - start)) s: $OUT/vmlinux, $(stat -c %s "$OUT/vmlinux") bytes"
}

# check_config ARCH: what has been found right once is not looked at again.
check_config() {
	local -a missing
	local src stamp=$KERNEL_BUILD/check-$1/.stamp
	[[ -f $here/config/$1.config ]] || die "no configuration for architecture $1"
	mapfile -t missing < <(missing_tools "${configure_tools[@]}")
	if [[ ${#missing[@]} -gt 0 ]]; then
		say "configuration for $1: NOT CHECKED, missing tools: ${missing[*]}"
		exit 3
	elif [[ ! -r $LINUX_SOURCE ]]; then
		say "configuration for $1: NOT CHECKED, no kernel source at $LINUX_SOURCE"
		exit 3
	fi
	lock
	if [[ $1 == "$(host_arch)" ]] && up_to_date "$(input_hash "$1")"; then
		say "configuration for $1: all requested options are in effect in the kernel that was built"
		return
	elif [[ -f $stamp && $(<"$stamp") == "$(input_hash "$1")" ]]; then
		say "configuration for $1: all requested options were in effect, and nothing has changed since"
		return
	fi
	src=$(unpack)
	rm -rf "$KERNEL_BUILD/check-$1"
	configure "$src" "$KERNEL_BUILD/check-$1" "$1"
	input_hash "$1" >"$stamp"
}

case ${1:-} in
'') build ;;
--check-config) check_config "${2:?--check-config needs an architecture}" ;;
-h | --help) sed -n '5,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
*) die "unknown argument $1 (see --help)" ;;
esac
