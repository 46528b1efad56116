# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Of what `go test -v` printed: how many tests passed, which were skipped and why, which failed, and the
# ten that took longest.

/^cloudhv: |^hypervisor: / { on = $0; sub(/^[a-z]*: /, "", on) }
# A test's own lines: the last one before it is skipped says why.
/^ +[a-z0-9_]+_test\.go:[0-9]+: / { reason = $0; sub(/^ +[a-z0-9_]+_test\.go:[0-9]+: /, "", reason) }
/^ *--- (PASS|FAIL|SKIP): / {
	took = $4
	gsub(/[()s]/, "", took)
	count[$2]++
	if ($2 == "SKIP:") skipped[++skips] = $3 ": " reason
	if ($2 == "FAIL:") failed[++fails] = $3
	if ($3 !~ /\//) { time[$3] = took + 0 }
}

END {
	printf "    %s: %d passed, %d failed, %d skipped, on %s\n", vmm, count["PASS:"], count["FAIL:"], count["SKIP:"], on ? on : "nothing"
	for (i = 1; i <= skips; i++) print "    skipped " skipped[i]
	for (i = 1; i <= fails; i++) print "    FAILED " failed[i]
	for (i = 0; i < 10; i++) {
		longest = ""
		for (name in time) if (longest == "" || time[name] > time[longest]) longest = name
		if (longest == "" || time[longest] < 10) break
		printf "    %6.0f s %s\n", time[longest], longest
		delete time[longest]
	}
}
