// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package annotation has the names of the annotations that a pod may change its VM by.
// The controller reads them from the pod; the shim sees them again on each container.
package annotation

import (
	"slices"
	"strings"
)

// Prefixes. Own begins our annotations; each falls back to the same name under
// Long, which this project's predecessor had, and then to Kata's under
// Kata. Values under those two are written as Kata's documentation has it.
const (
	Own  = "io.cloudhv."
	Long = "io.cloudhv.config.hypervisor."
	Kata = "io.katacontainers.config.hypervisor."
)

// Names of annotations, behind a prefix.
const (
	VCPUs        = "default_vcpus"
	Memory       = "default_memory"
	MaxVCPUs     = "default_max_vcpus"
	MaxMemory    = "default_maxmemory"
	MemoryLimit  = "memory_limit" // another name of MaxMemory
	KernelParams = "kernel_params"
	VirtioMem    = "enable_virtio_mem"
	// DirectVolumes is one of ours only.
	DirectVolumes = "direct_volumes"
)

// names are all of them.
var names = []string{VCPUs, Memory, MaxVCPUs, MaxMemory, MemoryLimit, KernelParams, VirtioMem, DirectVolumes}

// Names are our annotations, in alphabetical order.
func Names() []string {
	out := make([]string, 0, len(names))
	for _, n := range names {
		out = append(out, Own+n)
	}
	slices.Sort(out)
	return out
}

// Unknown is true for an annotation that claims to be ours and that there is not.
func Unknown(key string) bool {
	name, ok := strings.CutPrefix(key, Long)
	if !ok {
		if name, ok = strings.CutPrefix(key, Own); !ok {
			return false
		}
	}
	return !slices.Contains(names, name)
}
