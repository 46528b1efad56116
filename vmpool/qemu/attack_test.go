// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/confine/attack"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// testUID and the one after it are the users of VMMs in these tests.
const testUID = 1879048192 + 4242

// takeOver starts a VMM whose program is this test's, as the driver starts QEMU, with
// everything of a restored VM: what the driver started is at the mercy of its guest.
func takeOver(t *testing.T, uid uint32, group string) *attack.VM {
	t.Helper()
	host := attack.NewHost(t, "qemu")
	cfg := host.Config(t, uid, group)
	own := data{Size: cfg.Size, Max: cfg.Max, ConsoleLimit: cfg.ConsoleLimit, Accelerator: vmm.AccelTCG}
	vm, err := newVM(cfg.ID, cfg.Dir, group, uid, own)
	require.NoError(t, err)
	require.NoError(t, vm.MakeCgroup(t.Context()))
	v := &attack.VM{VM: vm, Config: cfg, Socket: monitorSocket}
	seal, err := vm.spawn(t.Context(), vmm.Host{Binary: host.Program, Accelerator: vmm.AccelTCG}, cfg, &vmm.Snapshot{Dir: host.Template})
	require.NoError(t, err)
	v.End(t)
	v.Try(t, &attack.Targets{}) // it listens now, as QEMU does when its monitor answers
	seal()
	return v
}

// TestTakenOver has a VMM do what it must not be able to. An unconfined one does the
// same, and can: so the attempts are ones.
func TestTakenOver(t *testing.T) {
	neighbour := takeOver(t, testUID+1, "")
	t.Run("confined", func(t *testing.T) {
		v := takeOver(t, testUID, "")
		attack.Refused(t, v.Try(t, v.Lure(t, neighbour)), attacks...)
	})
	t.Run("not confined", func(t *testing.T) {
		v := takeOver(t, 0, "")
		attack.Done(t, v.Try(t, v.Lure(t, neighbour)), attacks...)
	})
}

func TestTakenOverMultiplies(t *testing.T) {
	attack.Multiplies(t, maxThreads, func(group string) *attack.VM { return takeOver(t, testUID, group) })
}

func TestTakenOverTakesMemory(t *testing.T) {
	attack.TakesMemory(t, overheadOf(vmm.AccelTCG), maxThreads, func(group string) *attack.VM { return takeOver(t, testUID, group) })
}
