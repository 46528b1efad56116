// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func TestReadMemory(t *testing.T) {
	m, err := readMemory(strings.NewReader(`55d0-7ffe ---p 00000000 00:00 0     [rollup]
Rss:                9212 kB
Pss:                4100 kB
Pss_Dirty:          3000 kB
Shared_Clean:       5000 kB
Private_Clean:        12 kB
Private_Dirty:      4000 kB
`))
	require.NoError(t, err)
	require.Equal(t, memory{private: 4012 << 10, pss: 4100 << 10}, m)
	_, err = readMemory(strings.NewReader("Pss: 1 kB\n"))
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	own, err := processMemory(os.Getpid())
	require.NoError(t, err)
	require.Greater(t, own.private, float64(1<<20))
	free, err := memAvailable()
	require.NoError(t, err)
	require.Greater(t, free, own.private)
}

func TestReadProcessorTime(t *testing.T) {
	got, err := readProcessorTime("7 (a (b) c) S 1 7 7 0 -1 4194560 100 200 0 0 150 50 0 0 20 0 1 0 100 1 2 3")
	require.NoError(t, err)
	require.Equal(t, 2*time.Second, got)
	_, err = readProcessorTime("7 (a) S 1")
	require.Error(t, err)
	_, err = processorTime(os.Getpid())
	require.NoError(t, err)
}

func TestChildren(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	require.NoError(t, cmd.Start())
	defer func() {
		require.NoError(t, cmd.Process.Kill())
		_ = cmd.Wait()
	}()
	pids, err := children(os.Getpid())
	require.NoError(t, err)
	require.Contains(t, pids, cmd.Process.Pid)
	lines, err := commandLines()
	require.NoError(t, err)
	require.Equal(t, []string{"sleep", "60"}, lines[cmd.Process.Pid])
}

func TestTheShimOfNoPod(t *testing.T) {
	_, err := runcShim("no such pod")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}

func TestReplaceArg(t *testing.T) {
	args := []string{"-object", "memory-backend-file,id=ram,share=off,mem-path=/a/memory", "-blockdev", "driver=raw,node-name=scratch,file.filename=/b.img"}
	old, err := replaceArg(args, "memory-backend-file", "mem-path", "/c/memory")
	require.NoError(t, err)
	require.Equal(t, "/a/memory", old)
	require.Equal(t, "memory-backend-file,id=ram,share=off,mem-path=/c/memory", args[1])
	_, err = replaceArg(args, "node-name=root", "file.filename", "/d")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}
