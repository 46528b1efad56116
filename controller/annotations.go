// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/controller/annotation"
	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/controller/directvolume"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// overrides are what a pod's annotations change. Zero means not said.
type overrides struct {
	// vcpus and memory are the size of a pod that states no limit, maxVCPUs and
	// maxMemory the bounds up to which the pod may grow.
	vcpus, maxVCPUs   int
	memory, maxMemory int64
	// fixedMemory is true for a VM without virtio-mem.
	fixedMemory bool
	// kernelParams are appended to the guest kernel's command line.
	kernelParams []string
	// direct are the pod's direct volumes.
	direct []directvolume.Volume
	// said are the annotations themselves, by name.
	said map[string]said
}

// ownBoot is true if the VM must be booted for this pod alone.
func (o *overrides) ownBoot() bool { return o.fixedMemory || len(o.kernelParams) > 0 }

// said is an annotation as the pod has it.
type said struct{ key, value string }

func (a said) String() string { return fmt.Sprintf("annotation %s = %q", a.key, a.value) }

// parsing is what a value is parsed with.
type parsing struct {
	cfg *config.Settings
	// kata says that the value is written as Kata's documentation has it.
	kata bool
}

// annotationParsers are the annotations by their name behind the prefix.
var annotationParsers = map[string]func(p parsing, o *overrides, value string) error{
	annotation.VCPUs: func(p parsing, o *overrides, value string) (err error) {
		o.vcpus, err = p.vcpus(value)
		return err
	},
	annotation.MaxVCPUs: func(p parsing, o *overrides, value string) (err error) {
		o.maxVCPUs, err = p.vcpus(value)
		return err
	},
	annotation.Memory: func(p parsing, o *overrides, value string) (err error) {
		o.memory, err = p.memory(value, vmm.MinMemory)
		return err
	},
	annotation.MaxMemory:   parseMaxMemory,
	annotation.MemoryLimit: parseMaxMemory,
	annotation.VirtioMem: func(_ parsing, o *overrides, value string) error {
		on, err := strconv.ParseBool(value)
		if err != nil {
			return errors.New("must be true or false")
		}
		o.fixedMemory = !on
		return nil
	},
	annotation.KernelParams: func(_ parsing, o *overrides, value string) error {
		if strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r > '~' }) || len(value) > 1024 {
			return errors.New("must be at most 1024 printable ASCII characters")
		}
		o.kernelParams = strings.Fields(value)
		return nil
	},
	annotation.DirectVolumes: parseDirectVolumes,
}

func parseMaxMemory(p parsing, o *overrides, value string) (err error) {
	o.maxMemory, err = p.memory(value, p.cfg.BaseMemory)
	return err
}

// vcpus reads a number of vCPUs. Kata's may be a fraction, which is rounded up.
func (p parsing) vcpus(value string) (int, error) {
	n, err := strconv.ParseFloat(value, 64)
	if !p.kata {
		var whole uint64
		whole, err = strconv.ParseUint(value, 10, 31)
		n = float64(whole)
	}
	if n = math.Ceil(n); err != nil || !(n >= 1 && n <= float64(p.cfg.MaxVCPUs)) {
		return 0, fmt.Errorf("must be a whole number of vCPUs from 1 to %d (max_vcpus)", p.cfg.MaxVCPUs)
	}
	return int(n), nil
}

// memory reads a size of at least so many bytes. Kata's is a number of MiB.
func (p parsing) memory(value string, least int64) (int64, error) {
	if p.kata {
		value += "MiB"
	}
	n, err := config.ParseSize(value)
	if err == nil && n >= least && n <= p.cfg.MaxMemory {
		return n, nil
	}
	if p.kata {
		return 0, fmt.Errorf("must be a whole number of MiB from %d to %d (max_memory)", (least+1<<20-1)>>20, p.cfg.MaxMemory>>20)
	}
	return 0, fmt.Errorf("must be a size from %q to %q (max_memory), such as %q",
		config.FormatSize(least), config.FormatSize(p.cfg.MaxMemory), "512MiB")
}

// parseAnnotations reads a pod's annotations. One of ours that is unknown, has a
// wrong value or is not on the node's allow-list is refused; so are Kata's if we
// know them. Kata's others mean nothing here. All errors come together.
func parseAnnotations(annotations map[string]string, cfg *config.Settings) (overrides, error) {
	o := overrides{said: map[string]said{}}
	var errs []error
	refuse := func(a said, why string) {
		errs = append(errs, fmt.Errorf("%s: %s: %w", a, why, errdefs.ErrInvalidArgument))
	}
	// Ours come last, so that they win.
	for _, prefix := range []string{annotation.Kata, annotation.Long, annotation.Own} {
		for _, key := range slices.Sorted(maps.Keys(annotations)) {
			name, ok := strings.CutPrefix(key, prefix)
			if !ok || prefix == annotation.Own && strings.HasPrefix(key, annotation.Long) {
				continue
			}
			a := said{key, annotations[key]}
			parse := annotationParsers[name]
			switch {
			case parse == nil && prefix == annotation.Kata:
				continue
			case parse == nil:
				refuse(a, "no such annotation; there are "+strings.Join(annotation.Names(), ", "))
			case !isAllowed(key, cfg.Annotations):
				refuse(a, "this node's configuration does not allow it (annotations)")
			default:
				if err := parse(parsing{cfg: cfg, kata: prefix != annotation.Own}, &o, a.value); err != nil {
					refuse(a, err.Error())
				}
				if name == annotation.MemoryLimit {
					name = annotation.MaxMemory
				}
				o.said[name] = a
			}
		}
	}
	return o, errors.Join(errs...)
}

func isAllowed(key string, allowed []string) bool {
	return slices.ContainsFunc(allowed, func(pattern string) bool {
		if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
			return strings.HasPrefix(key, prefix)
		}
		return key == pattern
	})
}

// mergeAnnotations adds the API caller's to the pod's, which win.
func mergeAnnotations(pod, extra map[string]string) map[string]string {
	merged := maps.Clone(extra)
	if merged == nil {
		merged = map[string]string{}
	}
	maps.Copy(merged, pod)
	return merged
}
