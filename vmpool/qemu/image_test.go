// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest/realvm"
)

// imageDevice is the image disk in the guest.
const imageDevice = "/dev/vdc"

// testImage is a file of random bytes, and what a guest reads of it when it reads on
// beyond its end.
func testImage(t *testing.T, serial string, size int) (_ vmm.Disk, content string) {
	t.Helper()
	data := make([]byte, size)
	random := rand.NewChaCha8(sha256.Sum256([]byte(serial)))
	_, _ = random.Read(data)
	path := filepath.Join(t.TempDir(), serial)
	require.NoError(t, os.WriteFile(path, data, 0o600))
	return vmm.Disk{Serial: serial, Path: path, ReadOnly: true}, fmt.Sprintf("%x %d input/output error", sha256.Sum256(data), size)
}

// empty is what a guest reads of an image disk without an image.
func empty(size int) string {
	return fmt.Sprintf("%x %d <nil>", sha256.Sum256(make([]byte, size)), size)
}

// whole is the content of a guest's image disk, with whatever is behind its end.
func whole(v *realvm.VM) string {
	return v.MustRun(fmt.Sprintf("read %s %d", imageDevice, 1<<30))
}

// put makes a disk the content of the image disk.
func put(t *testing.T, v *realvm.VM, disk vmm.Disk) {
	t.Helper()
	serial, err := v.AddDisk(testContext(t), disk)
	require.NoError(t, err)
	require.Equal(t, vmm.ImageSerial, serial)
}

// TestImageDisk exchanges what the image disk has, and reads it whole each time.
func TestImageDisk(t *testing.T) {
	v := suite().Boot(t)
	ctx := testContext(t)
	a, ofA := testImage(t, "a", 3<<20)
	b, ofB := testImage(t, "b", 1<<20+4096)
	require.Equal(t, empty(4<<20), v.MustRun(fmt.Sprintf("read %s %d", imageDevice, 4<<20)))
	for range 2 {
		began := time.Now()
		put(t, v, a)
		t.Logf("exchanged in %v", time.Since(began))
		require.Equal(t, ofA, whole(v))
		_, err := v.Run("put " + imageDevice + " x")
		require.Error(t, err, "the disk is read-only")
		_, err = v.AddDisk(ctx, a)
		require.ErrorIs(t, err, errdefs.ErrAlreadyExists)

		v.Add(b) // it is hot-plugged
		require.Contains(t, ofB, v.MustRun("sum "+v.AwaitDisk("b")))
		_, err = v.AddDisk(ctx, b)
		require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
		require.NoError(t, v.RemoveDisk(ctx, "a"))
		_, err = v.AddDisk(ctx, b)
		require.ErrorIs(t, err, errdefs.ErrAlreadyExists, "although the image disk is free")
		require.NoError(t, v.RemoveDisk(ctx, "b"))
		require.Equal(t, empty(4<<20), v.MustRun(fmt.Sprintf("read %s %d", imageDevice, 4<<20)))

		put(t, v, b)
		require.Equal(t, ofB, whole(v))
		require.NoError(t, v.RemoveDisk(ctx, "b"))
	}

	// What somebody in the guest has read stays while it is open, until it is dropped.
	put(t, v, a)
	v.MustRun("hold " + imageDevice)
	require.Equal(t, ofA, whole(v))
	require.NoError(t, v.RemoveDisk(ctx, "a"))
	put(t, v, b)
	v.MustRun("flush " + imageDevice)
	require.Equal(t, ofB, whole(v))
	require.NoError(t, v.RemoveDisk(ctx, "b"))

	// What does not fit is hot-plugged.
	odd, _ := testImage(t, "odd", 1<<20+512)
	v.Add(odd)
	large, _ := testImage(t, "large", 4096)
	require.NoError(t, os.Truncate(large.Path, imageCapacity+imageUnit))
	v.Add(large)
	a.ReadOnly = false
	v.Add(a)
}

// TestImageDiskOfClones has two VMs of one template, in which the disk was used.
func TestImageDiskOfClones(t *testing.T) {
	warm, ofWarm := testImage(t, "warm-up", 2<<20)
	s := suite()
	snap := s.Template(t, func(v *realvm.VM) {
		put(t, v, warm)
		require.Equal(t, ofWarm, whole(v))
		require.NoError(t, v.RemoveDisk(testContext(t), "warm-up"))
	})
	a, ofA := testImage(t, "a", 1<<20)
	b, ofB := testImage(t, "b", 4<<20)
	one, other := s.Clone(t, snap), s.Clone(t, snap)
	put(t, one, a)
	put(t, other, b)
	require.Equal(t, ofA, whole(one))
	require.Equal(t, ofB, whole(other))

	// Another process knows what is there.
	ctx := testContext(t)
	state := other.State()
	require.NoError(t, other.Close())
	again, err := New("").Attach(ctx, state)
	require.NoError(t, err)
	other.VM = again
	_, err = again.AddDisk(ctx, b)
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	other.Add(a)
	require.Equal(t, ofB, whole(other))
	require.NoError(t, again.RemoveDisk(ctx, "b"))
	require.NoError(t, again.RemoveDisk(ctx, "a"))
	put(t, other, a)
	require.Equal(t, ofA, whole(other))
}

// addImage makes an AddDisk of a disk that fits the image disk.
func (vm *machine) addImage(t *testing.T, serial string, within time.Duration) (string, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.WriteFile(path, make([]byte, imageUnit), 0o600))
	ctx, cancel := context.WithTimeout(testContext(t), within)
	defer cancel()
	return vm.AddDisk(ctx, vmm.Disk{Serial: serial, Path: path, ReadOnly: true})
}

// nodesAre makes QEMU list block nodes.
func (q *fakeQEMU) nodesAre(names ...string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	list := ""
	for _, name := range names {
		list += fmt.Sprintf(`, {"node-name": %q}`, name)
	}
	q.answers["query-named-block-nodes"] = []string{fakeReturn("[" + list[min(len(list), 2):] + "]")}
}

// An exchange that is refused leaves the image disk as it was.
func TestRefusedImage(t *testing.T) {
	t.Parallel()
	vm, q := fakeVM(t, map[string][]string{"blockdev-reopen": {fakeFails, fakeDone}})
	_, err := vm.addImage(t, "refused", limit)
	require.ErrorContains(t, err, "it is in use")
	assert.Equal(t, 1, q.count("blockdev-del"))
	assert.Zero(t, q.count("device_add"))
	serial, err := vm.addImage(t, "next", limit)
	require.NoError(t, err)
	assert.Equal(t, vmm.ImageSerial, serial)
	assert.Zero(t, q.count("query-named-block-nodes"), "nothing is in doubt")
}

// The machine that an earlier version started has no image disk.
func TestNoImageDisk(t *testing.T) {
	t.Parallel()
	vm, q := fakeVM(t, nil)
	vm.own.ImageDisk, vm.imageDoubt = false, true
	serial, err := vm.addImage(t, "plugged", limit)
	require.NoError(t, err)
	assert.Equal(t, "plugged", serial)
	assert.Equal(t, 1, q.count("device_add"))
	assert.Zero(t, q.count("blockdev-reopen"))
}

// After one that was given up QEMU is asked what the image disk has.
func TestImageInDoubt(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		nodes []string
		del   []string // what the removal of each is answered
		there string
	}{
		"nothing":      {},
		"one not used": {nodes: []string{"image", "no-image", "image-lost"}, del: []string{fakeDone}},
		"one in use":   {nodes: []string{"image", "no-image", "image-lost"}, del: []string{fakeFails}, there: "lost"},
		"both":         {nodes: []string{"image-old", "image-lost"}, del: []string{fakeDone, fakeFails}, there: "lost"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// The exchange and its undoing get no answer.
			vm, q := fakeVM(t, map[string][]string{"blockdev-reopen": {fakeSilent, fakeSilent, fakeDone}, "blockdev-del": tc.del})
			_, err := vm.addImage(t, "lost", 20*time.Millisecond)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			q.nodesAre(tc.nodes...)
			serial, err := vm.addImage(t, "lost", limit)
			if tc.there == "lost" {
				require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
				q.mu.Lock()
				q.answers["blockdev-del"] = nil
				q.mu.Unlock()
				require.NoError(t, vm.RemoveDisk(testContext(t), "lost"))
				serial, err = vm.addImage(t, "lost", limit)
			}
			require.NoError(t, err)
			assert.Equal(t, vmm.ImageSerial, serial)
			assert.False(t, vm.imageDoubt)
		})
	}
}
