// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestHostMemoryLow takes the host's memory away, and gives it back.
func TestHostMemoryLow(t *testing.T) {
	requireCloudHV(t)
	available := availableMemory(t)
	if available < 2<<30 {
		t.Skipf("the host has %d MiB available", available>>20)
	}
	reserve := available / 8 * 7 >> 20
	f := newFaultNode(t, nil, map[string]any{"min": 1, "max": 1, "reserve_memory": fmt.Sprint(reserve, "MiB")})
	f.image()
	f.awaitRest(1)
	assert.Zero(t, f.metric("pool_memory_short"))

	hog, err := unix.Mmap(-1, 0, int(available/4), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	require.NoError(t, err)
	give := sync.OnceFunc(func() { assert.NoError(t, unix.Munmap(hog)) })
	defer give()
	f.await("nobody has noticed", func() bool { return f.metric("pool_memory_short") == 1 })
	f.requireLog("the host's memory is scarce; no VM is made ready")
	assert.Equal(t, "hit", f.serves(), "what is ready stays")
	assert.Equal(t, "miss", f.serves(), "and a pod without one is served")
	assert.Zero(t, f.metric("pool_depth"))
	assert.Zero(t, f.metric("pool_target"))
	give()
	f.awaitRest(1)
	f.requireLog("the host has memory for the pool again")
	assert.Equal(t, "hit", f.serves())
}

// availableMemory is what the host has available, in bytes.
func availableMemory(t *testing.T) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/meminfo")
	require.NoError(t, err)
	var kib int64
	_, err = fmt.Sscanf(field(string(text), "MemAvailable:"), "%d kB", &kib)
	require.NoError(t, err)
	return kib << 10
}
