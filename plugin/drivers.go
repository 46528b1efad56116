// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package plugin

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/vmpool/cloudhypervisor"
	"github.com/cloudhv/containerd-cloudhv/vmpool/confine"
	"github.com/cloudhv/containerd-cloudhv/vmpool/qemu"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// drivers are the hypervisors of this build, the one that is better where it can run
// first.
func drivers(s *config.Settings) []vmm.Driver {
	chv, q := cloudhypervisor.New(s.CloudHypervisorBinary), qemu.New(s.QEMUBinary)
	if s.Confine {
		chv.Opens, q.Opens = confinedOpens, confinedOpens
	}
	return []vmm.Driver{chv, q}
}

// confinedOpens says why a VMM that is not root may not open a device.
func confinedOpens(device string) error {
	_, err := confine.DeviceGroups(device)
	return err
}

// choice is the hypervisor that new sandboxes use.
type choice struct {
	// all are returned in any case: VMs of an earlier configuration may live.
	all    []vmm.Driver
	driver vmm.Driver
	host   vmm.Host
	// why it is that one, for people.
	why string
}

// chooseDriver takes the hypervisor of that name, or with "auto" the first that can run
// here. The error says of each reason.
func chooseDriver(ctx context.Context, name string, all []vmm.Driver) (choice, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	candidates := all
	if name != config.VMMAuto {
		candidates = slices.DeleteFunc(slices.Clone(all), func(d vmm.Driver) bool { return d.Name() != name })
	}
	if len(candidates) == 0 {
		return choice{all: all}, nil // the configuration's check has said what is wrong
	}
	why := []string{"vmm is " + name}
	var errs []error
	for _, d := range candidates {
		host, err := d.Probe(ctx)
		if err != nil {
			err = fmt.Errorf("%s cannot run here: %w", d.Name(), err)
			why = append(why, oneLine(err))
			errs = append(errs, err)
			continue
		}
		if len(errs) == 0 && name == config.VMMAuto {
			why = append(why, d.Name()+" can run here")
		}
		chosen := choice{all: all, driver: d, host: host, why: strings.Join(why, ", and ")}
		log.G(ctx).WithFields(log.Fields{
			"hypervisor": host.Driver, "why": chosen.why, "version": host.Version, "binary": host.Binary,
			"accelerator": host.Accelerator, "reason": host.Reason,
		}).Info("chose hypervisor")
		return chosen, nil
	}
	reason := errs[0]
	for _, err := range errs[1:] {
		reason = fmt.Errorf("%w, and %w", reason, err)
	}
	return choice{all: all}, fmt.Errorf("hypervisor: vmm is %s, and %w", name, reason)
}

// oneLine is an error's text where there is one line for it. What it is, is said already.
func oneLine(err error) string {
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	return strings.TrimSuffix(text, ": "+errdefs.ErrFailedPrecondition.Error())
}
