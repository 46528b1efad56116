# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Of what `go test -v` printed, in one run or several: how many tests passed, which did so only when they were
# tried again, which were skipped and why, which failed, and the ten that took longest. A test's last result counts.

/^cloudhv: |^hypervisor: / { on = $0; sub(/^[a-z]*: /, "", on) }
# A test's own lines: the last one says why it is skipped.
/^=== (RUN|CONT|NAME) / { running = $3 }
/^ +[a-z0-9_]+\.go:[0-9]+: / { said[running] = $0; sub(/^ +[a-z0-9_]+\.go:[0-9]+: /, "", said[running]) }
/^ *--- (PASS|FAIL|SKIP): / {
	took = $4
	gsub(/[()s]/, "", took)
	if (!($3 in result)) order[++names] = $3
	if ($2 == "PASS:" && result[$3] == "FAIL:") again[$3] = 1
	result[$3] = $2
	if ($3 !~ /\//) { time[$3] = took + 0 }
}

END {
	for (i = 1; i <= names; i++) {
		name = order[i]
		count[result[name]]++
		if (name in again) list = list "    passed in another try " name "\n"
		if (result[name] == "SKIP:") list = list "    skipped " name ": " said[name] "\n"
		if (result[name] == "FAIL:") list = list "    FAILED " name "\n"
	}
	printf "    %s: %d passed, %d failed, %d skipped, on %s\n", vmm, count["PASS:"], count["FAIL:"], count["SKIP:"], on ? on : "nothing"
	printf "%s", list
	for (i = 0; i < 10; i++) {
		longest = ""
		for (name in time) if (longest == "" || time[name] > time[longest]) longest = name
		if (longest == "" || time[longest] < 10) break
		printf "    %6.0f s %s\n", time[longest], longest
		delete time[longest]
	}
}
