#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# To be sourced: apt with package sources of its own, so that building the guest leaves the machine's as
# they are. The mirror and the release are the machine's.

# debian_release: the code name of the Debian release this machine runs.
debian_release() {
	# shellcheck source=/dev/null
	(. /etc/os-release && [[ ${ID:-} == debian ]] && echo "${VERSION_CODENAME:-}")
}

# debian_archives: "URI RELEASE" of each Debian archive this machine takes packages from.
debian_archives() {
	# shellcheck disable=SC2016 # apt expands these.
	apt-get indextargets --format '$(ORIGIN)|$(COMPONENT)|$(RELEASE)|$(REPO_URI)' 'Created-By: Packages' |
		awk -F'|' '$1 == "Debian" && $2 == "main" { print $4, $3 }' | sort -u
}

# private_apt_init DIR TYPE SUITE...: makes DIR an apt of its own, with TYPE (deb, deb-src) lines for those
# of the SUITEs that the machine knows. Backports are found on the archive that has the release itself.
private_apt_init() {
	local dir=$1 type=$2 release archives uri suite known
	local keyring=/usr/share/keyrings/debian-archive-keyring.gpg option=
	shift 2
	release=$(debian_release)
	if [[ -z $release ]]; then
		echo "this machine does not run Debian" >&2
		return 1
	fi
	archives=$(debian_archives)
	if [[ ! -f $keyring ]]; then keyring=; fi
	if [[ -n $keyring ]]; then option="[signed-by=$keyring] "; fi
	mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
	: >"$dir/sources.list"
	for suite in "$@"; do
		known=$suite
		if [[ $suite == "$release-backports" ]]; then known=$release; fi
		while read -r uri; do
			echo "$type $option$uri $suite main" >>"$dir/sources.list"
		done < <(awk -v suite="$known" '$2 == suite { print $1 }' <<<"$archives")
	done
	if [[ ! -s $dir/sources.list ]]; then
		echo "this machine's package sources have no Debian archive for: $* (run apt-get update first)" >&2
		return 1
	fi
	private_apt "$dir" apt-get update
}

# private_apt DIR COMMAND ARGUMENT...: runs an apt command with the sources of DIR.
private_apt() {
	local dir=$1 command=$2
	shift 2
	"$command" -q -o "Dir::State::Lists=$dir/lists" -o "Dir::Etc::SourceList=$dir/sources.list" \
		-o "Dir::Etc::SourceParts=/dev/null" -o "Dir::Cache=$dir/cache" -o "APT::Sandbox::User=root" "$@"
}
