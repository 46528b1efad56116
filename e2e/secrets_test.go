// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// secrets are what a pod is given by each way that there is, by the way's name.
type secrets map[string]string

func newSecrets(handler string) secrets {
	s := secrets{}
	for _, way := range []string{"environment", "argument", "volume", "exec", "output", "input", "annotation"} {
		s[way] = fmt.Sprintf("s3cret-%s-%s-%d", way, handler, os.Getpid())
	}
	return s
}

// give has a container of a pod on a node use all of them, and returns its pod.
func (s secrets) give(t *testing.T, n *testnode.Node, handler string) *pod {
	t.Helper()
	volume := openDir(t)
	require.NoError(t, os.WriteFile(filepath.Join(volume, "token"), []byte(s["volume"]), 0o600))
	p := podBy(t, n, handler, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Annotations = map[string]string{"example.com/token": s["annotation"]}
	})
	cfg := withMounts(shellConfig("c", "cat /secret/token > /kept; echo $TOKEN $0 >> /kept; echo ready; exec sleep 1000"),
		&runtimeapi.Mount{ContainerPath: "/secret", HostPath: volume, Readonly: true})
	cfg.Command = append(cfg.Command, s["argument"])
	cfg.Envs = []*runtimeapi.KeyValue{{Key: "TOKEN", Value: []byte(s["environment"])}}
	c := p.start(cfg)
	c.awaitLine("ready")
	kept := c.exec("/bin/sh", "-c", "cat /kept; : "+s["exec"])
	for _, way := range []string{"environment", "argument", "volume"} {
		require.Contains(t, kept, s[way])
	}
	require.Contains(t, c.exec("echo", s["output"]), s["output"])
	out, errOut, err := c.n.Crictl(testContext(t), "exec", c.id, "sh", "-c", "echo "+s["input"]+" | md5sum")
	require.NoError(t, err, errOut)
	require.NotEmpty(t, out)
	return p
}

// in are the ways whose secrets occur in a text.
func (s secrets) in(text []byte) (ways []string) {
	for way, secret := range s {
		if bytes.Contains(text, []byte(secret)) {
			ways = append(ways, way)
		}
	}
	slices.Sort(ways)
	return ways
}

// TestSecrets gives a pod secrets by every way, on a node that logs everything and has VMs
// ready, and looks for them wherever they have no business to be. What CRI itself logs of
// every container at that level, by whatever handler, is its own.
func TestSecrets(t *testing.T) {
	requireCloudHV(t)
	address := freeAddress(t)
	n := poolNode(t, map[string]any{"min": 1, "max": 2}, func(o *testnode.Options) { o.Metrics, o.Debug = address, true })
	img, err := testimage.Helper(suite.helper)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.HelperRef, img))
	require.NoError(t, n.AwaitSnapshot(testContext(t)))
	ours, others := newSecrets(testnode.CloudHV), newSecrets(testnode.RunC)
	p := ours.give(t, n, testnode.CloudHV)
	compared := slices.Contains(suite.handlers, testnode.RunC)
	if compared {
		others.give(t, n, testnode.RunC)
	} else {
		t.Log("NOT TESTED: containerd's log, as E2E_HANDLERS leaves out runc, by which it is known what is CRI's own")
	}
	neighbour := podBy(t, n, testnode.CloudHV)
	neighbour.idle("neighbour").exec("true")
	require.NoError(t, n.AwaitPool(testContext(t), 1))
	asks(t, &container{pod: neighbour})

	if compared {
		upstream := messages(t, n, others)
		for message, ways := range messages(t, n, ours) {
			assert.Subset(t, upstream[message], ways, "containerd's log: %s", message)
		}
	}
	own := filepath.Dir(p.info().VMMLog)
	disk, err := filepath.EvalSymlinks(ownDisk(t, p))
	require.NoError(t, err)
	// The pod's own disk has what its containers wrote.
	nowhere(t, ours, n.StateDir(), "")
	nowhere(t, ours, n.CacheDir(), disk)
	t.Logf("looked at %s, %s and what is beside %s", n.StateDir(), own, disk)
	assert.Empty(t, ours.in(metricsText(t, address)), "metrics")
	for _, args := range [][]string{{"status"}, {"vms"}, {"-o", "json", "vms"}} {
		out, _, err := n.Ctl(testContext(t), args...)
		require.NoError(t, err)
		assert.Empty(t, ours.in([]byte(out)), "cloudhvctl %v", args)
	}
	for _, pid := range []int{p.info().VMMPid, p.info().ShimPid} {
		for _, name := range []string{"cmdline", "environ"} {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
			require.NoError(t, err)
			assert.Empty(t, ours.in(text), "%s of process %d", name, pid)
		}
	}
	for _, file := range []string{"/kept", "/proc/1/environ", "/proc/mounts"} {
		out, _, _, err := n.ExecSync(testContext(t), neighbour.idle("reader"+strings.ReplaceAll(file, "/", "-")).id, "/bin/sh", "-c", "cat "+file+" 2>&1 || true")
		require.NoError(t, err)
		assert.Empty(t, ours.in([]byte(out)), "%s in another pod", file)
	}
}

// ownDisk is the file of a pod's writable disk, which its VMM has open.
func ownDisk(t *testing.T, p *pod) string {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.info().VMMPid))
	require.NoError(t, err)
	for _, f := range files {
		to, err := os.Readlink(f)
		if err == nil && (strings.Contains(to, "/pool/") || strings.Contains(to, "/scratch/")) {
			return to
		}
	}
	require.Fail(t, "the VMM has no disk open")
	return ""
}

// nowhere looks for secrets in all files below a directory, but for one.
func nowhere(t *testing.T, s secrets, dir, but string) {
	t.Helper()
	looked := 0
	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || path == but {
			return err
		}
		looked++
		ways, err := s.inFile(path)
		assert.Empty(t, ways, path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // of another pod, that has ended
		}
		return err
	}))
	require.NotZero(t, looked, dir)
}

// inFile is in for a file, of which the holes are not read.
func (s secrets) inFile(path string) (ways []string, _ error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const overlap = 256
	buf := make([]byte, 4<<20)
	for at := int64(0); ; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ESPIPE) {
			return ways, nil // a mounted namespace has no bytes
		}
		if err != nil {
			return ways, err
		}
		n, err := f.ReadAt(buf, data)
		ways = append(ways, s.in(buf[:n])...)
		if errors.Is(err, io.EOF) {
			return ways, nil
		}
		if err != nil {
			return ways, err
		}
		at = data + int64(n) - overlap
	}
}

// messages are those of containerd's log in which secrets are, without what differs from
// line to line, and the ways of the secrets in each.
func messages(t *testing.T, n *testnode.Node, s secrets) map[string][]string {
	t.Helper()
	text, err := os.ReadFile(n.LogPath())
	require.NoError(t, err)
	found := map[string][]string{}
	for line := range bytes.Lines(text) {
		if ways := s.in(line); len(ways) > 0 {
			message := messageStart.FindString(string(line))
			found[message] = append(found[message], ways...)
		}
	}
	for message, ways := range found {
		slices.Sort(ways)
		found[message] = slices.Compact(ways)
	}
	return found
}

// messageStart is a message up to its first value.
var messageStart = regexp.MustCompile(`msg="?[A-Za-z ]*`)

func metricsText(t *testing.T, address string) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(testContext(t), http.MethodGet, "http://"+address+"/v1/metrics", nil)
	require.NoError(t, err)
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Contains(t, string(text), "containerd_cloudhv_")
	return text
}
