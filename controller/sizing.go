// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/controller/annotation"
	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// How large a pod's VM is.
//
// Memory: the pod's limit, which is what kubelet adds up from its containers
// (linux.resources.memory_limit_in_bytes), plus memory_overhead for the guest's
// kernel and agent. The overhead of the RuntimeClass (linux.overhead) changes
// nothing: it is what the pod may take on the host beyond its limit, where the
// VMM has to live too. A pod without a limit begins with default_memory, or what its
// annotation says, and grows with its containers: to the sum of their limits plus
// the overhead or, if one of them has none, plus that default, which those
// without one then share. The result is rounded up to what virtio-mem plugs at a
// time, and is at least base_memory.
//
// vCPUs: the pod's CPU limit (cpu_quota over cpu_period), rounded up, but no more
// than its maximum: a limit of processor time is no promise of any, and pods may have
// limits that no node can serve. A pod without one begins with default_vcpus, or what
// its annotation says, and grows to the sum of its containers' limits, up to its
// maximum too. The VMM's own work is bounded by the pod's cgroup, and not by giving it
// a processor.
//
// A limit of the pod goes before those of its containers, which may be more
// together: its cgroup on the host has it too.
//
// Memory that exceeds max_memory, or the pod's own annotation of that kind, is
// refused, never cut down; so are annotations that exceed a maximum.

// defaultPeriod is the kernel's CFS period, in microseconds.
const defaultPeriod = 100000

// sizing is what decides the size of a pod's VM, beside its containers. It is
// recorded with the pod, which another configuration does not resize.
type sizing struct {
	// Memory is the pod's limit in bytes; VCPUs is its CPU limit, rounded up. 0 is
	// none. Overhead is added to limits of memory.
	Memory   int64 `json:"memory,omitempty"`
	VCPUs    int   `json:"vcpus,omitempty"`
	Overhead int64 `json:"overhead,omitempty"`
	// Default is what a pod without a limit begins with, Base the least memory.
	Default vmm.Size `json:"default"`
	Base    int64    `json:"base"`
	// Max is the bound, and MaxMemoryBy the option or annotation that sets its memory.
	Max         vmm.Size `json:"max"`
	MaxMemoryBy string   `json:"max_memory_by"`
	// FixedMemory names the annotation by which the memory stays as it is at first.
	FixedMemory string `json:"fixed_memory,omitempty"`
}

// limits are those of a container; 0 or less is none. The period is in
// microseconds, 0 is the kernel's.
type limits struct {
	memory, quota int64
	period        uint64
}

// newSizing reads what a pod says of its size. Resources may be nil. Errors wrap
// ErrInvalidArgument.
func newSizing(cfg *config.Settings, o overrides, res *runtime.LinuxContainerResources) (sizing, error) {
	s := sizing{
		Overhead:    cfg.MemoryOverhead,
		Default:     vmm.Size{VCPUs: cfg.DefaultVCPUs, MemoryBytes: cfg.DefaultMemory},
		Base:        cfg.BaseMemory,
		Max:         vmm.Size{VCPUs: cfg.MaxVCPUs, MemoryBytes: cfg.MaxMemory},
		MaxMemoryBy: "max_memory",
	}
	maxVCPUsBy := "max_vcpus"
	if o.maxVCPUs > 0 {
		s.Max.VCPUs, maxVCPUsBy = o.maxVCPUs, o.said[annotation.MaxVCPUs].key
		s.Default.VCPUs = min(s.Default.VCPUs, o.maxVCPUs)
	}
	if o.maxMemory > 0 {
		s.Max.MemoryBytes, s.MaxMemoryBy = o.maxMemory/config.Granule*config.Granule, o.said[annotation.MaxMemory].key
		s.Default.MemoryBytes = min(s.Default.MemoryBytes, s.Max.MemoryBytes)
	}
	if o.fixedMemory {
		s.FixedMemory = o.said[annotation.VirtioMem].key
	}
	var errs []error
	if s.Default.VCPUs = cmp.Or(o.vcpus, s.Default.VCPUs); s.Default.VCPUs > s.Max.VCPUs {
		errs = append(errs, fmt.Errorf("%s: must be from 1 to %d (%s): %w",
			o.said[annotation.VCPUs], s.Max.VCPUs, maxVCPUsBy, errdefs.ErrInvalidArgument))
	}
	if s.Default.MemoryBytes = cmp.Or(o.memory, s.Default.MemoryBytes); s.Default.MemoryBytes > s.Max.MemoryBytes {
		errs = append(errs, fmt.Errorf("%s: must be at most %q (%s): %w",
			o.said[annotation.Memory], config.FormatSize(s.Max.MemoryBytes), s.MaxMemoryBy, errdefs.ErrInvalidArgument))
	}
	s, err := s.with(res)
	return s, errors.Join(append(errs, err)...)
}

// with is the sizing after an update of the pod's limits; what is not said stays.
// Errors wrap ErrInvalidArgument.
func (s sizing) with(res *runtime.LinuxContainerResources) (sizing, error) {
	if n := res.GetMemoryLimitInBytes(); n > 0 {
		s.Memory = n
	}
	quota, period := res.GetCpuQuota(), res.GetCpuPeriod()
	if period < 0 {
		return s, fmt.Errorf("linux.resources.cpu_period = %d: must be a number of microseconds, or 0 for %d: %w",
			period, defaultPeriod, errdefs.ErrInvalidArgument)
	}
	if quota > 0 {
		s.VCPUs = int(min((quota-1)/cmp.Or(period, defaultPeriod)+1, math.MaxInt32))
	}
	return s, nil
}

// size is that of the VM for a pod with these containers. Errors wrap
// ErrInvalidArgument.
func (s sizing) size(containers []limits) (vmm.Size, error) {
	memory, err := s.memory(containers)
	return vmm.Size{VCPUs: s.vcpus(containers), MemoryBytes: memory}, err
}

func (s sizing) vcpus(containers []limits) int {
	if s.VCPUs > 0 {
		return min(s.VCPUs, s.Max.VCPUs)
	}
	var milli int64 // thousandths of a processor
	for _, c := range containers {
		if c.quota > 0 {
			milli = addUp(milli, milliCPUs(c))
		}
	}
	return int(max(int64(s.Default.VCPUs), min((milli+999)/1000, int64(s.Max.VCPUs))))
}

// milliCPUs is a container's CPU limit in thousandths of a processor, at most
// what int32 holds.
func milliCPUs(c limits) int64 {
	n := math.Ceil(float64(c.quota) * 1000 / float64(cmp.Or(c.period, defaultPeriod)))
	return int64(min(n, math.MaxInt32))
}

func (s sizing) memory(containers []limits) (int64, error) {
	want, what := s.Default.MemoryBytes, "its default memory"
	var sum int64
	limited, free := 0, 0
	for _, c := range containers {
		if c.memory > 0 {
			sum = addUp(sum, c.memory)
			limited++
		} else {
			free++
		}
	}
	switch {
	case s.Memory > 0:
		want, what = addUp(s.Memory, s.Overhead), fmt.Sprintf("linux.resources.memory_limit_in_bytes = %d", s.Memory)
	case limited > 0 && free > 0:
		want, what = addUp(sum, s.Default.MemoryBytes), fmt.Sprintf("the memory limits of its containers, %d bytes together, and the default for others", sum)
	case limited > 0:
		want, what = max(want, addUp(sum, s.Overhead)), fmt.Sprintf("the memory limits of its containers, %d bytes together", sum)
	}
	want = config.RoundUp(max(want, s.Base))
	if want > s.Max.MemoryBytes {
		return 0, fmt.Errorf("by %s the pod asks for a VM of %d bytes of memory: must be at most %d (%s = %q), with an overhead of %d bytes: %w",
			what, want, s.Max.MemoryBytes, s.MaxMemoryBy, config.FormatSize(s.Max.MemoryBytes), s.Overhead, errdefs.ErrInvalidArgument)
	}
	return want, nil
}

// overhead is what a pod's RuntimeClass should state: memory_overhead, and what the
// VMM takes beside its guest's memory.
func (c *Controller) overhead() int64 {
	return c.cfg.MemoryOverhead + c.host.OverheadBytes
}

// checkOverhead warns of a RuntimeClass whose overhead is too small, once for each.
// 0 is none.
func (c *Controller) checkOverhead(ctx context.Context, stated int64) {
	if stated <= 0 || stated >= c.overhead() {
		return
	}
	if _, told := c.overheads.LoadOrStore(stated, true); !told {
		log.G(ctx).WithFields(log.Fields{"overhead_bytes": stated, "needed_bytes": c.overhead()}).
			Warn("the overhead of the pod's RuntimeClass is too small: a pod that uses all of its limit may be killed by the host's kernel")
	}
}

// addUp adds two numbers of which none is negative, up to what int64 holds.
func addUp(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

// larger is the size that is large enough for both.
func larger(a, b vmm.Size) vmm.Size {
	return vmm.Size{VCPUs: max(a.VCPUs, b.VCPUs), MemoryBytes: max(a.MemoryBytes, b.MemoryBytes)}
}

func sizeText(s vmm.Size) string {
	return fmt.Sprintf("%d vCPUs and %d MiB", s.VCPUs, s.MemoryBytes>>20)
}
