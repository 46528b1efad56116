// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmm

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestValidateTellsAllAtOnce(t *testing.T) {
	t.Parallel()
	err := Config{Dir: "rel", Kernel: "/nonexistent", Size: Size{VCPUs: 99, MemoryBytes: 1}, Max: Size{VCPUs: 1}}.Validate()
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	for _, want := range []string{
		"ID is empty", `Dir "rel"`, "Kernel: stat /nonexistent", `RootFS ""`, "ConsoleLimit 0",
		"Size.VCPUs 99", "Size.MemoryBytes 1", "Max.MemoryBytes 0", "is less than Size",
	} {
		assert.Contains(t, err.Error(), want)
	}
}

func TestRoundMemory(t *testing.T) {
	t.Parallel()
	for in, want := range map[int64]int64{-1: MinMemory, 0: MinMemory, MinMemory + 1: MinMemory + MemoryUnit, 256 << 20: 256 << 20} {
		assert.Equal(t, want, RoundMemory(in))
	}
}

func TestCheckResize(t *testing.T) {
	t.Parallel()
	boot, limit := Size{VCPUs: 2, MemoryBytes: 128 << 20}, Size{VCPUs: 4, MemoryBytes: 1 << 30}
	for size, ok := range map[Size]bool{
		{VCPUs: 1, MemoryBytes: 128 << 20}:   true,
		{VCPUs: 4, MemoryBytes: 1 << 30}:     true,
		{VCPUs: 0, MemoryBytes: 1 << 30}:     false,
		{VCPUs: 5, MemoryBytes: 1 << 30}:     false,
		{VCPUs: 1, MemoryBytes: 64 << 20}:    false,
		{VCPUs: 1, MemoryBytes: 2 << 30}:     false,
		{VCPUs: 1, MemoryBytes: 129<<20 + 1}: false,
	} {
		err := CheckResize(size, boot, limit)
		if ok {
			assert.NoError(t, err, "%+v", size)
		} else {
			assert.ErrorIs(t, err, errdefs.ErrInvalidArgument, "%+v", size)
		}
	}
}

func TestLogIsBounded(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "log")
	const limit = 1000
	for round := range 3 { // each opens it anew
		l, err := OpenLog(path, limit)
		require.NoError(t, err)
		for i := range 50 {
			_, err := fmt.Fprintf(l, "round %d line %d %s\n", round, i, strings.Repeat("x", i*7))
			require.NoError(t, err)
			var total int64
			for _, p := range []string{path, path + ".1"} {
				if info, err := os.Stat(p); err == nil {
					total += info.Size()
				}
			}
			require.LessOrEqual(t, total, int64(limit))
		}
		require.NoError(t, l.Close())
		require.NoError(t, l.Close())
		_, err = l.Write([]byte("x"))
		require.Error(t, err)
		assert.True(t, bytes.HasSuffix(Tail(path, 4), []byte("xxx\n")))
	}
	assert.Empty(t, Tail(path+".none", 10))
}

func TestCgroup(t *testing.T) {
	t.Parallel()
	g := OpenCgroup(fmt.Sprintf("/chv-vmm-test-%d", os.Getpid()))
	if err := g.Make(); err != nil {
		t.Skipf("cannot make cgroups: %v", err)
	}
	require.NoError(t, g.Make(), "a second time")
	cmd := exec.Command("sleep", "infinity")
	require.NoError(t, cmd.Start())
	defer cmd.Wait()         //nolint:errcheck // killed
	defer cmd.Process.Kill() //nolint:errcheck
	require.NoError(t, g.Add(cmd.Process.Pid))
	expired, cancel := context.WithCancel(context.Background())
	cancel()
	require.Error(t, g.Remove(expired), "it is in use")
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	require.NoError(t, g.Remove(context.Background()))
	require.NoError(t, g.Remove(context.Background()), "a second time")
}

func TestASnapshotsNetworkDeviceWantsATAP(t *testing.T) {
	t.Parallel()
	tap, err := os.Open(os.DevNull)
	require.NoError(t, err)
	defer tap.Close()
	for _, built := range []bool{true, false} {
		s := Snapshot{BuiltInNIC: built}
		require.Equal(t, built, s.CheckTAP(tap) == nil)
		require.Equal(t, !built, s.CheckTAP(nil) == nil)
	}
	require.ErrorIs(t, Snapshot{BuiltInNIC: true}.CheckTAP(nil), errdefs.ErrInvalidArgument)
}
