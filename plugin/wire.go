// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package plugin

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	bolt "go.etcd.io/bbolt"

	"github.com/cloudhv/containerd-cloudhv/controller"
	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/controller/prebuild"
	"github.com/cloudhv/containerd-cloudhv/controller/rootfs"
	"github.com/cloudhv/containerd-cloudhv/vmpool/confine"
)

// probeTimeout bounds finding out what the host can do.
const probeTimeout = 15 * time.Second

// build makes the controller, unfit if need be, and recovers what an
// earlier containerd left.
func build(ctx context.Context, ic *plugin.InitContext) *controller.Controller {
	cfg, ok := ic.Config.(*config.Config)
	if !ok {
		return controller.New(controller.Options{
			Unfit: fmt.Errorf("configuration is a %T: %w", ic.Config, errdefs.ErrInvalidArgument),
		})
	}
	settings, unfit := cfg.Validate(config.ReadHostInfo())
	if unfit != nil {
		unfit = fmt.Errorf("wrong configuration: %w", unfit)
	}
	usable := settings.StateDir != "" && settings.CacheDir != ""
	var lockErr error
	if usable {
		lockErr = lockDirs(settings.StateDir, settings.CacheDir, settings.Pool.TemplateDir)
	}
	stores, storeErr := containerdStores(ic)
	opts := controller.Options{Settings: settings, Layers: layers, TTRPCAddress: ic.Properties[propertyTTRPCAddress]}
	if stores != nil {
		opts.Sandboxes, opts.Containers = metadata.NewSandboxStore(stores.db), metadata.NewContainerStore(stores.db)
	}
	var images *rootfs.Store
	var imageErr error
	if usable && lockErr == nil && stores != nil {
		if images, imageErr = newImages(settings, stores); imageErr == nil {
			opts.Images = images
		}
	}
	chosen, driverErr := chooseDriver(ctx, settings.VMM, drivers(settings))
	opts.Drivers, opts.Driver, opts.Host, opts.DriverReason = chosen.all, chosen.driver, chosen.host, chosen.why
	opts.Unfit = allOf(unfit, lockErr, storeErr, imageErr, driverErr, confinement(ctx, settings))
	if opts.Unfit == nil {
		opts.Network, opts.Unfit = controller.OpenNetwork(settings.StateDir)
	}
	maps.Copy(ic.Meta.Exports, map[string]string{
		"hypervisor": chosen.host.Driver, "hypervisor_version": chosen.host.Version, "hypervisor_reason": chosen.why,
		"accelerator": chosen.host.Accelerator, "accelerator_reason": chosen.host.Reason,
	})
	c := controller.New(opts)
	if opts.Images != nil { // without its directories there is nothing to recover
		if err := c.OpenPool(); err != nil {
			log.G(ctx).WithError(err).Error("cannot make the pool of VMs; each sandbox boots its own")
		}
		recoverAll(ctx, c, images, stores)
		c.KeepClocks()
		c.OpenPrebuild(ctx, prebuild.Config{
			Builder: images, Snapshotters: stores.snapshotters,
			Images: metadata.NewImageStore(stores.db), Content: stores.db.ContentStore(), Events: stores.events,
		})
	}
	return c
}

// confinement says why VMMs cannot be confined, if they are to be.
func confinement(ctx context.Context, s *config.Settings) error {
	if !s.Confine {
		log.G(ctx).Warn("VMMs are not confined: confinement.enabled is false")
		return nil
	}
	if err := confine.Need(); err != nil {
		return fmt.Errorf("confinement.enabled: %w", err)
	}
	if !confine.HasLandlock() {
		log.G(ctx).WithField("confinement", confine.Support()).Warn("the kernel has no Landlock: only users and seccomp keep VMMs from files")
	}
	return nil
}

// allOf is one error of several, on one line, or nil.
func allOf(errs ...error) error {
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) == 0 {
		return nil
	}
	return &config.Error{Problems: errs}
}

// recoverAll takes up sandboxes and cleans the image store, for which the last and
// longest part goes on after it returned: the channel is closed when it is over.
// Failures cost what they concern, and are in the log.
func recoverAll(ctx context.Context, c *controller.Controller, images *rootfs.Store, s *stores) <-chan struct{} {
	begin := time.Now()
	namespaces, listErr := s.namespaces(ctx)
	if listErr != nil {
		log.G(ctx).WithError(listErr).Warn("cannot list namespaces; all images are kept")
	}
	if err := images.Clean(ctx, namespaces); err != nil {
		log.G(ctx).WithError(err).Warn("cannot remove all that an earlier containerd left of images")
	}
	if err := c.Recover(ctx); err != nil {
		log.G(ctx).WithError(err).Error("cannot recover all sandboxes")
	}
	log.G(ctx).WithField("duration", time.Since(begin)).Debug("recovered")
	done := make(chan struct{})
	go func() {
		defer close(done)
		if listErr != nil {
			return // no snapshot is known, so every image would go
		}
		if err := images.Forget(context.WithoutCancel(ctx), namespaces, s.snapshotters); err != nil {
			log.G(ctx).WithError(err).Warn("cannot remove images that are not needed any more")
		}
	}()
	return done
}

// stores are what we use of containerd's.
type stores struct {
	db           *metadata.DB
	leases       leases.Manager
	events       events.Subscriber
	snapshotters []string
}

func containerdStores(ic *plugin.InitContext) (*stores, error) {
	m, err := ic.GetSingle(metadataPlugin)
	if err != nil {
		return nil, fmt.Errorf("containerd's metadata: %w", err)
	}
	db, ok := m.(*metadata.DB)
	if !ok {
		return nil, fmt.Errorf("containerd's metadata is a %T: %w", m, errdefs.ErrFailedPrecondition)
	}
	l, err := ic.GetSingle(leasePlugin)
	if err != nil {
		return nil, fmt.Errorf("containerd's leases: %w", err)
	}
	lm, ok := l.(leases.Manager)
	if !ok {
		return nil, fmt.Errorf("containerd's lease manager is a %T: %w", l, errdefs.ErrFailedPrecondition)
	}
	sn, err := ic.GetByType(snapshotPlugin)
	if err != nil {
		return nil, fmt.Errorf("containerd's snapshotters: %w", err)
	}
	e, err := ic.GetSingle(eventPlugin)
	if err != nil {
		return nil, fmt.Errorf("containerd's events: %w", err)
	}
	ev, ok := e.(events.Subscriber)
	if !ok {
		return nil, fmt.Errorf("containerd's source of events is a %T: %w", e, errdefs.ErrFailedPrecondition)
	}
	return &stores{db: db, leases: lm, events: ev, snapshotters: slices.Sorted(maps.Keys(sn))}, nil
}

func (s *stores) namespaces(ctx context.Context) (list []string, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		list, err = metadata.NewNamespaceStore(tx).List(ctx)
		return err
	})
	return list, err
}

// snapshotter gives the metadata's view of a snapshotter, which knows namespaces and leases.
func (s *stores) snapshotter(name string) (snapshots.Snapshotter, error) {
	if !slices.Contains(s.snapshotters, name) {
		return nil, errdefs.ErrNotFound
	}
	return s.db.Snapshotter(name), nil
}

func newImages(s *config.Settings, st *stores) (*rootfs.Store, error) {
	return rootfs.New(rootfs.Config{
		Dir:         filepath.Join(s.CacheDir, "images"),
		CacheLimit:  s.ImageCacheLimit,
		Parallel:    s.BuilderParallel,
		Timeout:     s.RootFSTimeout,
		Builder:     rootfs.Builder{Binary: s.BuilderBinary, Memory: s.BuilderMemory, ImageSize: s.BuilderImageSize},
		Snapshotter: st.snapshotter,
		Leases:      st.leases,
	})
}
