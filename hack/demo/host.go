// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// commandLimit bounds each helper command.
const commandLimit = 30 * time.Second

// hostKernel is the host's `uname -r`.
func hostKernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err.Error()
	}
	return unix.ByteSliceToString(u.Release[:])
}

// firstLine is the first line of what a command prints.
func firstLine(ctx context.Context, name string, args ...string) string {
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return fmt.Sprintf("%s: %v", name, err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimSpace(line)
}

// fileLine is the first line of a file, or a dash.
func fileLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "-"
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimSpace(line)
}

// process is what one of the host's costs, in bytes.
type process struct {
	name         string
	pss, private uint64
}

// measure reads what a process has of memory: its proportional share of all, and
// what nobody else has.
func measure(pid int) (process, error) {
	p := process{name: fileLine(fmt.Sprintf("/proc/%d/comm", pid))}
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return p, err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		words := strings.Fields(s.Text())
		if len(words) != 3 || words[2] != "kB" {
			continue
		}
		kb, err := strconv.ParseUint(words[1], 10, 64)
		if err != nil {
			return p, fmt.Errorf("%s: %w", f.Name(), err)
		}
		switch words[0] {
		case "Pss:":
			p.pss = kb << 10
		case "Private_Clean:", "Private_Dirty:":
			p.private += kb << 10
		}
	}
	return p, s.Err()
}

func mib(n uint64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
