// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package plugin

import (
	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/vmpool/qemu"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// drivers are the hypervisors of this build.
func drivers(s *config.Settings) []vmm.Driver {
	return []vmm.Driver{qemu.New(s.QEMUBinary)}
}
