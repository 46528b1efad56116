#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# All that can be said about the code without running it. Reports everything before it fails.

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"
cd "$repo"

failed=()
skipped=()

# check WHAT COMMAND...: exit status 3 means that the machine lacks what the check takes.
check() {
	local what=$1 start=$SECONDS status=0
	shift
	"$@" || status=$?
	case $status in
	0) say "$(printf '%-34s ok  %3d s' "$what" $((SECONDS - start)))" ;;
	3) skipped+=("$what") ;;
	*) failed+=("$what") ;;
	esac
}

# sources PATTERN...: our own files, tracked or not, but not what is built.
sources() {
	local -a names=(-false)
	local pattern
	for pattern in "$@"; do
		names+=(-o -name "$pattern")
	done
	find . \( -path ./build -o -path ./.git \) -prune -o -type f \( "${names[@]}" \) -print
}

shell_scripts() {
	sources '*.sh'
	printf '%s\n' ./hack/as-root ./.ci/run
}

headers() {
	local file bad=0
	while read -r file; do
		if ! head -n 4 "$file" | grep -q 'SPDX-License-Identifier: Apache-2.0' &&
			! head -n 1 "$file" | grep -q 'Code generated'; then
			say "$file has no SPDX line"
			bad=1
		fi
	done < <(sources '*.go' '*.proto' '*.awk' && shell_scripts)
	return $bad
}

file_lengths() {
	local file lines bad=0
	while read -r file; do
		lines=$(wc -l <"$file")
		if ((lines > 500)) && ! grep -q '^// Code generated' "$file"; then
			say "$file has $lines lines: split it (500)"
			bad=1
		fi
	done < <(sources '*.go')
	return $bad
}

shell_syntax() {
	local file bad=0
	while read -r file; do
		bash -n "$file" || bad=1
	done < <(shell_scripts)
	return $bad
}

shell_style() {
	command -v shellcheck >/dev/null || { say "shellcheck: NOT RUN, as it is not here"; return 3; }
	shell_scripts | xargs shellcheck -x -P "$repo"
}

# kernel_config ARCH: the source is what set-up has put there, or the machine's own.
kernel_config() {
	LINUX_SOURCE=${LINUX_SOURCE:-$repo/build/cache/linux-source-6.12.tar.xz} guest/kernel/build.sh --check-config "$1" |
		sed "s/^guest kernel: /    /"
}

formatted() {
	local files
	files=$(sources '*.go' | xargs gofmt -l)
	[[ -z $files ]] || { say "not formatted: ${files//$'\n'/ }"; return 1; }
}

# linters: it waits for another one of its kind. Its own status 3 is no "skipped".
linters() { golangci-lint run --allow-serial-runners ./... || return 1; }

step "Lint"
check "license headers" headers
check "file lengths" file_lengths
check "shell scripts" shell_syntax
check "shellcheck" shell_style
check "generated code" hack/generate.sh --check
check "guest kernel for x86_64" kernel_config x86_64
check "guest kernel for arm64" kernel_config arm64
check "gofmt" formatted
check "go vet" go vet ./...
check "go vet with failpoints" go vet -tags=failpoints ./vmpool/failpoint/...
check "golangci-lint" linters
for what in "${skipped[@]}"; do
	warn "lint: $what SKIPPED: this machine lacks what it takes (see above)"
done
[[ ${#failed[@]} -eq 0 ]] || die "lint: ${failed[*]} (make fix mends some of it)"
