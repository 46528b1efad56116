// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package prebuild

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

var day = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func testUse(repo string, at time.Time) use {
	return use{Namespace: "k8s.io", Snapshotter: "overlayfs", Repository: repo, At: at}
}

func TestWhatPodsHaveRunOutlivesUs(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "prebuild")
	m, err := openMemory(dir)
	require.NoError(t, err)
	require.True(t, m.remember(testUse("r/a", day)))
	require.True(t, m.remember(testUse("r/b", day)))
	m.Pending = []image{{Namespace: "k8s.io", Name: "r/a:1"}}
	require.NoError(t, m.save())
	got, err := openMemory(dir)
	require.NoError(t, err)
	require.Equal(t, m, got)
}

func TestTheListOfUsesIsBounded(t *testing.T) {
	t.Parallel()
	m := &memory{path: filepath.Join(t.TempDir(), memoryFile)}
	long := strings.Repeat("r", maxRepository)
	for i := range maxUsed {
		require.True(t, m.remember(testUse(fmt.Sprint(i, long)[:maxRepository], day)))
	}
	require.False(t, m.remember(m.Used[0]), "known")
	first, second := m.Used[0], m.Used[1]
	first.At = first.At.Add(freshness)
	require.True(t, m.remember(first), "used again")
	require.True(t, m.remember(testUse("another", day)))
	require.Len(t, m.Used, maxUsed)
	require.Contains(t, m.Used, first)
	require.NotContains(t, m.Used, second, "the one that was not used for longest has gone")
	back := first
	back.At = back.At.Add(-time.Hour)
	require.True(t, m.remember(back), "the clock was set back")
	for i := range maxPending {
		m.Pending = append(m.Pending, image{Namespace: "k8s.io", Name: fmt.Sprint(i, strings.Repeat("n", maxName))[:maxName]})
	}
	require.NoError(t, m.save())
	got, err := openMemory(filepath.Dir(m.path))
	require.NoError(t, err)
	require.Equal(t, m, got, "all that may be remembered can be read")
}

// A use is of one namespace and one snapshotter.
func TestUsesAreToldApart(t *testing.T) {
	t.Parallel()
	m := &memory{}
	u := testUse("r/a", day)
	require.True(t, m.remember(u))
	u.Namespace = "other"
	require.True(t, m.remember(u))
	u.Snapshotter = "native"
	require.True(t, m.remember(u))
	require.False(t, m.remember(u))
	require.Len(t, m.Used, 3)
}

func TestADamagedMemoryIsNone(t *testing.T) {
	t.Parallel()
	for name, content := range map[string]string{
		"empty":         "",
		"cut off":       `{"version":1,"used":[{"names`,
		"zeros":         strings.Repeat("\x00", 5000),
		"other types":   `{"version":1,"used":"all"}`,
		"other version": `{"version":2,"used":[{"namespace":"n","repository":"r"}]}`,
		"too long":      `{"version":1}` + strings.Repeat(" ", maxMemory),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			require.NoError(t, os.WriteFile(filepath.Join(dir, memoryFile), []byte(content), 0o600))
			require.NoError(t, os.WriteFile(filepath.Join(dir, "12345"), nil, 0o600))
			m, err := openMemory(dir)
			require.ErrorIs(t, err, errdefs.ErrDataLoss)
			require.Empty(t, m.Used)
			require.NoFileExists(t, filepath.Join(dir, "12345"), "a write that ended in the middle")
			require.True(t, m.remember(testUse("r/a", day)))
			require.NoError(t, m.save(), "it is good again")
			m, err = openMemory(dir)
			require.NoError(t, err)
			require.Len(t, m.Used, 1)
		})
	}
}
