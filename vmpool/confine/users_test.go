// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package confine

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// No two that have not been given back are the same, however many ask at once.
func TestUsersAreUnlike(t *testing.T) {
	t.Parallel()
	u := NewUsers(Range{First: 5000, Count: 120})
	var mu sync.Mutex
	owner := map[uint32]string{}
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			for j := range 50 {
				vm := fmt.Sprint(i, "-", j)
				id, err := u.Take(vm)
				if !assert.NoError(t, err) {
					return
				}
				mu.Lock()
				assert.NotContains(t, owner, id)
				owner[id] = vm
				mu.Unlock()
				if j%10 != 0 {
					mu.Lock()
					delete(owner, id)
					mu.Unlock()
					u.Release(id, vm)
				}
			}
		})
	}
	wg.Wait()
	require.Len(t, owner, 100)
	for range 20 {
		id, err := u.Take("rest")
		require.NoError(t, err)
		require.NotContains(t, owner, id)
		owner[id] = "rest"
	}
	_, err := u.Take("one more")
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	for id, vm := range owner {
		require.GreaterOrEqual(t, id, uint32(5000))
		require.Less(t, id, uint32(5120))
		u.Release(id, "another VM")
		_, err := u.Take("thief")
		require.ErrorIs(t, err, errdefs.ErrResourceExhausted, "only its VM gives a user back")
		u.Release(id, vm)
		again, err := u.Take(vm)
		require.NoError(t, err)
		require.Equal(t, id, again)
	}
}

func TestUsersOfRecords(t *testing.T) {
	t.Parallel()
	u := NewUsers(Range{First: 5000, Count: 3})
	u.Claim(5001, "old")
	u.Claim(0, "not confined")
	u.Claim(7000, "of another range")
	first, err := u.Take("a")
	require.NoError(t, err)
	second, err := u.Take("b")
	require.NoError(t, err)
	require.ElementsMatch(t, []uint32{5000, 5002}, []uint32{first, second})
	require.Equal(t, uint32(5002), first, "a number that was used comes last")
	_, err = u.Take("c")
	require.Error(t, err)

	var none *Users
	id, err := none.Take("a")
	require.NoError(t, err)
	require.Zero(t, id)
	none.Claim(1, "a")
	none.Release(1, "a")
	require.NoError(t, none.ClaimRunning())
}

func TestUsersOfRunningProcesses(t *testing.T) {
	t.Parallel()
	me := uint32(os.Getuid())
	u := NewUsers(Range{First: me, Count: 2})
	require.NoError(t, u.ClaimRunning())
	for range 2 {
		if id, err := u.Take("vm"); err == nil {
			require.NotEqual(t, me, id)
		}
	}
}

func TestCheckRange(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	d := Database{
		Passwd: write("passwd", "root:x:0:0::/:/bin/sh\nodd line\nbob:x:5010:5010::/:/bin/sh\n+::::::\n"),
		Group:  write("group", "root:x:0:\nstaff:x:6000:bob\n"),
		SubUID: write("subuid", "bob:100000:65536\n\n# comment\n"), SubGID: filepath.Join(dir, "missing"),
	}
	for r, want := range map[Range]string{
		{First: 5000, Count: 10}:     "",
		{First: 5000, Count: 11}:     "has bob with the number 5010",
		{First: 6000, Count: 1}:      "has staff with the number 6000",
		{First: 165535, Count: 1}:    "gives 100000 to 165535 to bob",
		{First: 165536, Count: 1}:    "",
		{First: 90000, Count: 10000}: "",
		{First: 90000, Count: 99999}: "to bob",
	} {
		err := d.Check(r)
		if want == "" {
			require.NoError(t, err, "%v", r)
			continue
		}
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "%v", r)
		require.ErrorContains(t, err, want)
	}
}
