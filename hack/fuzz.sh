#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Runs the fuzz tests of the module, one after the other, and goes on after one that has found something. That
# lies then in the package's testdata/fuzz, to be kept with the mend.
#
#   fuzz.sh each TIME   each for TIME, as 10s, 5m or 2h
#   fuzz.sh all TIME    all together in TIME, besides what compiling takes

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"
cd "$repo"

# milliseconds TIME
milliseconds() {
	local number=${1%[smh]}
	[[ $number =~ ^[0-9]+$ ]] || die "a time is $1: want a whole number with s, m or h behind it, as 10s"
	case $1 in
	*h) echo $((number * 3600000)) ;;
	*m) echo $((number * 60000)) ;;
	*) echo $((number * 1000)) ;;
	esac
}

mapfile -t tests < <(grep -roE --include='*_test.go' --exclude-dir=build '^func Fuzz[A-Za-z0-9_]*' . | sed 's,^\./,,; s/func //' | sort)
time=$(milliseconds "${2:-10s}")
case ${1:-each} in
each) ;;
all) time=$((time / ${#tests[@]})) ;;
*) die "usage: fuzz.sh each|all TIME" ;;
esac

log=$(mktemp)
trap 'rm -f "$log"' EXIT

# fuzz NAME DIRECTORY: whether it has found nothing. What the end of its time interrupts, Go takes for a
# failure now and then: "context deadline exceeded". A finding is told with where its input lies.
fuzz() {
	go test -run '^$' -fuzz "^$1\$" -fuzztime "${time}ms" -fuzzminimizetime 5s "./$2" 2>&1 | tee "$log" && return
	grep -q '^ *context deadline exceeded$' "$log" && ! grep -qE 'Failing input|panic:|^ +[a-z_]+\.go:' "$log"
}

found=()
for test in "${tests[@]}"; do
	file=${test%%:*} name=${test##*:}
	step "$name in $(dirname "$file"), $time ms"
	fuzz "$name" "$(dirname "$file")" || found+=("$name in $(dirname "$file")")
done
[[ ${#found[@]} -eq 0 ]] || die "found something: ${found[*]}"
