// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// By how much what is looked at may grow, in bytes. containerd's heap after a
// collection varies by some hundred KiB, and what it keeps of the host's memory by
// its greatest heap so far, which the churn sets. Directories vary by what is written
// into disks of VMs that are ready, and by the pages of containerd's database.
const (
	maxHeap     = 8 << 20
	maxResident = 48 << 20
	maxState    = 1 << 20
	maxCache    = 64 << 20
	maxRoot     = 32 << 20
	// The census compares goroutines and open files one by one; these are counted a
	// moment later, with what the moment brings.
	maxMoment = 5
)

// rest is what there is when no pod runs.
type rest struct {
	when       string
	at         time.Time
	containerd testnode.Usage
	// state, cache and root are what the directories take: the plugin's two and
	// containerd's, in bytes.
	state, cache, root int64
	// done and failed are the pods so far; slowest is how long one took to run, at most.
	done, failed int
	slowest      time.Duration
}

// grown picks what there is more of out of the differences between two censuses.
func grown(diff []string) error {
	more := slices.DeleteFunc(diff, func(line string) bool { return !strings.HasPrefix(line, "+") })
	if len(more) == 0 {
		return nil
	}
	return fmt.Errorf("there is more than at the beginning:\n\t%s: %w", strings.Join(more, "\n\t"), errdefs.ErrFailedPrecondition)
}

// grown tells what there is more of than may be.
func (r rest) grown(before rest) []error {
	var errs []error
	for _, g := range []struct {
		what          string
		before, after int64
		limit         int64
	}{
		{"containerd's heap in bytes", before.containerd.Heap, r.containerd.Heap, maxHeap},
		{"containerd's memory in bytes", before.containerd.Resident, r.containerd.Resident, maxResident},
		{"containerd's goroutines", int64(before.containerd.Goroutines), int64(r.containerd.Goroutines), maxMoment},
		{"containerd's open files", int64(before.containerd.Files), int64(r.containerd.Files), maxMoment},
		{"the state directory in bytes", before.state, r.state, maxState},
		{"the cache directory in bytes", before.cache, r.cache, maxCache},
		{"containerd's root in bytes", before.root, r.root, maxRoot},
	} {
		if g.after-g.before > g.limit {
			errs = append(errs, fmt.Errorf("%s grew from %d to %d, by more than %d: %w", g.what, g.before, g.after, g.limit, errdefs.ErrOutOfRange))
		}
	}
	return errs
}

const mib = 1 << 20

// String is one line.
func (r rest) String() string {
	return fmt.Sprintf("%d pods, %d failed; containerd has %.1f MiB (heap %.1f), %d goroutines, %d files", r.done, r.failed,
		float64(r.containerd.Resident)/mib, float64(r.containerd.Heap)/mib, r.containerd.Goroutines, r.containerd.Files)
}

// table shows how it went.
func table(rests []rest) string {
	var b strings.Builder
	tw := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "after\tminutes\tpods\tfailed\tslowest start\tRSS MiB\theap MiB\tgoroutines\tfiles\tstate KiB\tcache MiB\troot MiB\t")
	for _, r := range rests {
		fmt.Fprintf(tw, "%s\t%.1f\t%d\t%d\t%v\t%.1f\t%.1f\t%d\t%d\t%d\t%.1f\t%.1f\t\n", r.when, r.at.Sub(rests[0].at).Minutes(), r.done, r.failed,
			r.slowest.Round(time.Millisecond), float64(r.containerd.Resident)/mib, float64(r.containerd.Heap)/mib,
			r.containerd.Goroutines, r.containerd.Files, r.state>>10, float64(r.cache)/mib, float64(r.root)/mib)
	}
	tw.Flush()
	return b.String()
}

// statBlock is the unit of stat's blocks, in bytes.
const statBlock = 512

// allocated is what the files below dir take on disk, in bytes, each once. What is
// removed meanwhile takes nothing.
func allocated(dir string) (int64, error) {
	var sum int64
	seen := map[uint64]bool{}
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && !seen[st.Ino] {
			seen[st.Ino] = true
			sum += st.Blocks * statBlock
		}
		return nil
	})
	return sum, err
}
