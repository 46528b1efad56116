# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# To be sourced, after lib.sh: packages that cannot be installed beside what is here, unpacked into
# HOST_DIR, and made usable there. Needs no root and changes nothing outside of the directory.
#
#   HOST_DIR/root      the packages' files
#   HOST_DIR/bin       their commands, to come first in PATH
#   HOST_DIR/env       what compilers and commands need to know to find the rest; make has every shell
#                      read it (BASH_ENV), and each wrapper in HOST_DIR/bin does
#   HOST_DIR/unpacked  an empty file for each package

# unpack PACKAGE: it, and what it needs that is not there.
unpack() {
	local package=$1 root=$HOST_DIR/root debs=$HOST_DIR/debs plan file
	local -a wanted
	plan=$(closure "$package") || die "apt finds no way to install $package, not even on an empty machine"
	mapfile -t wanted < <(absent <<<"$plan")
	[[ ${#wanted[@]} -gt 0 ]] || return 0
	say "$package cannot be installed beside what is here: unpacking ${wanted[*]} into $HOST_DIR"
	mkdir -p "$root" "$debs" "$HOST_DIR/bin" "$HOST_DIR/unpacked"
	for file in "${wanted[@]}"; do
		rm -f "$debs/${file%%:*}"_*.deb
	done
	(cd "$debs" && apt-get -q -o APT::Sandbox::User="$(id -un)" download "${wanted[@]}" 2>&1 | indent) ||
		die "cannot download ${wanted[*]}"
	for file in "${wanted[@]}"; do
		dpkg-deb -x "$debs/${file%%:*}"_*.deb "$root"
	done
	relocate "$root"
	host_env "$root" >"$HOST_DIR/env"
	for file in "${wanted[@]}"; do
		link_commands "$file" "$root" "$debs/${file%%:*}"_*.deb
	done
	default_commands "$root"
	# Where test nodes look for the CNI plugins.
	ln -sfn root/usr "$HOST_DIR/usr"
	(cd "$HOST_DIR/unpacked" && touch "${wanted[@]%%:*}")
}

# closure PACKAGE: it and all that it depends on, as if nothing were installed. What is installed may be
# just what makes a plan for this machine impossible.
closure() {
	local plan
	plan=$(apt-get -s --no-install-recommends -o Dir::State::status=/dev/null install "$1" 2>/dev/null) || return
	awk '$1 == "Inst" { print $2 }' <<<"$plan"
}

# absent: of the packages that come in, those neither unpacked nor installed here, in whatever version: so
# libc is never unpacked, of which two do not mix.
absent() {
	local name
	while read -r name; do
		[[ -e $HOST_DIR/unpacked/${name%%:*} ]] || installed "$name" || echo "$name"
	done
}

# relocate ROOT: files that name other files by absolute path get to name those below ROOT.
relocate() {
	local root=$1 lib file target
	lib=$root/usr/lib/$(uname -m)-linux-gnu
	for file in "$lib"/pkgconfig/*.pc "$root"/usr/lib/pkgconfig/*.pc "$root"/usr/share/pkgconfig/*.pc; do
		[[ ! -f $file || -L $file ]] || sed -i -E "s,(=|-I|-L)/usr(/|\$),\1$root/usr\2,g" "$file"
	done
	# libc.so and libm.a are scripts for the linker. What they name of the C library itself is the machine's.
	for file in "$lib"/*.so "$lib"/*.a; do
		if [[ -f $file && ! -L $file ]] && head -c 64 "$file" | grep -qa 'GNU ld script'; then
			sed -i -E "s,(^| )(/usr/lib/[^ ]*\.a),\1$root\2,g" "$file"
		fi
		# The library itself is installed, and only the link for the linker was unpacked.
		if [[ -L $file && ! -e $file ]]; then
			target=$(basename "$(readlink "$file")")
			target=$(compgen -G "/lib/$(uname -m)-linux-gnu/$target" || compgen -G "/usr/lib/$(uname -m)-linux-gnu/${target%%.so*}.so.*" | head -n 1 || true)
			[[ -z $target ]] || ln -sfn "$target" "$file"
		fi
	done
}

# host_env ROOT: prints what has to be in the environment, for what is there.
host_env() {
	local root=$1 triplet lib dirs
	triplet=$(uname -m)-linux-gnu
	lib=$root/usr/lib/$triplet
	echo "# Written by set-up: where unpacked packages lie."
	prepend C_INCLUDE_PATH "$root/usr/include" "$root/usr/include/$triplet"
	prepend LIBRARY_PATH "$lib" "$root/lib/$triplet" "$root/usr/lib"
	# There are only libraries that the machine does not have in any version.
	prepend LD_LIBRARY_PATH "$lib" "$root/lib/$triplet"
	prepend PKG_CONFIG_PATH "$lib/pkgconfig" "$root/usr/share/pkgconfig"
	mapfile -t dirs < <(compgen -G "$root/usr/share/perl5" || true; compgen -G "$root/usr/share/perl/*" || true; compgen -G "$lib/perl/*" || true)
	prepend PERL5LIB "${dirs[@]}"
	single BISON_PKGDATADIR "$root/usr/share/bison"
	single M4 "$root/usr/bin/m4"
	single XTABLES_LIBDIR "$lib/xtables"
}

# prepend NAME DIRECTORY...: a line that puts those that are there before what NAME says already.
prepend() {
	local name=$1 dir list=
	shift
	for dir in "$@"; do
		[[ ! -d $dir ]] || list+=${list:+:}$dir
	done
	# shellcheck disable=SC2016 # The file's shell expands it, once: a wrapper may call another.
	[[ -z $list ]] || printf 'case ":${%s:-}:" in *":%s:"*) ;; *) export %s="%s${%s:+:$%s}" ;; esac\n' \
		"$name" "$list" "$name" "$list" "$name" "$name"
}

# single NAME PATH: a line that sets NAME, if PATH is there.
single() { [[ ! -e $2 ]] || printf 'export %s="%s"\n' "$1" "$2"; }

# link_commands PACKAGE ROOT DEB: by a wrapper, so that what came along is found.
link_commands() {
	local path name
	while read -r path; do
		name=$(basename "$path")
		cat >"$HOST_DIR/bin/.$name.new" <<-EOF
			#!/bin/sh
			# $1, unpacked as it could not be installed.
			. "$HOST_DIR/env"
			exec "$2/$path" "\$@"
		EOF
		chmod 0755 "$HOST_DIR/bin/.$name.new"
		if static_program "$2/$path"; then
			ln -sf "$2/$path" "$HOST_DIR/bin/.$name.new"
		fi
		mv -f "$HOST_DIR/bin/.$name.new" "$HOST_DIR/bin/$name"
	done < <(dpkg-deb --fsys-tarfile "$3" | tar -t | sed -n 's,^\./,,; /^\(usr\/\)\{0,1\}s\{0,1\}bin\/[^/]*[^/]$/p')
}

# static_program FILE: whether FILE needs no library. ELF's interpreter is a path in its first page.
static_program() { [[ $(head -c 4 "$1" 2>/dev/null | tail -c 3) == ELF ]] && ! head -c 4096 "$1" | grep -qa '/ld-linux'; }

# default_commands ROOT: names that a package's installation script would make, by update-alternatives.
default_commands() {
	local pair
	for pair in iptables=iptables-nft ip6tables=ip6tables-nft; do
		if [[ -e $HOST_DIR/bin/${pair#*=} ]]; then
			ln -sf "${pair#*=}" "$HOST_DIR/bin/${pair%=*}"
		fi
	done
}
