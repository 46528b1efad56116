#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# The end-to-end tests in the emulated node, where KVM is real. They are compiled here and run there. At
# its end it tells what was skipped, by name and with the reason, and what took long.
#
#   test-kvm.sh [--or-skip]   with --or-skip it is no failure that this machine lacks what the node takes
#
# Environment, besides that of run.sh:
#   VMM      "qemu", "cloudhypervisor" or both, separated by a space; if empty, QEMU, and Cloud Hypervisor
#            where $CLOUD_HYPERVISOR names a binary or cloud-hypervisor is in PATH
#   SUITE    "e2e", "faults" (a sample of the fault matrix, and the misfortunes of e2e/faults), "driver" (the
#            hypervisor's driver with real VMs), or several; all if it is empty, unless RUN or SUBSET tells
#            which of e2e
#   RUN      tests to run, a regular expression as go test has it
#   SUBSET   "ci": those of ci.list

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
# shellcheck source=hack/lib.sh
source "$repo/hack/lib.sh"
cd "$repo"
# shellcheck source=hack/node/lib.sh
source "$here/lib.sh"

# names LIST: the tests that a list names, as a regular expression.
names() { awk '!/^#/ && NF { printf "%s%s", sep, $1; sep = "|" } END { print "" }' "$here/$1"; }

# skipped TEXT: what this machine lacks.
skipped() {
	[[ $or_skip ]] || die "the end-to-end tests on KVM cannot run: $1"
	warn "end-to-end tests on KVM SKIPPED: $1"
	exit 0
}

# compile_init: the image that the drivers' tests boot.
compile_init() {
	mkdir -p "$programs"/init/{dev,proc,sys,tmp}
	CGO_ENABLED=0 go build -ldflags '-s -w' -o "$programs/init/init" ./vmpool/vmm/vmmtest/realvm/init
	rm -f "$programs/init.erofs"
	mkfs.erofs "$programs/init.erofs" "$programs/init" >/dev/null 2>&1 || die "mkfs.erofs cannot make $programs/init.erofs"
}

# compile: the tests, and the programs of their images.
compile() {
	local start=$SECONDS
	mkdir -p "$programs"
	go test -c -o "$programs/e2e.test" ./e2e
	go test -c -o "$programs/faults.test" ./e2e/faults
	go test -c -o "$programs/driver-qemu.test" ./vmpool/qemu
	go test -c -o "$programs/driver-cloudhypervisor.test" ./vmpool/cloudhypervisor
	compile_images
	compile_init
	say "the tests compiled in $((SECONDS - start)) s"
}

# out_of_time LOG STATUS: of a subset, what there was no time for is named; it is a failure only if a test
# has failed, or if none has passed.
out_of_time() {
	local name
	if [[ $2 != 124 ]] || grep -q '^ *--- FAIL: ' "$1" || ! grep -q '^--- PASS: ' "$1"; then
		return "$2"
	fi
	while read -r name; do
		grep -q "^--- [A-Z]*: $name " "$1" || warn "end-to-end tests on KVM: $name SKIPPED: there was no time left (NODE_TIMEOUT=$NODE_TIMEOUT)"
	done < <(names ci.list | tr '|' '\n')
}

# wanted SUITE RUN: the names of the tests that a regular expression chooses, but for those that are too slow.
wanted() { "$programs/$1.test" -test.list "$2" | grep '^Test' | grep -vxE "$(names slow.list)|-" || true; }

# regexp NAME...: of exactly these tests.
regexp() {
	local IFS='|'
	echo "^($*)\$"
}

# suites VMM: those to run.
suites() {
	names_of_suites | sed "s/^driver\$/driver-$1/"
}

# names_of_suites: one a line.
names_of_suites() {
	if [[ ${SUITE:-} ]]; then
		tr -s ' ' '\n' <<<"$SUITE"
	elif [[ ${SUBSET:-} || ${RUN:-.} != . ]]; then
		echo e2e
	else
		printf '%s\n' e2e faults driver
	fi
}

# Where a suite's tests lie, and which of them are run.
declare -A directory=([e2e]=e2e [faults]=e2e/faults [driver-qemu]=vmpool/qemu [driver-cloudhypervisor]=vmpool/cloudhypervisor)
declare -A chosen=([e2e]=. [faults]='^(TestFaults|TestMisfortunes)$' [driver-qemu]=. [driver-cloudhypervisor]=.)

# run_tests SUITE VMM NAME ROUND SECONDS RUN: in a node of its own. What it prints is in the log of the round
# too, and in the one of all rounds; what a failed run keeps of containerd's log comes out.
run_tests() {
	local suite=$1 vmm=$2 name=$3 round=$4 limit=$5 run=$6 status=0
	local out=$programs/$name/$round
	local -a flags=(-test.v -test.count=1)
	flags+=(-test.run "$run" -test.skip "^($(names slow.list))\$")
	# Before the node's own limit, to tell what hangs; the subset's is one that it may reach.
	[[ ${SUBSET:-} == ci ]] || flags+=(-test.timeout "$((limit > 120 ? limit - 60 : limit))s")
	if [[ $round == 1 ]]; then
		rm -rf "${programs:?}/$name" "$programs/$name.log"
	fi
	mkdir -p "$out"
	E2E_VMM=$vmm E2E_ACCELERATOR=kvm E2E_REQUIRE=1 E2E_KEEP=1 E2E_PROGRAMS=$programs \
		NODE_VERBOSE=1 NODE_OUT=$out NODE_TIMEOUT=$limit REALVM_IMAGE=$programs/init.erofs \
		NODE_ENV="${NODE_ENV:-} CHAOS_SEED REALVM_IMAGE" "$here/run.sh" "
			cd '$repo/${directory[$suite]}'
			'$programs/$suite.test' $(printf ' %q' "${flags[@]}")
			status=\$?
			for node in /var/tmp/chv/*/; do
				cp \"\$node/containerd.log\" \"\$OUT/\$(basename \"\$node\").log\" 2>/dev/null
			done
			exit \$status" 2>&1 |
		tee "$out.log" || status=$?
	cat "$out.log" >>"$programs/$name.log"
	return "$status"
}

# summary NAME: of what its runs printed.
summary() { awk -v vmm="$1" -f "$here/summary.awk" "$programs/$1.log"; }

# subset SUITE VMM: what ci.list names, once more if the run failed and there is time.
subset() {
	local vmm=$2 status=0 again=0 round=1 rest run=${RUN:-.}
	local start=$SECONDS
	[[ $run != . ]] || run="^($(names ci.list))\$"
	run_tests "$1" "$vmm" "$vmm" 1 "$NODE_TIMEOUT" "$run" || status=$?
	rest=$((NODE_TIMEOUT - SECONDS + start))
	if [[ $status != 0 && $status != 124 ]] && ((rest >= 60)); then
		warn "end-to-end tests on KVM: a run failed (see above, and the README of hack/node); once more, in the time that is left"
		round=2
		run_tests "$1" "$vmm" "$vmm" 2 "$rest" "$run" || again=$?
		# One that had no time to fail again is no better than the first.
		[[ $again == 124 ]] || status=$again
	fi
	[[ $status == 0 ]] || say "$vmm: exit status $status"
	summary "$vmm"
	out_of_time "$programs/$vmm/$round.log" "$status"
}

# fate LOG TEST: what a run has shown of a test: "passed" (or was skipped), "tried" (it failed, or ran when the
# run ended), or nothing.
fate() {
	if grep -qE "^--- (PASS|SKIP): $2 " "$1"; then
		echo passed
	elif grep -q "^--- FAIL: $2 " "$1"; then
		echo tried
	elif grep -qx "=== RUN   $2" "$1"; then
		# One that waits for its turn beside others has not begun.
		grep -qx "=== PAUSE $2" "$1" && ! grep -qx "=== CONT  $2" "$1" || echo tried
	fi
}

# whole SUITE VMM: every test has to pass, in its first or second try. What a node that ended in the middle has
# left is gone on with in another one; the test that ran then has had a try. What is left after all tests of a
# run is a failure that no other run mends.
whole() {
	local suite=$1 vmm=$2 name=$2 status test run=${RUN:-.} subtest='' round=0 idle=0 progress
	local -a left=() rest=() failed=()
	local -A tries=()
	[[ $suite == e2e ]] || name=$vmm-${suite%%-*}
	[[ $run != . ]] || run=${chosen[$suite]}
	[[ $run != */* ]] || subtest=/${run#*/}
	mapfile -t left < <(wanted "$suite" "${run%%/*}")
	if ((${#left[@]} == 0)); then
		warn "end-to-end tests on KVM: no test of $suite matches RUN=$run"
		return 1
	fi
	while ((${#left[@]} > 0 && round < 8 && idle < 2)); do
		((++round == 1)) || warn "end-to-end tests on KVM: $name, run $round (see above, and the README of hack/node): ${left[*]}"
		status=0
		run_tests "$suite" "$vmm" "$name" "$round" "$NODE_TIMEOUT" "$(regexp "${left[@]}")$subtest" || status=$?
		rest=() progress=''
		for test in "${left[@]}"; do
			case $(fate "$programs/$name/$round.log" "$test") in
			passed) progress=1 ;;
			tried)
				progress=1
				if ((++tries[$test] > 1)); then failed+=("$test"); else rest+=("$test"); fi
				;;
			*) rest+=("$test") ;;
			esac
		done
		if grep -q '^FAIL: \|^goleak: ' "$programs/$name/$round.log"; then
			failed+=("what run $round left")
		elif [[ $status != 0 ]] && ((${#rest[@]} == 0 && ${#failed[@]} == 0)); then
			failed+=("run $round itself, with status $status")
		fi
		[[ $progress ]] || ((++idle))
		left=("${rest[@]}")
	done
	summary "$name"
	sed -n 's/^\([A-Z][^ ]*\) *\(.*\)/    not run, too slow here: \1 (\2)/p' "$here/slow.list"
	say "$name: runs: $round"
	((${#failed[@]} == 0)) || say "$name: FAILED: ${failed[*]}"
	((${#left[@]} == 0)) || say "$name: NOT RUN: ${left[*]}"
	((${#failed[@]} == 0 && ${#left[@]} == 0))
}

# tests SUITE VMM: runs them on one hypervisor, and tells of them.
tests() {
	step "End-to-end tests in the emulated node ($1), vmm = $2"
	if [[ ${SUBSET:-} == ci ]]; then subset "$@"; else whole "$@"; fi
}

# main [--or-skip]: read as a whole before it begins, as the file may change while the tests run.
main() {
	case ${1:-} in
	--or-skip) or_skip=1 ;;
	'') ;;
	*) die "usage: test-kvm.sh [--or-skip]" ;;
	esac
	case ${SUBSET:-} in
	'' | ci) ;;
	*) die "SUBSET=$SUBSET: there is only ci" ;;
	esac
	if [[ ${SUBSET:-} == ci ]]; then
		# What is not of a VM shows itself without this node.
		export NODE_TIMEOUT=${NODE_TIMEOUT:-480} E2E_HANDLERS=${E2E_HANDLERS:-cloudhv}
	fi
	export NODE_TIMEOUT=${NODE_TIMEOUT:-7200}
	# Of the fault matrix a second try has the same cells.
	export CHAOS_SEED=${CHAOS_SEED:-$RANDOM}
	local vmm suite status=0
	"$here/setup.sh" || status=$?
	case $status in
	0) ;;
	3) skipped "no emulated node can be made here (see above)" ;;
	*) exit "$status" ;;
	esac
	locate_cloud_hypervisor
	compile
	while read -r vmm; do
		for suite in $(suites "$vmm"); do
			[[ ${directory[$suite]:-} ]] || die "SUITE=$SUITE: there are e2e, faults and driver"
			tests "$suite" "$vmm" </dev/null || status=1
		done
	done < <(hypervisors)
	exit "$status"
}

or_skip=''
main "$@"
