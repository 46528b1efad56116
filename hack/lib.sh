# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# What the scripts of hack/ share. Source it; it sets functions, colours and where Go is found.

# Where Go's own instructions put it, also for sudo and cron, which have a PATH of their own.
command -v go >/dev/null || PATH=$PATH:/usr/local/go/bin

# Colours only for people.
if [[ -t 1 && -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then
	bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' reset=$'\e[0m'
else
	bold='' dim='' red='' reset=''
fi

# step TEXT: the beginning of something that may take a while.
step() { printf '%s==> %s%s\n' "$bold" "$*" "$reset"; }
say() { printf '    %s\n' "$*"; }
warn() { printf '    %swarning:%s %s\n' "$red" "$reset" "$*" >&2; }
die() { printf '%serror:%s %s\n' "$red" "$reset" "$*" >&2; exit 1; }

# announce COMMAND...: says what is about to be done as root.
announce() { printf '    %sas root:%s %s\n' "$bold" "$reset" "$*"; }

# as_root COMMAND...: runs it as root. Without a terminal nobody is asked for a password.
as_root() {
	if [[ $(id -u) == 0 ]]; then
		"$@"
		return
	fi
	command -v sudo >/dev/null || die "this needs root, and there is no sudo: run it as root"
	if [[ -t 0 && -t 2 ]]; then
		sudo -- "$@"
	else
		sudo -n -- "$@" || die "as root by sudo failed: $1 (without a terminal sudo must not ask for a password; or run it as root)"
	fi
}

# indent: shows a long command's output as part of ours.
indent() { sed -u "s/^/    $dim| /; s/\$/$reset/"; }

# stamp_matches FILE HASH: whether FILE says that its work was done from these inputs.
stamp_matches() { [[ -f $1 && $(<"$1") == "$2" ]]; }

# hash_files FILE...: one hash over names and contents.
hash_files() { sha256sum -- "$@" | sha256sum | cut -d' ' -f1; }
