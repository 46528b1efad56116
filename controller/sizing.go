// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"errors"
	"fmt"
	"math"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// How large a pod's VM is.
//
// Memory: the pod's limit, which is what kubelet adds up from its containers
// (linux.resources.memory_limit_in_bytes), plus an overhead for the guest's
// kernel and agent: that of the RuntimeClass (linux.overhead), or else
// memory_overhead. The sum is rounded up to what virtio-mem plugs at a time, and
// is at least base_memory. A pod without a limit gets default_memory, or what its
// annotation says.
//
// vCPUs: the pod's CPU limit (cpu_quota over cpu_period), rounded up. A pod
// without one gets default_vcpus, or what its annotation says. The VMM's own
// work is bounded by the pod's cgroup, and not by giving it a processor.
//
// What exceeds max_memory or max_vcpus is refused, never cut down.

// defaultPeriod is the kernel's CFS period, in microseconds.
const defaultPeriod = 100000

// podSize computes the size of a VM. Resources and overhead may be nil. Errors
// wrap ErrInvalidArgument.
func podSize(cfg *config.Settings, o overrides, res, overhead *runtime.LinuxContainerResources) (vmm.Size, error) {
	vcpus, cpuErr := podVCPUs(cfg, o, res)
	memory, memErr := podMemory(cfg, o, res, overhead)
	return vmm.Size{VCPUs: vcpus, MemoryBytes: memory}, errors.Join(cpuErr, memErr)
}

func podVCPUs(cfg *config.Settings, o overrides, res *runtime.LinuxContainerResources) (int, error) {
	quota, period := res.GetCpuQuota(), res.GetCpuPeriod()
	if period < 0 {
		return 0, fmt.Errorf("linux.resources.cpu_period = %d is negative: %w", period, errdefs.ErrInvalidArgument)
	}
	if period == 0 {
		period = defaultPeriod
	}
	n := int64(cfg.DefaultVCPUs)
	switch {
	case quota > 0:
		n = (quota-1)/period + 1
	case o.vcpus > 0:
		n = int64(o.vcpus)
	}
	if n > int64(cfg.MaxVCPUs) {
		return 0, fmt.Errorf("the pod asks for %d vCPUs, and max_vcpus is %d: %w", n, cfg.MaxVCPUs, errdefs.ErrInvalidArgument)
	}
	return int(n), nil
}

func podMemory(cfg *config.Settings, o overrides, res, overhead *runtime.LinuxContainerResources) (int64, error) {
	limit, extra := res.GetMemoryLimitInBytes(), overhead.GetMemoryLimitInBytes()
	if extra <= 0 {
		extra = cfg.MemoryOverhead
	}
	n := cfg.DefaultMemory
	switch {
	case limit > 0 && limit > math.MaxInt64-extra:
		n = math.MaxInt64
	case limit > 0:
		n = limit + extra
	case o.memory > 0:
		n = o.memory
	}
	n = max(config.RoundUp(n), config.RoundUp(cfg.BaseMemory))
	if n > cfg.MaxMemory {
		return 0, fmt.Errorf("the pod asks for a VM of %d bytes of memory, and max_memory is %d (%s): %w",
			n, cfg.MaxMemory, config.FormatSize(cfg.MaxMemory), errdefs.ErrInvalidArgument)
	}
	return n, nil
}
