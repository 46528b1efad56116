# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# Prints a Makefile's targets with their "##" comments, under "##@" headings.

BEGIN {
	FS = ":.*## "
	print "containerd-cloudhv: pods that are virtual machines\n\n    make demo     see it\n    make test     prove it"
}
/^##@/ { printf "\n%s\n", substr($0, 5) }
/^[a-z0-9-]+:.*## / { printf "  %-14s %s\n", $1, $2 }
