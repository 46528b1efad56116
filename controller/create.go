// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/tracing"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

// sandboxID is what may name a directory whose sockets' paths fit the kernel.
var sandboxID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$`)

// startConfig is all that Start needs of the pod's configuration.
type startConfig struct {
	hostname     string
	hosts        []byte
	resolvConf   []byte
	sysctls      map[string]string
	kernelParams []string
	// userns is the pod's user namespace, nil if it has none.
	userns *guestv1.UserNamespace
	// ownBoot is true if no VM of the pool will do.
	ownBoot bool
}

// Create checks the pod's configuration and records the sandbox. On a host or
// with a configuration that cannot serve it fails with the whole reason. After
// an error nothing is left.
func (c *Controller) Create(ctx context.Context, info sandbox.Sandbox, opts ...sandbox.CreateOpt) (retErr error) {
	began := time.Now()
	ctx = withPod(ctx, info.ID)
	ctx, span := tracing.StartSpan(ctx, tracing.Name(spanPrefix, "create"), tracing.WithAttribute("sandbox.id", info.ID))
	defer func() {
		countCreate(began, retErr)
		span.SetStatus(retErr)
		span.End()
	}()
	if c.unfit != nil {
		return fmt.Errorf("the cloudhv runtime cannot serve on this node: %w", c.unfit)
	}
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	if !sandboxID.MatchString(info.ID) || info.ID == damagedDir {
		return fmt.Errorf("sandbox ID %q is not 1 to 64 of [A-Za-z0-9_.-]: %w", info.ID, errdefs.ErrInvalidArgument)
	}
	var co sandbox.CreateOptions
	for _, opt := range opts {
		if err := opt(&co); err != nil {
			return err
		}
	}
	pc, err := podConfig(co.Options)
	if err != nil {
		return err
	}
	rec, start, err := c.plan(ctx, info.ID, ns, pc, &co)
	if err != nil {
		return err
	}
	p := newPod(filepath.Join(c.cfg.StateDir, info.ID), rec)
	p.start = start
	if err := c.admit(p); err != nil {
		return err
	}
	defer func() {
		if retErr != nil {
			c.drop(p)
		}
	}()
	if err := p.makeDir(ctx); err != nil {
		return sentinel(err, errdefs.ErrInternal)
	}
	if err := p.fill(ctx); err != nil {
		return errors.Join(sentinel(err, errdefs.ErrInternal), os.RemoveAll(p.dir))
	}
	log.G(ctx).WithFields(log.Fields{
		"vcpus": rec.Size.VCPUs, "memory": rec.Size.MemoryBytes, "netns": rec.NetNS,
	}).Debug("created sandbox")
	return nil
}

// fill writes what a sandbox's directory has before it is started.
func (p *pod) fill(ctx context.Context) error {
	if err := p.update(ctx, failpoint.CreateRecord, func(*record) {}); err != nil {
		return err
	}
	if err := p.linkGroup(ctx); err != nil {
		return err
	}
	return failpoint.At(ctx, failpoint.CreateDone)
}

// podConfig reads the configuration that CRI passes.
func podConfig(options typeurl.Any) (*runtime.PodSandboxConfig, error) {
	if options == nil || options.GetTypeUrl() == "" {
		return &runtime.PodSandboxConfig{}, nil
	}
	v, err := typeurl.UnmarshalAny(options)
	if err != nil {
		return nil, fmt.Errorf("decode sandbox options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	pc, ok := v.(*runtime.PodSandboxConfig)
	if !ok {
		return nil, fmt.Errorf("sandbox options are %s, not CRI's PodSandboxConfig: %w",
			options.GetTypeUrl(), errdefs.ErrInvalidArgument)
	}
	return pc, nil
}

// plan turns a pod's configuration into a record and what Start needs. All
// that is wrong with it is reported together.
func (c *Controller) plan(ctx context.Context, id, ns string, pc *runtime.PodSandboxConfig, co *sandbox.CreateOptions) (record, *startConfig, error) {
	overrides, annotErr := parseAnnotations(mergeAnnotations(pc.GetAnnotations(), co.Annotations), c.cfg)
	sizing, limitErr := newSizing(c.cfg, overrides, pc.GetLinux().GetResources())
	size, sizeErr := sizing.size(nil)
	if limitErr != nil {
		sizeErr = limitErr
	}
	start, fileErr := c.podFiles(pc)
	if err := errors.Join(checkPod(pc), annotErr, c.checkVolumes(&overrides), sizeErr, fileErr); err != nil {
		return record{}, nil, err
	}
	c.checkOverhead(ctx, pc.GetLinux().GetOverhead().GetMemoryLimitInBytes())
	start.kernelParams, start.ownBoot = overrides.kernelParams, overrides.ownBoot()
	rec := record{
		ID:         id,
		Namespace:  ns,
		State:      StateCreated,
		Pod:        podName{Namespace: pc.GetMetadata().GetNamespace(), Name: pc.GetMetadata().GetName(), UID: pc.GetMetadata().GetUid()},
		CreatedAt:  now(),
		NetNS:      co.NetNSPath,
		Size:       size,
		Max:        sizing.Max,
		Sizing:     &sizing,
		Hypervisor: c.driver.Name(),
		Scratch:    c.scratch.path(id),
		Direct:     overrides.direct,
	}
	if sizing.FixedMemory != "" {
		rec.Max.MemoryBytes = size.MemoryBytes
	}
	if c.cfg.Cgroup {
		rec.Cgroup = cgroupPath(c.cfg.CgroupParent, pc.GetLinux().GetCgroupParent(), id)
	}
	return rec, start, nil
}
