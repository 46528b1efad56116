#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# The Debian packages that set-up needs (packages.list says which and what for).
#
#   packages.sh install GROUP...   install what is missing of these groups
#   packages.sh files GROUP DIR    only unpack the group's packages and their libraries into DIR
#   packages.sh remove             undo it: remove the packages that it installed
#
# Nothing is ever removed, upgraded on purpose or restarted to install something: what would
# conflict is unpacked into build/host. With nothing missing, apt is not called at all. The
# machine's package sources stay as they are: what comes from backports or as a source package
# is fetched by an apt of our own (guest-apt.sh) and not installed.
#
# Environment:
#   SKIP_SYSTEM=1   install nothing, only say what is missing
#   HOST_DIR        where packages are unpacked   (build/host)

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"
# shellcheck source=hack/setup/unpack.sh
source "$here/unpack.sh"

HOST_DIR=${HOST_DIR:-$repo/build/host}
# Outlives this checkout: another one can undo what this one did.
record_dir=/var/lib/containerd-cloudhv-setup
record=$record_dir/packages

# Root's PATH, as most of what is looked for lives in sbin.
PATH=$HOST_DIR/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin
export LC_ALL=C DEBIAN_FRONTEND=noninteractive

apt_options=(-q -y --no-remove --no-install-recommends --no-upgrade
	-o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold
	-o DPkg::Lock::Timeout=300)

# apt_get ARGUMENT...: as root, without questions, and without needrestart touching services.
apt_get() {
	as_root env LC_ALL=C DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 \
		APT_LISTCHANGES_FRONTEND=none apt-get "$@" </dev/null
}

# rows GROUP...: the lines of packages.list for these groups.
rows() {
	local groups=" $* "
	awk -v groups="$groups" '!/^#/ && NF && index(groups, " " $1 " ") { print $2, $3, $4 }' "$here/packages.list"
}

installed() { [[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null) == installed ]]; }

# present PACKAGE PROBE: whether what the package is wanted for is there.
present() {
	case $2 in
	cmd:*) command -v "${2#cmd:}" >/dev/null ;;
	file:*) [[ -e ${2#file:} || -e $HOST_DIR/root${2#file:} ]] ;;
	pkg) installed "$1" || [[ -e $HOST_DIR/unpacked/$1 ]] ;;
	*) die "packages.list: unknown probe $2 of $1" ;;
	esac
}

# missing GROUP...: prints the packages that are wanted and not there.
missing() {
	local package probe
	while read -r package probe _; do
		present "$package" "$probe" || echo "$package"
	done < <(rows "$@")
}

# supported: this knows the packages of two releases, and says so elsewhere.
supported() {
	local ID='' VERSION_ID='' PRETTY_NAME=''
	# shellcheck source=/dev/null
	[[ ! -r /etc/os-release ]] || source /etc/os-release
	case $ID-$VERSION_ID in
	debian-12 | debian-13) return 0 ;;
	esac
	die "set-up knows the packages of Debian 12 and 13, and this is ${PRETTY_NAME:-unknown}.
Install by hand what stands for: $*
and run this again with SKIP_SYSTEM=1."
}

# simulate ARGUMENT...: what apt would do, without doing it. Fails when that means a removal.
simulate() { apt-get "${apt_options[@]}" -s install "$@" 2>/dev/null; }

# candidate PACKAGE: whether the package sources of this machine offer it.
candidate() { [[ $(apt-cache policy "$1" 2>/dev/null) == *"Candidate: "[!\(]* ]]; }

update() {
	announce "apt-get update"
	apt_get -q update 2>&1 | grep -E '^(E|W|Err)' | indent || true
}

# sort_out PACKAGE...: fills the arrays to_install and to_unpack. One simulation tells that all is
# well; only where it fails is each package tried on top of those that go.
sort_out() {
	local package
	to_install=("$@") to_unpack=()
	if simulate "$@" >/dev/null; then
		return
	fi
	to_install=()
	for package in "$@"; do
		candidate "$package" || die "no package source of this machine offers $package"
		if simulate "${to_install[@]}" "$package" >/dev/null; then
			to_install+=("$package")
		elif unpackable "$package"; then
			to_unpack+=("$package")
		else
			apt-get "${apt_options[@]}" -s install "${to_install[@]}" "$package" 2>&1 | tail -n 15 | indent >&2
			die "$package cannot be installed without removing or breaking others (see above), and it is of no use unpacked"
		fi
	done
}

unpackable() { awk -v p="$1" '$2 == p && $4 == "unpack" { found = 1 } END { exit !found }' "$here/packages.list"; }

# install_with_apt PACKAGE...: writes down what is new on this machine before it is.
install_with_apt() {
	local plan new upgraded
	plan=$(simulate "$@") || die "apt changed its mind about: $*"
	new=$(awk '$1 == "Inst" && $3 !~ /^\[/ { print $2 }' <<<"$plan")
	upgraded=$(awk '$1 == "Inst" && $3 ~ /^\[/ { print $2 }' <<<"$plan" | tr '\n' ' ')
	announce "apt-get install --no-remove --no-install-recommends $*"
	say "$(wc -w <<<"$new") new packages with what they depend on; written down in $record"
	[[ -z $upgraded ]] || say "their dependencies upgrade: $upgraded"
	as_root install -d "$record_dir"
	as_root tee -a "$record" <<<"$new" >/dev/null
	apt_get "${apt_options[@]}" install "$@" 2>&1 |
		grep --line-buffered -E '^(Need to get|After this|Get:|Unpacking|Setting up|E:|W:|Err|dpkg:)' | indent ||
		die "apt-get install failed (see above, and /var/log/apt/term.log)"
}

install_groups() {
	local -a wanted
	local package probe
	mapfile -t wanted < <(missing "$@")
	if [[ ${#wanted[@]} -eq 0 ]]; then
		say "packages: all $(rows "$@" | wc -l) are here"
		return
	fi
	if [[ ${SKIP_SYSTEM:-} == 1 ]]; then
		warn "SKIP_SYSTEM=1: nothing is installed; missing: ${wanted[*]}"
		return
	fi
	supported "${wanted[@]}"
	say "missing: ${wanted[*]}"
	update
	sort_out "${wanted[@]}"
	[[ ${#to_install[@]} -eq 0 ]] || install_with_apt "${to_install[@]}"
	for package in "${to_unpack[@]}"; do
		unpack "$package"
	done
	while read -r package probe _; do
		present "$package" "$probe" || die "$package is installed and yet there is no ${probe#*:}"
	done < <(rows "$@")
}

# files GROUP DIR: unpacks a group's packages with the libraries that they need, to take files from.
# Nothing is installed, and no installation script runs. What is there already is kept.
files() {
	local group=$1 dir=$2 package probe plan stamp
	local -a packages wanted=()
	mapfile -t packages < <(rows "$group" | cut -d' ' -f1)
	stamp="$(hash_files "$here/packages.list") $(. /etc/os-release && echo "${VERSION_ID:-}")"
	if stamp_matches "$dir/.stamp" "$stamp"; then
		say "files of ${packages[*]}: up to date"
		return
	fi
	[[ ${SKIP_SYSTEM:-} != 1 ]] || die "SKIP_SYSTEM=1: ${packages[*]} are not fetched"
	supported "${packages[@]}"
	while read -r package probe _; do
		candidate "$package" || { update && break; }
	done < <(rows "$group")
	for package in "${packages[@]}"; do
		plan=$(closure "$package") || die "apt finds no way to install $package, not even on an empty machine"
		mapfile -t -O "${#wanted[@]}" wanted < <(grep -E "^(lib|zlib|$package\$)" <<<"$plan" | grep -v -e perl -e '^libfile-' -e '^libtext-' -e '^libnumber-')
	done
	mapfile -t wanted < <(printf '%s\n' "${wanted[@]}" | sort -u)
	say "unpacking ${wanted[*]} into $dir"
	rm -rf "$dir"
	mkdir -p "$dir/.debs"
	(cd "$dir/.debs" && apt-get -q -o APT::Sandbox::User="$(id -un)" download "${wanted[@]}" 2>&1 | indent) ||
		die "cannot download ${wanted[*]}"
	for package in "$dir"/.debs/*.deb; do
		dpkg-deb -x "$package" "$dir"
	done
	rm -r "$dir/.debs"
	echo "$stamp" >"$dir/.stamp"
}

# removable: of the packages written down, those that nothing else on this machine needs by now.
removable() {
	local -a ours
	mapfile -t ours < <(sort -u "$record" | while read -r p; do installed "$p" && echo "$p"; done)
	[[ ${#ours[@]} -gt 0 ]] || return 0
	as_root apt-mark auto "${ours[@]}" >/dev/null
	apt-get -s -o APT::AutoRemove::RecommendsImportant=false -o APT::AutoRemove::SuggestsImportant=false autoremove 2>/dev/null |
		awk '$1 == "Remv" { print $2 }' | grep -Fx -f <(printf '%s\n' "${ours[@]}") || true
}

# remove_packages: never takes along a package that set-up did not install.
remove_packages() {
	local -a list
	local extra
	mapfile -t list < <(removable)
	if [[ ${#list[@]} -eq 0 ]]; then
		say "none of the packages that set-up installed can go: others need them, or they are gone"
		return
	fi
	extra=$(apt-get -s --no-auto-remove purge "${list[@]}" 2>/dev/null | awk '$1 == "Purg" || $1 == "Remv" { print $2 }' |
		grep -Fxv -f <(printf '%s\n' "${list[@]}") || true)
	[[ -z $extra ]] || die "removing them would remove ${extra//$'\n'/ } too, which set-up did not install: left alone"
	announce "apt-get purge ${list[*]}"
	apt_get -q -y --no-auto-remove -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 purge "${list[@]}" 2>&1 |
		grep --line-buffered -E '^(Removing|Purging|E:|W:|dpkg:)' | indent || die "apt-get purge failed"
}

remove() {
	say "package sources: none to take away; backports were added only to apts of our own, and went with them"
	if [[ ! -e $record_dir ]]; then
		say "set-up has installed nothing on this machine"
		return
	fi
	[[ ! -e $record ]] || remove_packages
	announce "rm -r $record_dir"
	as_root rm -rf "$record_dir"
}

case ${1:-} in
install)
	shift
	step "Debian packages ($*)"
	install_groups "$@"
	;;
files)
	step "Files of Debian packages ($2)"
	files "$2" "$3"
	;;
remove)
	step "What set-up added to this machine"
	remove
	;;
*) sed -n '5,20s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
esac
