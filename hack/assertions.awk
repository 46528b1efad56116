# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# The assertions that failed, from the output of "go test -v": testify's, from where they are to whose they
# are, and what the runtime says of a panic or a time limit. Of a long one it shows the beginning.

function show(line) {
	if (++lines <= 60) print line
}

/^[ \t]*[^ \t]+_test\.go:[0-9]+: *$/ { place = $0; next }
/^[ \t]*Error Trace:/ { inside = 1; lines = 0; show(place) }
inside { show($0) }
/^[ \t]*Test:[ \t]/ { inside = 0 }
/^(panic:|fatal error:|WARNING: DATA RACE)/ { print }
/^[ \t]*--- FAIL: / { print }
