// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import "os"

// counts are how many of something the tests take, and how many bytes. What they
// assert is the same for all of them.
type counts struct {
	// churnPods come and go at once, churnRounds times (TestChurn).
	churnPods, churnRounds int
	// clones of one snapshot are compared, clonesAtOnce at a time (TestClones).
	clones, clonesAtOnce int
	// crowd pods come at once to a pool of one VM, half of which have no time
	// (TestPoolFaults).
	crowd int
	// outputBytes and inputBytes go through a container's streams: much more than what
	// a reader that stalls may leave in memory.
	outputBytes, inputBytes int64
	// bulk is what goes over TCP each way between two ends, and bulk6 the same over
	// IPv6, which differs too little to take as long again in software emulation;
	// smaller goes where it is only to be seen that they reach each other.
	bulk, bulk6, smaller int64
	// files lie in one volume, and operations are done at random with one of them.
	files, operations int
	// loadPods run at once, with so many commands, containers that write so many bytes,
	// and connections of a port-forward (TestLoad).
	loadPods, loadExecs, loadWriters, loadConnections int
	loadBytes                                         int64
}

// count are those of the column that E2E_COUNTS names: "small" for machines that are slower by
// a factor, "load" for a node's whole load in TestLoad.
var count = columns()[os.Getenv("E2E_COUNTS")]

func columns() map[string]counts {
	usual := counts{
		churnPods: 20, churnRounds: 3,
		clones: 64, clonesAtOnce: 4,
		crowd:       24,
		outputBytes: 200 << 20, inputBytes: 50 << 20,
		bulk: 100 << 20, bulk6: 16 << 20, smaller: 4 << 20,
		files: 100_000, operations: 1000,
		loadPods: 12, loadExecs: 100, loadWriters: 6, loadBytes: 4 << 20, loadConnections: 1000,
	}
	small := counts{
		churnPods: 6, churnRounds: 2,
		clones: 12, clonesAtOnce: 2,
		crowd:       8,
		outputBytes: 24 << 20, inputBytes: 8 << 20,
		bulk: 8 << 20, bulk6: 4 << 20, smaller: 1 << 20,
		files: 20_000, operations: 200,
		loadPods: 4, loadExecs: 20, loadWriters: 2, loadBytes: 1 << 20, loadConnections: 100,
	}
	whole := usual
	whole.loadPods, whole.loadExecs, whole.loadWriters, whole.loadBytes, whole.loadConnections = 100, 500, 50, 8<<20, 10_000
	return map[string]counts{"": usual, "small": small, "load": whole}
}
