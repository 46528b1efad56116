// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package plugin

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// probed is a driver of which only the probing matters.
type probed struct {
	vmm.Driver
	name string
	err  error
}

func (p probed) Name() string { return p.name }

func (p probed) Probe(context.Context) (vmm.Host, error) {
	if p.err != nil {
		return vmm.Host{}, fmt.Errorf("%w: %w", p.err, errdefs.ErrFailedPrecondition)
	}
	return vmm.Host{Driver: p.name, Version: "1"}, nil
}

func TestTheHypervisorIsChosen(t *testing.T) {
	t.Parallel()
	no := errors.Join(errors.New("no binary"), errors.New("no /dev/kvm"))
	for name, tc := range map[string]struct {
		vmm       string
		ch, qemu  error
		want, why string
		wrong     []string
	}{
		"auto, all can run":      {config.VMMAuto, nil, nil, "cloudhypervisor", "vmm is auto, and cloudhypervisor can run here", nil},
		"auto, the first cannot": {config.VMMAuto, no, nil, "qemu", "vmm is auto, and cloudhypervisor cannot run here: no binary; no /dev/kvm", nil},
		"auto, none can":         {config.VMMAuto, no, errors.New("no QEMU"), "", "", []string{"no binary", "no /dev/kvm", "no QEMU", "vmm is auto"}},
		"QEMU":                   {config.VMMQEMU, nil, nil, "qemu", "vmm is qemu", nil},
		"Cloud Hypervisor":       {config.VMMCloudHypervisor, nil, nil, "cloudhypervisor", "vmm is cloudhypervisor", nil},
		"it cannot":              {config.VMMCloudHypervisor, no, nil, "", "", []string{"vmm is cloudhypervisor", "no /dev/kvm"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			all := []vmm.Driver{probed{name: "cloudhypervisor", err: tc.ch}, probed{name: "qemu", err: tc.qemu}}
			got, err := chooseDriver(t.Context(), tc.vmm, all)
			require.Len(t, got.all, 2)
			if tc.want == "" {
				require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
				require.Nil(t, got.driver)
				for _, w := range tc.wrong {
					require.ErrorContains(t, err, w)
				}
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.want, got.driver.Name())
			require.Equal(t, tc.want, got.host.Driver)
			require.Equal(t, tc.why, got.why)
		})
	}
	got, err := chooseDriver(t.Context(), "xen", []vmm.Driver{probed{name: "qemu"}})
	require.NoError(t, err, "the configuration's check says it")
	require.Nil(t, got.driver)
}

// On this host "auto" survives whatever Cloud Hypervisor's binary is.
func TestAutoSurvivesAWrongBinary(t *testing.T) {
	for _, binary := range []string{"/nonexistent/cloud-hypervisor", "/bin/false", "/bin/true", "/etc/hostname", "/tmp"} {
		all := drivers(&config.Settings{CloudHypervisorBinary: binary})
		_, err := all[0].Probe(t.Context())
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		require.ErrorContains(t, err, binary)
		got, err := chooseDriver(t.Context(), config.VMMAuto, []vmm.Driver{all[0], probed{name: config.VMMQEMU}})
		require.NoError(t, err)
		require.Equal(t, config.VMMQEMU, got.driver.Name())
		require.Contains(t, got.why, binary)
	}
}
