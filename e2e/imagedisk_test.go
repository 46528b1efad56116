// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// privilegedPod is a pod on a node that found a VM ready, and may look at its disks.
func privilegedPod(t *testing.T, n *testnode.Node) *pod {
	t.Helper()
	require.NoError(t, n.AwaitPool(testContext(t), 1))
	cfg := n.PodConfig("disks")
	cfg.Linux.SecurityContext.Privileged = true
	id, err := n.RunPod(testContext(t), cfg, testnode.CloudHV)
	require.NoError(t, err, n.LogTail(4000))
	p := &pod{t: t, n: n, handler: testnode.CloudHV, cfg: cfg, id: id}
	t.Cleanup(p.remove)
	require.Equal(t, "hit", p.info().Outcome)
	return p
}

// of runs a container of an image in a privileged pod.
func (p *pod) of(name, ref string) *container {
	p.t.Helper()
	cfg := testnode.ContainerConfig(name, ref, "/bin/sh", "-c", "exec sleep 2147483647")
	cfg.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{Privileged: true}}
	c := p.start(cfg)
	// What tells the images apart.
	want := "no\n"
	if ref == testimage.HelperRef {
		want = "yes\n"
	}
	assert.Equal(p.t, want, c.sh("test -x "+testimage.HelperPath+" && echo yes || echo no"))
	return c
}

// wholeDisks reads all that can be read of a VM's disks, and returns the hash of each by
// its serial, and that of the first image's. Beyond the end of what is in it, the disk for
// an image gives an error.
func (c *container) wholeDisks() (disks map[string]string, first string) {
	c.t.Helper()
	disks = map[string]string{}
	out := c.sh(`cd /sys/block; for d in vd*; do s=$(cat $d/serial); [ $s = scratch ] && continue
mknod /tmp/$d b $(tr : ' ' < $d/dev); echo $s $(dd if=/tmp/$d bs=4096 2>/dev/null | sha256sum); rm /tmp/$d; done`)
	for line := range strings.Lines(out) {
		fields := strings.Fields(line)
		require.Greater(c.t, len(fields), 1, out)
		disks[fields[0]] = fields[1]
		if fields[0] != "root" && first == "" {
			first = fields[1]
		}
	}
	return disks, first
}

// imageHashes are those of the node's image files.
func imageHashes(t *testing.T, n *testnode.Node) map[string]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(n.CacheDir(), "images", "*.erofs"))
	require.NoError(t, err)
	hashes := map[string]string{}
	for _, f := range files {
		data, err := os.ReadFile(f)
		require.NoError(t, err)
		sum := sha256.Sum256(data)
		hashes[hex.EncodeToString(sum[:])] = filepath.Base(f)
	}
	return hashes
}

// TestImageDisks runs two images in two pods whose VMs are of one snapshot, each with
// another first, before and after containerd was killed. Whatever a VM's disks hold is
// what one of the images' files holds, to the byte.
func TestImageDisks(t *testing.T) {
	address := freeAddress(t)
	n := poolNode(t, map[string]any{"min": 1, "max": 1}, func(o *testnode.Options) { o.Metrics = address })
	helper, err := testimage.Helper(suite.helper)
	require.NoError(t, err)
	busybox, err := testimage.Busybox()
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.HelperRef, helper))
	require.NoError(t, n.Import(testContext(t), testimage.BusyboxRef, busybox))
	refs := []string{testimage.HelperRef, testimage.BusyboxRef}

	pods := []*pod{privilegedPod(t, n), privilegedPod(t, n)}
	first := make([]string, len(pods))
	look := func(round string) {
		t.Helper()
		for i, p := range pods {
			for j := range refs {
				c := p.of(fmt.Sprintf("%s-%d", round, j), refs[(i+j)%len(refs)])
				disks, image := c.wholeDisks()
				files := imageHashes(t, n)
				for serial, hash := range disks {
					if serial != "root" {
						assert.NotEmpty(t, files[hash], "disk %s of pod %d: %v is none of %v", serial, i, disks, files)
					}
				}
				want := 2 + j
				if round != "before" {
					want = 3
				}
				assert.Len(t, disks, want, "%v", disks)
				if first[i] == "" {
					first[i] = image
				}
				assert.Equal(t, first[i], image, "the first image stays where it is")
			}
		}
	}
	look("before")
	assert.NotEqual(t, first[0], first[1])
	require.NoError(t, n.Restart(testContext(t), true))
	look("after")
}
