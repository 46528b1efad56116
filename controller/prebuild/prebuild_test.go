// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package prebuild

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/controller/rootfs"
)

// awaitUse waits until it is written down that a repository is used.
func (r *rig) awaitUse(repo string) {
	r.t.Helper()
	require.Eventually(r.t, func() bool {
		for _, u := range r.saved().Used {
			if u.Namespace == testNS && u.Snapshotter == "overlayfs" && u.Repository == repo {
				return true
			}
		}
		return false
	}, soon, time.Millisecond, repo)
}

// awaitPending waits until that many images are written down as to be made.
func (r *rig) awaitPending(n int) {
	r.t.Helper()
	require.Eventually(r.t, func() bool { return len(r.saved().Pending) == n }, soon, time.Millisecond)
}

func TestAlways(t *testing.T) {
	t.Parallel()
	r := newRig(t, config.PrebuildAlways)
	a := source("overlayfs", r.pull("r/a", "1"))
	r.awaitAsked(a)
	r.pull("r/a", "1") // again, and nothing is new
	b := source("overlayfs", r.pull("r/b", "1"))
	r.awaitAsked(a, b)
	r.awaitPending(0)
}

// An import tells of the image before it is unpacked.
func TestAnImport(t *testing.T) {
	t.Parallel()
	r := newRig(t, config.PrebuildAlways)
	target, chain := r.build("a", 2, platforms.DefaultSpec())
	r.name("r/a:1", target)
	r.awaitPending(1)
	r.unpack("overlayfs", digest.FromString("its first layer").String())
	r.unpack("overlayfs", chain)
	r.awaitAsked(source("overlayfs", chain))
	r.awaitPending(0)
}

func TestUsed(t *testing.T) {
	t.Parallel()
	r := newRig(t, config.PrebuildUsed)
	r.Ran(testNS, "r/a:1", "overlayfs")
	r.awaitUse("r/a")
	r.pull("r/b", "2")
	a := source("overlayfs", r.pull("r/a", "2"))
	r.awaitAsked(a)
	// What pods have run is known to the next containerd.
	r.restart()
	b := source("overlayfs", r.pull("r/a", "3"))
	r.awaitAsked(a, b)
}

// CRI may know a container's image by its ID alone, and it has several names.
func TestAnImageByItsID(t *testing.T) {
	t.Parallel()
	r := newRig(t, config.PrebuildUsed)
	target, _ := r.build("a", 2, platforms.DefaultSpec())
	id := digest.FromString("its configuration").String()
	for _, name := range []string{"r/a:1", "mirror/a:1", id} {
		r.know(name, target)
	}
	r.Ran(testNS, id, "overlayfs")
	r.awaitUse("r/a")
	r.awaitUse("mirror/a")
	r.awaitAsked(source("overlayfs", r.pull("mirror/a", "2")))
}

// Only the snapshotter counts that pods use.
func TestAnotherSnapshotter(t *testing.T) {
	t.Parallel()
	r := newRig(t, config.PrebuildUsed)
	r.Ran(testNS, "r/a:1", "overlayfs")
	r.awaitUse("r/a")
	target, chain := r.build("a", 2, platforms.DefaultSpec())
	r.unpack("native", chain)
	r.name("r/a:2", target)
	r.awaitPending(1)
	r.awaitAsked()
	r.unpack("overlayfs", chain)
	r.awaitAsked(source("overlayfs", chain))
}

func TestWhatCannotBeRun(t *testing.T) {
	t.Parallel()
	r := newRig(t, config.PrebuildAlways)
	target, chain := r.build("foreign", 1, ocispec.Platform{OS: "plan9", Architecture: "mips"})
	r.unpack("overlayfs", chain)
	r.name("r/foreign:1", target)
	target, _ = r.build("empty", 0, platforms.DefaultSpec())
	r.name("r/empty:1", target)
	r.name("r/gone:1", ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("gone"), Size: 4})
	// Events come in order, so those have been looked at.
	r.awaitAsked(source("overlayfs", r.pull("r/a", "1")))
	r.awaitPending(0)
}

func TestOneAtATime(t *testing.T) {
	t.Parallel()
	r := newRig(t, config.PrebuildAlways)
	r.builder.mu.Lock()
	r.builder.gate = make(chan struct{})
	r.builder.mu.Unlock()
	var want []rootfs.Source
	for i := range 5 {
		want = append(want, source("overlayfs", r.pull("r/a", fmt.Sprint(i))))
	}
	r.awaitPending(5)
	r.awaitAsked(want[0])
	close(r.builder.gate)
	r.awaitAsked(want...)
	r.awaitPending(0)
	require.Equal(t, 1, r.builder.most)
}

// containerd's end costs nothing: neither what is being made, nor what waits, nor
// what is not unpacked yet.
func TestARestart(t *testing.T) {
	t.Parallel()
	r := newRig(t, config.PrebuildAlways)
	r.builder.mu.Lock()
	r.builder.gate = make(chan struct{})
	r.builder.mu.Unlock()
	a, b := source("overlayfs", r.pull("r/a", "1")), source("overlayfs", r.pull("r/b", "1"))
	target, c := r.build("c", 1, platforms.DefaultSpec())
	r.name("r/c:1", target)
	r.awaitPending(3)
	r.awaitAsked(a)
	r.restart(func() {
		require.Len(t, r.saved().Pending, 3)
		require.Zero(t, r.builder.running, "what was being made has ended")
		r.builder.gate = nil
	})
	r.awaitAsked(a, a, b)
	r.unpack("overlayfs", c)
	r.awaitAsked(a, a, b, source("overlayfs", c))
	r.awaitPending(0)
}

// A failure is not tried again, and costs no other image.
func TestFailures(t *testing.T) {
	t.Parallel()
	for _, err := range []error{
		errdefs.ErrResourceExhausted, errdefs.ErrAlreadyExists, errdefs.ErrInternal,
	} {
		t.Run(err.Error(), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, config.PrebuildAlways)
			r.builder.mu.Lock()
			r.builder.err = err
			r.builder.mu.Unlock()
			a := source("overlayfs", r.pull("r/a", "1"))
			r.awaitAsked(a)
			r.awaitPending(0)
			r.builder.mu.Lock()
			r.builder.err = nil
			r.builder.mu.Unlock()
			r.awaitAsked(a, source("overlayfs", r.pull("r/b", "1")))
		})
	}
}

// A snapshot that has gone may come again.
func TestASnapshotThatIsGone(t *testing.T) {
	t.Parallel()
	r := newRig(t, config.PrebuildAlways)
	r.builder.mu.Lock()
	r.builder.err = errdefs.ErrNotFound
	r.builder.mu.Unlock()
	target, chain := r.build("a", 2, platforms.DefaultSpec())
	r.unpack("overlayfs", chain)
	r.name("r/a:1", target)
	r.awaitAsked(source("overlayfs", chain))
	r.awaitPending(0)
	r.builder.mu.Lock()
	r.builder.err = nil
	r.builder.mu.Unlock()
	r.unpack("overlayfs", chain)
	r.name("r/a:1", target)
	r.awaitAsked(source("overlayfs", chain), source("overlayfs", chain))
}

// Images that are imported and never unpacked do not add up.
func TestPendingIsBounded(t *testing.T) {
	t.Parallel()
	r := newRig(t, config.PrebuildAlways)
	const extra = 3
	var chains []string
	for i := range maxPending + extra {
		target, chain := r.build(fmt.Sprint("i", i), 1, platforms.DefaultSpec())
		r.name(fmt.Sprintf("r/a:%d", i), target)
		chains = append(chains, chain)
	}
	require.Eventually(t, func() bool {
		p := r.saved().Pending
		return len(p) == maxPending && p[maxPending-1].Name == fmt.Sprintf("r/a:%d", maxPending+extra-1)
	}, 3*soon, 5*time.Millisecond)
	require.Equal(t, fmt.Sprintf("r/a:%d", extra), r.saved().Pending[0].Name, "the oldest have gone")
	r.unpack("overlayfs", chains[0])
	r.unpack("overlayfs", chains[extra])
	r.awaitAsked(source("overlayfs", chains[extra]))
}

// A memory that cannot be read costs nothing else.
func TestADamagedMemoryDoesNotStop(t *testing.T) {
	t.Parallel()
	r := newRig(t, config.PrebuildUsed)
	r.restart(func() {
		require.NoError(t, os.WriteFile(filepath.Join(r.cfg.Dir, memoryFile), []byte("{"), 0o600))
	})
	r.Ran(testNS, "r/a:1", "overlayfs")
	r.awaitUse("r/a")
	r.awaitAsked(source("overlayfs", r.pull("r/a", "2")))
}
