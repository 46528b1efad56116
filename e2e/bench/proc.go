// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// memory is what a process holds, in bytes.
type memory struct {
	// private is the process's alone; pss counts of what is shared the process's share.
	private, pss float64
}

func processMemory(pid int) (memory, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return memory{}, err
	}
	defer f.Close()
	return readMemory(f)
}

// readMemory reads smaps_rollup.
func readMemory(r io.Reader) (memory, error) {
	kb, err := fields(r, "Private_Clean:", "Private_Dirty:", "Pss:")
	if err != nil {
		return memory{}, err
	}
	return memory{private: kb[0] + kb[1], pss: kb[2]}, nil
}

// memAvailable is the host's.
func memAvailable() (float64, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	v, err := fields(f, "MemAvailable:")
	if err != nil {
		return 0, err
	}
	return v[0], nil
}

// fields are the values, in bytes, of lines such as "Pss: 12 kB".
func fields(r io.Reader, names ...string) ([]float64, error) {
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	values, found := make([]float64, len(names)), 0
	for line := range strings.Lines(string(data)) {
		words := strings.Fields(line)
		if len(words) != 3 {
			continue
		}
		i := slices.Index(names, words[0])
		if i < 0 {
			continue
		}
		kb, err := strconv.ParseFloat(words[1], 64)
		if err != nil {
			return nil, err
		}
		values[i], found = kb*1024, found+1
	}
	if found != len(names) {
		return nil, fmt.Errorf("%d of %v are there: %w", found, names, errdefs.ErrNotFound)
	}
	return values, nil
}

// clockTick is USER_HZ's, 100 on every architecture we run on.
const clockTick = time.Second / 100

// processorTime is what a process has used, all its threads together.
func processorTime(pid int) (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return readProcessorTime(string(data))
}

func readProcessorTime(stat string) (time.Duration, error) {
	words := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(words) < 13 {
		return 0, fmt.Errorf("stat of a process: %q: %w", stat, errdefs.ErrUnknown)
	}
	user, err1 := strconv.ParseInt(words[11], 10, 64)
	system, err2 := strconv.ParseInt(words[12], 10, 64)
	return time.Duration(user+system) * clockTick, errors.Join(err1, err2)
}

// children are the processes that a process has started and those given to it.
func children(pid int) ([]int, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, f := range stats {
		data, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		words := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
		if len(words) > 1 && words[1] == strconv.Itoa(pid) {
			child, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
			if err != nil {
				return nil, err
			}
			pids = append(pids, child)
		}
	}
	return pids, nil
}

// commandLines are those of all processes, by pid.
func commandLines() (map[int][]string, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	lines := map[int][]string{}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil || len(data) == 0 {
			continue // it has ended, or is the kernel's
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if err != nil {
			return nil, err
		}
		lines[pid] = strings.Split(strings.TrimSuffix(string(data), "\x00"), "\x00")
	}
	return lines, nil
}

// runcShim finds the shim of a runc pod by its command line.
func runcShim(id string) (int, error) {
	lines, err := commandLines()
	if err != nil {
		return 0, err
	}
	for pid, args := range lines {
		if filepath.Base(args[0]) == "containerd-shim-runc-v2" && slices.Contains(args, id) {
			return pid, nil
		}
	}
	return 0, fmt.Errorf("the shim of pod %s: %w", id, errdefs.ErrNotFound)
}
