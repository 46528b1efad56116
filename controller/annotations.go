// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
)

const (
	// ownPrefix begins our annotations; each falls back to Kata's of the same
	// name under kataPrefix.
	ownPrefix  = "io.cloudhv."
	kataPrefix = "io.katacontainers.config.hypervisor."
)

// overrides are what a pod's annotations change. Zero means not said.
type overrides struct {
	// vcpus and memory are the size of a pod that states no limit.
	vcpus  int
	memory int64
	// kernelParams are appended to the guest kernel's command line.
	kernelParams []string
}

// annotationParsers are the annotations by their name behind the prefix. Kata
// says if the value is written as Kata's documentation has it.
var annotationParsers = map[string]func(o *overrides, value string, kata bool) error{
	"default_vcpus": func(o *overrides, value string, _ bool) error {
		n, err := strconv.ParseUint(value, 10, 8)
		if err != nil || n == 0 {
			return errors.New("must be a whole number of vCPUs, at least 1")
		}
		o.vcpus = int(n)
		return nil
	},
	"default_memory": func(o *overrides, value string, kata bool) error {
		if kata {
			value += "MiB"
		}
		n, err := config.ParseSize(value)
		if err != nil || n <= 0 {
			if kata {
				return errors.New("must be a whole number of MiB")
			}
			return errors.New(`must be a size such as "512MiB"`)
		}
		o.memory = n
		return nil
	},
	"kernel_params": func(o *overrides, value string, _ bool) error {
		if strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r > '~' }) || len(value) > 1024 {
			return errors.New("must be at most 1024 printable ASCII characters")
		}
		o.kernelParams = strings.Fields(value)
		return nil
	},
}

// parseAnnotations reads a pod's annotations. One of ours that is unknown, has a
// wrong value or is not on the node's allow-list is refused; so are Kata's if we
// know them. Kata's others mean nothing here. All errors come together.
func parseAnnotations(annotations map[string]string, allowed []string) (overrides, error) {
	var (
		o    overrides
		errs []error
	)
	refuse := func(key, value, why string) {
		errs = append(errs, fmt.Errorf("annotation %s = %q: %s: %w", key, value, why, errdefs.ErrInvalidArgument))
	}
	// Kata's come first, so that ours win.
	for _, prefix := range []string{kataPrefix, ownPrefix} {
		for _, key := range slices.Sorted(maps.Keys(annotations)) {
			name, ok := strings.CutPrefix(key, prefix)
			if !ok {
				continue
			}
			value := annotations[key]
			parse := annotationParsers[name]
			switch {
			case parse == nil && prefix == kataPrefix:
				continue
			case parse == nil:
				refuse(key, value, "no such annotation; there are "+strings.Join(annotationNames(), ", "))
			case !isAllowed(key, allowed):
				refuse(key, value, "this node's configuration does not allow it (annotations)")
			default:
				if err := parse(&o, value, prefix == kataPrefix); err != nil {
					refuse(key, value, err.Error())
				}
			}
		}
	}
	return o, errors.Join(errs...)
}

func annotationNames() []string {
	var names []string
	for name := range annotationParsers {
		names = append(names, ownPrefix+name)
	}
	slices.Sort(names)
	return names
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
