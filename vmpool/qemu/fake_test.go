// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmproc"
)

// fakeQEMU answers commands by their names: the n-th by the n-th answer of its
// list, what comes later by the last. Without a list it is done.
type fakeQEMU struct {
	mu      sync.Mutex
	answers map[string][]string
	seen    map[string]int
}

// Answers of a fakeQEMU.
const (
	fakeDone   = `{"return": {}, "id": %q}`
	fakeFails  = `{"error": {"class": "GenericError", "desc": "it is in use"}, "id": %q}`
	fakeSilent = ""
)

func fakeReturn(what string) string { return fmt.Sprintf(`{"return": %s, "id": %%q}`, what) }

func (q *fakeQEMU) answer(command string) string {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := q.seen[command]
	q.seen[command]++
	list := q.answers[command]
	if len(list) == 0 {
		return fakeDone
	}
	return list[min(n, len(list)-1)]
}

func (q *fakeQEMU) count(command string) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.seen[command]
}

// plugged makes QEMU list devices, in these slots.
func (q *fakeQEMU) plugged(devices map[string]int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	var names, buses []string
	for name, slot := range devices {
		names = append(names, fmt.Sprintf(`{"name": %q}`, name))
		buses = append(buses, fakeReturn(fmt.Sprintf(`"/machine/%s"`, slotName(slot))))
	}
	q.answers["qom-list"] = []string{fakeReturn("[" + strings.Join(names, ", ") + "]")}
	q.answers["qom-get"], q.seen["qom-get"] = buses, 0
}

// fakeVM is a machine that is controlled by a fakeQEMU, and has no process.
func fakeVM(t *testing.T, answers map[string][]string) (*machine, *fakeQEMU) {
	t.Helper()
	q := &fakeQEMU{answers: answers, seen: map[string]int{}}
	vm, err := newVM("fake", filepath.Dir(fakeMonitor(t, q.answer)), "", 0,
		data{ImageDisk: true, Base: 128 << 20, Size: vmm.Size{VCPUs: 1, MemoryBytes: 1 << 30}, Max: vmm.Size{VCPUs: 1, MemoryBytes: 1 << 30}})
	require.NoError(t, err)
	require.NoError(t, vm.control(testContext(t)))
	t.Cleanup(vm.mon.close)
	return vm, q
}

// A guest that keeps blocks is asked again while nothing comes back.
func TestShrinkingAsksAgain(t *testing.T) {
	t.Parallel()
	var sizes []string
	for _, mib := range []int{8, 8, 8, 4, 2, 2, 0} {
		sizes = append(sizes, fakeReturn(fmt.Sprint(mib<<20)))
	}
	vm, q := fakeVM(t, map[string][]string{"qom-get": sizes})
	small := vmm.Size{VCPUs: 1, MemoryBytes: 128 << 20}
	require.NoError(t, vm.Resize(testContext(t), small))
	assert.Equal(t, len(sizes), q.count("qom-get"))
	assert.Equal(t, 1+2+1, q.count("qom-set"))
	assert.Equal(t, small, vm.own.Size)
}

// What is known to be unplugged is not asked for.
func TestNothingToResize(t *testing.T) {
	t.Parallel()
	vm, q := fakeVM(t, map[string][]string{"qom-get": {fakeReturn("0")}})
	small, large := vmm.Size{VCPUs: 1, MemoryBytes: 128 << 20}, vmm.Size{VCPUs: 1, MemoryBytes: 256 << 20}
	for i, step := range []struct {
		to    vmm.Size
		asked int
	}{
		{small, 1}, // another process may have plugged some
		{small, 1}, {large, 2}, {large, 3}, {small, 4}, {small, 4},
	} {
		require.NoError(t, vm.Resize(testContext(t), step.to))
		assert.Equal(t, step.asked, q.count("qom-set"), "step %d", i)
		assert.Equal(t, step.to, vm.own.Size)
	}
}

// A guest that keeps memory for good costs a bounded time, and the error tells how
// much it keeps.
func TestShrinkingIsBounded(t *testing.T) {
	t.Parallel()
	vm, q := fakeVM(t, map[string][]string{"qom-get": {fakeReturn("8388608")}})
	small := vmm.Size{VCPUs: 1, MemoryBytes: 128 << 20}
	began := time.Now()
	var kept *vmm.KeptError
	require.ErrorAs(t, vm.Resize(testContext(t), small), &kept)
	assert.Equal(t, vmm.KeptError{MemoryBytes: 136 << 20, Wanted: 128 << 20}, *kept)
	assert.GreaterOrEqual(t, time.Since(began), vmproc.ShrinkLimit)
	assert.Greater(t, q.count("qom-set"), 3)

	ctx, cancel := context.WithTimeout(testContext(t), 20*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, vm.Resize(ctx, small), context.DeadlineExceeded)
	require.NoError(t, vm.Resize(testContext(t), vmm.Size{VCPUs: 1, MemoryBytes: 1 << 30}), "a growth does not wait")
}

// disk makes an AddDisk that may take only so long.
func (vm *machine) disk(t *testing.T, serial string, within time.Duration) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(testContext(t), within)
	defer cancel()
	_, err := vm.AddDisk(ctx, vmm.Disk{Serial: serial, Path: "/proc/self/exe", ReadOnly: true})
	return err
}

// A device that QEMU plugs after its call was given up has its slot, whatever
// the undoing says.
func TestLateDevice(t *testing.T) {
	t.Parallel()
	const gone = `{"event": "DEVICE_DELETED", "data": {"device": "disk-late"}}` + "\n" + fakeDone
	vm, q := fakeVM(t, map[string][]string{
		"device_add":   {fakeSilent, fakeDone},
		"blockdev-del": {fakeFails, fakeDone},
		"device_del":   {fakeDone, gone},
	})
	q.plugged(map[string]int{"disk-late": 0})
	require.ErrorIs(t, vm.disk(t, "late", 20*time.Millisecond), context.DeadlineExceeded)
	assert.Equal(t, "disk-late", vm.slots[0])
	assert.Equal(t, 1, q.count("device_del"), "the guest is asked to let it go")

	require.NoError(t, vm.disk(t, "next", limit))
	assert.Equal(t, "disk-next", vm.slots[1])
	// A retry first gets rid of the late one.
	require.NoError(t, vm.disk(t, "late", limit))
	assert.Equal(t, 2, q.count("device_del"))
	assert.Equal(t, "disk-late", vm.slots[0])
	assert.Empty(t, vm.doubt)
	require.ErrorIs(t, vm.disk(t, "late", limit), errdefs.ErrAlreadyExists)
}

// As long as QEMU does not say what is plugged, a slot in doubt is not used.
func TestSlotInDoubt(t *testing.T) {
	t.Parallel()
	vm, q := fakeVM(t, map[string][]string{"device_add": {fakeSilent, fakeDone}, "qom-list": {fakeSilent}})
	require.ErrorIs(t, vm.disk(t, "lost", 20*time.Millisecond), context.DeadlineExceeded)
	require.ErrorIs(t, vm.disk(t, "next", 20*time.Millisecond), context.DeadlineExceeded)
	assert.Equal(t, "disk-lost", vm.slots[0])
	assert.Equal(t, 1, q.count("device_add"))
	q.plugged(nil)
	require.NoError(t, vm.disk(t, "next", limit))
	assert.Equal(t, "disk-next", vm.slots[0])
	assert.Empty(t, vm.doubt)
}

// A device that was refused leaves its slot.
func TestRefusedDevice(t *testing.T) {
	t.Parallel()
	vm, q := fakeVM(t, map[string][]string{"device_add": {fakeFails, fakeDone}})
	q.plugged(nil)
	require.ErrorContains(t, vm.disk(t, "refused", limit), "it is in use")
	assert.Empty(t, vm.slots[0])
	require.NoError(t, vm.disk(t, "refused", limit))
	assert.Equal(t, "disk-refused", vm.slots[0])
}
