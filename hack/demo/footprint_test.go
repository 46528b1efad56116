// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// testSite is a site in temporary directories.
func testSite(t *testing.T) site {
	t.Helper()
	s := site{dir: filepath.Join(t.TempDir(), "node"), tag: "chv-looktest", procfs: "/proc", cgroups: t.TempDir(), cni: t.TempDir(), loops: t.TempDir()}
	require.NoError(t, os.Mkdir(s.dir, 0o755))
	return s
}

func write(t *testing.T, content string, elem ...string) string {
	t.Helper()
	path := filepath.Join(elem...)
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
	return path
}

// privateNetwork moves the test to a network namespace of its own.
func privateNetwork(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("root is needed")
	}
	// Not unlocked: the thread ends with the test, and the namespace with it.
	runtime.LockOSThread()
	require.NoError(t, unix.Unshare(unix.CLONE_NEWNET))
}

func TestLookFindsFiles(t *testing.T) {
	t.Parallel()
	s := testSite(t)
	cgroup := filepath.Join(s.cgroups, "cpu", s.tag, "pod")
	require.NoError(t, os.MkdirAll(cgroup, 0o755))
	cached := write(t, "{}", s.cni, s.tag+"-pod-eth0")
	write(t, "{}", s.cni, "another-pod-eth0")
	backing := s.dir + "/x (deleted)"
	write(t, backing+"\n", s.loops, "loop7", "loop", "backing_file")
	record := write(t, "", s.dir, "record.json")
	f, err := s.look(nil)
	require.NoError(t, err)
	require.Equal(t, []string{filepath.Dir(cgroup), cgroup}, f.names("cgroup"))
	require.Equal(t, []string{cached}, f.names("CNI cache entry"))
	require.Equal(t, []string{backing}, f.names("loop device"))
	require.Equal(t, []string{s.dir, record}, f.names("file"))
	require.Len(t, left(footprint{}, f), 6+len(f["directory elsewhere"]))
	require.Len(t, left(f, f), 6, "a directory elsewhere may have been there before, and nothing else")
	require.Regexp(t, `CNI cache entry +0 +1 +1\n`, footprints(footprint{}, f, f))
	require.Regexp(t, `directory elsewhere +0 +0 +0\n`, footprints(f, f, f))
}

func TestLookFindsMounts(t *testing.T) {
	t.Parallel()
	privateNetwork(t)
	s := testSite(t)
	tmpfs, netns := filepath.Join(s.dir, "m"), write(t, "", s.dir, "ns")
	require.NoError(t, os.Mkdir(tmpfs, 0o755))
	require.NoError(t, unix.Mount("none", tmpfs, "tmpfs", 0, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(tmpfs, 0)) })
	require.NoError(t, unix.Mount("/proc/thread-self/ns/net", netns, "", unix.MS_BIND, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(netns, 0)) })
	write(t, "", tmpfs, "inside")
	f, err := s.look(nil)
	require.NoError(t, err)
	require.Equal(t, []string{"tmpfs on " + tmpfs}, f.names("mount"))
	require.Equal(t, []string{netns}, f.names("network namespace"))
	require.NotContains(t, f.names("file"), filepath.Join(tmpfs, "inside"))
}

// A port is found again when its bridge has gone.
func TestLookFindsLinks(t *testing.T) {
	t.Parallel()
	privateNetwork(t)
	s := testSite(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = s.tag
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	require.NoError(t, netlink.LinkAdd(bridge))
	attrs.Name = "port"
	port := &netlink.Veth{LinkAttrs: attrs, PeerName: "another"}
	require.NoError(t, netlink.LinkAdd(port))
	require.NoError(t, netlink.LinkSetMaster(port, bridge))
	during, err := s.look(nil)
	require.NoError(t, err)
	require.Len(t, during["bridge and its ports"], 2)

	require.NoError(t, netlink.LinkDel(bridge))
	after, err := s.look(nil)
	require.NoError(t, err)
	require.Empty(t, after["bridge and its ports"])
	after, err = s.look(during)
	require.NoError(t, err)
	require.Len(t, after["bridge and its ports"], 1)
	require.NoError(t, netlink.LinkDel(port))
	after, err = s.look(during)
	require.NoError(t, err)
	require.Empty(t, after["bridge and its ports"])
}

// A process is the node's by its command line if it is a program of ours, and
// once found it is found by its pid and start time.
func TestLookFindsProcesses(t *testing.T) {
	t.Parallel()
	s := testSite(t)
	sleep, err := exec.LookPath("sleep")
	require.NoError(t, err)
	program, err := os.ReadFile(sleep)
	require.NoError(t, err)
	path := filepath.Join(s.dir, "containerd-like")
	require.NoError(t, os.WriteFile(path, program, 0o700))
	cmd := exec.Command(path, "1000")
	require.NoError(t, cmd.Start())
	other := exec.Command("sleep", "1000")
	other.Args[0] = s.dir + "/sleep"
	require.NoError(t, other.Start())
	t.Cleanup(func() {
		_, _ = other.Process.Kill(), other.Wait()
		_, _ = cmd.Process.Kill(), cmd.Wait()
	})
	during, err := s.look(nil)
	require.NoError(t, err)
	require.Len(t, during["process"], 1)
	require.True(t, strings.HasPrefix(during.names("process")[0], "containerd-like, pid "), during.names("process"))

	elsewhere := s
	elsewhere.dir = t.TempDir()
	after, err := elsewhere.look(during)
	require.NoError(t, err)
	require.Equal(t, during["process"], after["process"])
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	after, err = s.look(during)
	require.NoError(t, err)
	require.Empty(t, after["process"])
}
