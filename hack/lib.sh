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

# step TEXT: the beginning of something that may take a while, and how long after make's own.
step() { printf '%s==> %s%s%s\n' "$bold" "$*" "$reset" "${STEPS_SINCE:+ $dim(at $(($(date +%s) - STEPS_SINCE)) s)$reset}"; }
say() { printf '    %s\n' "$*"; }
warn() { printf '    %swarning:%s %s\n' "$red" "$reset" "$*" >&2; }
die() { printf '%serror:%s %s\n' "$red" "$reset" "$*" >&2; exit 1; }

# announce COMMAND...: says what is about to be done as root.
announce() { printf '    %sas root:%s %s\n' "$bold" "$reset" "$*"; }

# kept_environment: fills the array kept with what sudo would drop and a command as root cannot do
# without: the way to the network, where certificates lie, and Go's settings.
kept_environment() {
	local name
	kept=()
	for name in $(compgen -e); do
		case $name in
		[Hh][Tt][Tt][Pp]_[Pp][Rr][Oo][Xx][Yy] | [Hh][Tt][Tt][Pp][Ss]_[Pp][Rr][Oo][Xx][Yy] | \
			[Ff][Tt][Pp]_[Pp][Rr][Oo][Xx][Yy] | [Aa][Ll][Ll]_[Pp][Rr][Oo][Xx][Yy] | [Nn][Oo]_[Pp][Rr][Oo][Xx][Yy] | \
			SSL_CERT_FILE | SSL_CERT_DIR | GO[A-Z0-9]* | CGO_*) kept+=("$name=${!name}") ;;
		esac
	done
}

# as_root COMMAND...: runs it as root. Without a terminal nobody is asked for a password.
as_root() {
	local -a kept
	if [[ $(id -u) == 0 ]]; then
		"$@"
		return
	fi
	command -v sudo >/dev/null || die "this needs root, and there is no sudo: run it as root"
	if [[ ! -t 0 || ! -t 2 ]]; then
		sudo -n true || die "sudo wants a password and there is no terminal to ask for it: run this as root"
	fi
	kept_environment
	sudo -- env "${kept[@]}" "$@"
}

# indent: shows a long command's output as part of ours.
indent() { sed -u "s/^/    $dim| /; s/\$/$reset/"; }

# stamp_matches FILE HASH: whether FILE says that its work was done from these inputs.
stamp_matches() { [[ -f $1 && $(<"$1") == "$2" ]]; }

# hash_files FILE...: one hash over names and contents.
hash_files() { sha256sum -- "$@" | sha256sum | cut -d' ' -f1; }
