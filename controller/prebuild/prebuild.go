// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package prebuild has the root file systems of images made when the images are
// pulled, so that their first pod need not wait.
//
// containerd tells of images by its events. A pull by CRI tells of an image when it
// is unpacked, an import before: then the event of its topmost snapshot is waited
// for. What is to be made is written down, so that containerd's end costs nothing;
// it is made by one goroutine, one after the other.
package prebuild

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/opencontainers/image-spec/identity"

	"github.com/cloudhv/containerd-cloudhv/controller/rootfs"
)

// Builder makes file systems; a *rootfs.Store does.
type Builder interface {
	// Has tells whether there is one of a committed snapshot, or returns ErrNotFound
	// if there is no such snapshot.
	Has(ctx context.Context, src rootfs.Source) (bool, error)
	// Prebuild makes one, within limits; see rootfs.Store.
	Prebuild(ctx context.Context, src rootfs.Source, since time.Time, turns rootfs.Turns) error
}

// Config is what a Prebuilder needs.
type Config struct {
	// Policy is the option prebuild.
	Policy string
	// Dir holds what is remembered; the Prebuilder owns all of it.
	Dir     string
	Builder Builder
	// Turns are those of pods that are being started.
	Turns rootfs.Turns
	// Snapshotters names those to look in.
	Snapshotters []string
	// Images, Content and Events are containerd's.
	Images  images.Store
	Content content.Provider
	Events  events.Subscriber
}

// Prebuilder has file systems made until Close.
type Prebuilder struct {
	cfg    Config
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
	ran    chan run
	built  chan error

	// What follows is the loop's.
	memory *memory
	// jobs are in the order in which images came; the one that is being done is
	// building.
	jobs     []*job
	building *job
	// givenUp are what could not be made: that is left to pods, for as long as
	// containerd runs.
	givenUp []rootfs.Source
}

// run tells of a container that a pod of ours has run.
type run struct {
	namespace, image, snapshotter string
}

// job is an image whose file system is to be made.
type job struct {
	image
	// chain is the name of its topmost snapshot.
	chain string
	// pulled is when it came.
	pulled time.Time
	// unpacked is true once the snapshot is there. Then snapshotters has the one that
	// has it, and until then those of which one is to have it.
	unpacked     bool
	snapshotters []string
}

// maxRuns is how many runs may wait to be noted. One more is forgotten: there will
// be others.
const maxRuns = 64

// New makes a Prebuilder that hears of all that happens from now on.
func New(ctx context.Context, cfg Config) *Prebuilder {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	p := &Prebuilder{
		cfg: cfg, ctx: ctx, cancel: cancel, ran: make(chan run, maxRuns), built: make(chan error, 1),
	}
	var err error
	if p.memory, err = openMemory(cfg.Dir); err != nil {
		log.G(ctx).WithError(err).Warn("it is not known which images pods have run before; that is learned anew")
	}
	evs, errs := cfg.Events.Subscribe(ctx, topics()...)
	p.wg.Go(func() { p.loop(evs, errs) })
	return p
}

// Close ends what is being done, which goes on when containerd starts again.
func (p *Prebuilder) Close() error {
	p.cancel()
	p.wg.Wait()
	return nil
}

// Ran tells that a pod of ours has run an image. It waits for nothing.
func (p *Prebuilder) Ran(namespace, image, snapshotter string) {
	select {
	case p.ran <- run{namespace: namespace, image: image, snapshotter: snapshotter}:
	default:
	}
}

func (p *Prebuilder) loop(evs <-chan *events.Envelope, errs <-chan error) {
	for _, img := range slices.Clone(p.memory.Pending) {
		p.consider(img)
	}
	for p.ctx.Err() == nil {
		p.keep()
		p.next()
		select {
		case ev := <-evs:
			p.handle(ev)
		case err := <-errs:
			errs = nil
			if p.ctx.Err() == nil {
				log.G(p.ctx).WithError(err).Error("there are no events of images any more; none is made before a pod asks")
			}
		case r := <-p.ran:
			p.remember(r)
		case err := <-p.built:
			p.finish(err)
		case <-p.ctx.Done():
		}
	}
}

// keep writes down what is to be made, if that has changed.
func (p *Prebuilder) keep() {
	pending := make([]image, 0, len(p.jobs))
	for _, j := range p.jobs {
		if !slices.Contains(pending, j.image) {
			pending = append(pending, j.image)
		}
	}
	if slices.Equal(pending, p.memory.Pending) {
		return
	}
	p.memory.Pending = pending
	p.save()
}

func (p *Prebuilder) save() {
	if err := p.memory.save(); err != nil {
		log.G(p.ctx).WithError(err).Warn("cannot write down which images pods have run and which are to be made")
	}
}

// remember notes the repositories of an image that a pod has run. CRI names a
// container's image by one of its names, or by its ID.
func (p *Prebuilder) remember(r run) {
	ctx := namespaces.WithNamespace(p.ctx, r.namespace)
	names := []string{r.image}
	if img, err := p.cfg.Images.Get(ctx, r.image); err == nil {
		same, err := p.cfg.Images.List(ctx, fmt.Sprintf("target.digest==%q", img.Target.Digest))
		if err != nil {
			log.G(ctx).WithError(err).WithField("image", r.image).Debug("cannot list an image's names")
		}
		for _, other := range same {
			names = append(names, other.Name)
		}
	}
	changed := false
	for _, name := range names {
		if repo := repository(name); repo != "" {
			u := use{Namespace: r.namespace, Snapshotter: r.snapshotter, Repository: repo, At: time.Now().UTC()}
			changed = p.memory.remember(u) || changed
		}
	}
	if changed {
		p.save()
	}
}

// consider adds what is to be made of an image that came.
func (p *Prebuilder) consider(img image) {
	snapshotters := wanted(p.cfg.Policy, p.memory.Used, p.cfg.Snapshotters, img.Namespace, img.Name)
	if len(snapshotters) == 0 || len(img.Name) > maxName {
		return
	}
	ctx := namespaces.WithNamespace(p.ctx, img.Namespace)
	chain, pulled, err := p.resolve(ctx, img.Name)
	if err != nil {
		log.G(ctx).WithError(err).WithField("image", img.Name).Debug("an image that came cannot be run")
		return
	}
	missing := 0
	for _, name := range snapshotters {
		has, err := p.cfg.Builder.Has(ctx, rootfs.Source{Namespace: img.Namespace, Snapshotter: name, Key: chain})
		if err != nil {
			missing++
			if !errdefs.IsNotFound(err) {
				log.G(ctx).WithError(err).WithField("snapshotter", name).Warn("cannot find out whether an image is unpacked")
			}
			continue
		}
		if !has {
			p.add(&job{image: img, chain: chain, pulled: pulled, unpacked: true, snapshotters: []string{name}})
		}
	}
	if missing == len(snapshotters) {
		p.add(&job{image: img, chain: chain, pulled: pulled, snapshotters: snapshotters})
	}
}

// resolve finds an image's topmost snapshot, and when the image came. An image that
// is not for this platform is ErrNotFound, and so is what has no layers.
func (p *Prebuilder) resolve(ctx context.Context, name string) (chain string, pulled time.Time, err error) {
	img, err := p.cfg.Images.Get(ctx, name)
	if err != nil {
		return "", time.Time{}, err
	}
	layers, err := img.RootFS(ctx, p.cfg.Content, platforms.Default())
	if err != nil {
		return "", time.Time{}, err
	}
	if len(layers) == 0 {
		return "", time.Time{}, fmt.Errorf("it has no layers: %w", errdefs.ErrNotFound)
	}
	return identity.ChainID(layers).String(), img.UpdatedAt, nil
}

// source is what to make the file system of, once it is unpacked.
func (j *job) source() rootfs.Source {
	return rootfs.Source{Namespace: j.Namespace, Snapshotter: j.snapshotters[0], Key: j.chain}
}

// add appends a job, unless there is one for the same or it was tried before. If
// there are too many the oldest goes that is not being done.
func (p *Prebuilder) add(j *job) {
	if j.unpacked && slices.Contains(p.givenUp, j.source()) {
		return
	}
	for _, o := range p.jobs {
		if o.Namespace == j.Namespace && o.chain == j.chain && (!j.unpacked || slices.Equal(o.snapshotters, j.snapshotters)) {
			return
		}
	}
	if len(p.jobs) >= maxPending {
		i := slices.IndexFunc(p.jobs, func(o *job) bool { return o != p.building })
		p.report(p.jobs[i], "dropped", nil)
		p.jobs = slices.Delete(p.jobs, i, i+1)
	}
	p.jobs = append(p.jobs, j)
}

// unpacked makes the job ready whose topmost snapshot has come.
func (p *Prebuilder) unpacked(namespace, snapshotter, chain string) {
	for _, j := range p.jobs {
		if !j.unpacked && j.Namespace == namespace && j.chain == chain && slices.Contains(j.snapshotters, snapshotter) {
			j.unpacked, j.snapshotters = true, []string{snapshotter}
		}
	}
}

// next begins the next job, unless one is being done.
func (p *Prebuilder) next() {
	i := slices.IndexFunc(p.jobs, func(j *job) bool { return j.unpacked })
	if p.building != nil || i < 0 {
		return
	}
	j := p.jobs[i]
	p.building = j
	p.wg.Go(func() {
		p.built <- p.cfg.Builder.Prebuild(p.ctx, j.source(), j.pulled, p.cfg.Turns)
	})
}

// finish takes note of the job that was done.
func (p *Prebuilder) finish(err error) {
	j := p.building
	p.building = nil
	if err != nil && p.ctx.Err() != nil {
		return // it stays written down
	}
	switch {
	case err == nil:
		p.report(j, "built", nil)
	case errdefs.IsAlreadyExists(err): // a pod was faster
	case errdefs.IsResourceExhausted(err):
		p.report(j, "no_room", err)
		p.giveUp(j)
	case errdefs.IsNotFound(err):
		p.report(j, "gone", err)
	default:
		p.report(j, "failed", err)
		p.giveUp(j)
	}
	p.jobs = slices.DeleteFunc(p.jobs, func(o *job) bool { return o == j })
}

// giveUp notes that a job is not to be tried again. CRI tells of an image by three
// events a pull.
func (p *Prebuilder) giveUp(j *job) {
	p.givenUp = append(p.givenUp, j.source())
	p.givenUp = slices.Clone(p.givenUp[max(0, len(p.givenUp)-maxPending):])
}

func (p *Prebuilder) report(j *job, result string, err error) {
	prebuildCounter.WithValues(result).Inc()
	l := log.G(p.ctx).WithFields(log.Fields{
		"image": j.Name, "namespace": j.Namespace, "snapshotters": j.snapshotters, "result": result,
	})
	if err != nil {
		l = l.WithError(err)
	}
	const text = "prebuilding an image's file system"
	switch result {
	case "failed":
		l.Warn(text)
	case "gone":
		l.Debug(text)
	default:
		l.Info(text)
	}
}
