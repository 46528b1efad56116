// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

func TestCgroupPath(t *testing.T) {
	t.Parallel()
	for parent, want := range map[string]string{
		"":                                  "/cloudhv/cloudhv-x",
		"/kubepods/burstable/pod1":          "/kubepods/burstable/pod1/cloudhv-x",
		"kubepods/pod1":                     "/kubepods/pod1/cloudhv-x",
		"system.slice":                      "/system.slice/cloudhv-x",
		"kubepods-burstable-p1.slice":       "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-p1.slice/cloudhv-x",
		"/kubepods.slice/kubepods-p1.slice": "/kubepods.slice/kubepods-p1.slice/cloudhv-x",
		"../../etc":                         "/etc/cloudhv-x",
	} {
		require.Equal(t, want, cgroupPath("/cloudhv", parent, "x"), parent)
	}
}

// The files are those that CRI makes for its own pods.
func TestPodFiles(t *testing.T) {
	t.Parallel()
	c := New(Options{Settings: &config.Settings{UnprivilegedPorts: true}})
	s, err := c.podFiles(&runtime.PodSandboxConfig{
		DnsConfig: &runtime.DNSConfig{Servers: []string{"1.1.1.1", "::1"}, Searches: []string{"a.b", "c"}, Options: []string{"ndots:5"}},
		Linux:     &runtime.LinuxPodSandboxConfig{Sysctls: map[string]string{"kernel.x": "1"}},
	})
	require.NoError(t, err)
	hostname, err := os.Hostname()
	require.NoError(t, err)
	require.Equal(t, hostname, s.hostname)
	require.Equal(t, "search a.b c\nnameserver 1.1.1.1\nnameserver ::1\noptions ndots:5\n", string(s.resolvConf))
	require.Equal(t, map[string]string{"kernel.x": "1", "net.ipv4.ip_unprivileged_port_start": "0"}, s.sysctls)
	hosts, err := os.ReadFile(etcHosts)
	require.NoError(t, err)
	require.Equal(t, string(hosts), string(s.hosts))

	s, err = c.podFiles(&runtime.PodSandboxConfig{
		Hostname: "h", Linux: &runtime.LinuxPodSandboxConfig{Sysctls: map[string]string{"net.ipv4.ip_unprivileged_port_start": "80"}},
	})
	require.NoError(t, err)
	require.Equal(t, "h", s.hostname)
	require.Equal(t, "80", s.sysctls["net.ipv4.ip_unprivileged_port_start"])
	resolv, err := os.ReadFile(etcResolvConf)
	require.NoError(t, err)
	require.Equal(t, string(resolv), string(s.resolvConf))

	c = New(Options{Settings: &config.Settings{UnprivilegedICMP: true}})
	for _, pc := range []*runtime.PodSandboxConfig{{}, usernsPod(&runtime.UserNamespace{
		Mode: runtime.NamespaceMode_POD, Uids: []*runtime.IDMapping{{HostId: 65536, Length: 1}}, Gids: []*runtime.IDMapping{{HostId: 65536, Length: 1}},
	})} {
		s, err = c.podFiles(pc)
		require.NoError(t, err)
		require.Equal(t, s.userns == nil, s.sysctls["net.ipv4.ping_group_range"] != "", "as many groups has no user namespace")
	}

	missing, err := readHostFile(filepath.Join(t.TempDir(), "none"))
	require.NoError(t, err)
	require.Empty(t, missing)
	large := filepath.Join(t.TempDir(), "large")
	require.NoError(t, os.WriteFile(large, make([]byte, maxHostFile+1), 0o600))
	_, err = readHostFile(large)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
}

func TestPrintable(t *testing.T) {
	t.Parallel()
	require.Equal(t, "abc", printable("abc", 10))
	require.Equal(t, "ab", printable("abc", 2))
	require.Equal(t, "a?[2J?", printable("a\x1b[2J\n", 10))
	require.Equal(t, "?x", printable("\xffx", 10))
	require.Len(t, printable(strings.Repeat("x", 1000), 100), 100)
}

func FuzzPrintable(f *testing.F) {
	f.Add("a\x00\xff\u202e", 3)
	f.Fuzz(func(t *testing.T, s string, limit int) {
		limit = min(max(limit, 0), 4096)
		got := printable(s, limit)
		if strings.ContainsFunc(got, func(r rune) bool { return r < ' ' || r == 0x7f }) || len(got) > 3*limit {
			t.Fatalf("%q", got)
		}
	})
}

func TestAttachRootFSOnceAVM(t *testing.T) {
	n := newNode(t)
	for i := range 6 {
		n.containers.sandbox[fmt.Sprint("c", i)] = "a"
	}
	n.containers.sandbox["d"] = "a"
	n.run("a")
	var wg sync.WaitGroup
	serials := make([]string, 6)
	for i := range serials {
		wg.Go(func() {
			resp, err := n.HostService().AttachRootFS(n.ctx(), &hostv1.AttachRootFSRequest{SandboxId: "a", ContainerId: fmt.Sprint("c", i)})
			if err != nil {
				t.Error(err)
				return
			}
			serials[i] = resp.GetImageSerial()
		})
	}
	wg.Wait()
	for _, s := range serials {
		require.Equal(t, "image-of-c", s)
	}
	_, err := n.attachRootFS(n.ctx(), "a", "d")
	require.NoError(t, err)
	require.Equal(t, map[string]int{"image-of-c": 1, "image-of-d": 1}, n.driver.only(t).disks)
	require.Equal(t, map[string]int{"image-of-c": 1, "image-of-d": 1}, n.images.pins)
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}

// The guest finds the first image by another serial than its own, and its containers are
// told that one for as long as the VM lives.
func TestAttachRootFSInTheImageDisk(t *testing.T) {
	n := newNode(t)
	n.driver.vm.imageDisk = true
	for _, c := range []string{"c1", "c2", "d"} {
		n.containers.sandbox[c] = "a"
	}
	p := n.run("a")
	want := map[string]string{"c1": vmm.ImageSerial, "d": "image-of-d", "c2": vmm.ImageSerial}
	attach := func() {
		t.Helper()
		for _, c := range []string{"c1", "d", "c2"} {
			serial, err := n.attachRootFS(n.ctx(), "a", c)
			require.NoError(t, err)
			require.Equal(t, want[c], serial, c)
		}
	}
	attach()
	n.restart()
	attach()
	require.Equal(t, map[string]int{"image-of-c": 1, "image-of-d": 1}, n.driver.only(t).disks)

	// An earlier containerd ended while the first was unplugged and the second plugged.
	require.NoError(t, p.handle().RemoveDisk(n.ctx(), "image-of-c"))
	rewrite(n, "a", func(r *record) { r.Images = map[string]bool{"image-of-c": false, "image-of-d": false} })
	n.restart()
	want["d"], want["c1"], want["c2"] = vmm.ImageSerial, "image-of-c", "image-of-c"
	for _, c := range []string{"d", "c1", "c2"} {
		serial, err := n.attachRootFS(n.ctx(), "a", c)
		require.NoError(t, err)
		require.Equal(t, want[c], serial, c)
	}
}

func TestAttachRootFSThatFails(t *testing.T) {
	n := newNode(t)
	n.containers.sandbox["c1"] = "a"
	n.containers.sandbox["x1"] = "other"
	attach := func(sandbox, container string) error {
		_, err := n.HostService().AttachRootFS(n.ctx(), &hostv1.AttachRootFSRequest{SandboxId: sandbox, ContainerId: container})
		return errgrpc.ToNative(err)
	}
	require.ErrorIs(t, attach("a", "c1"), errdefs.ErrNotFound)
	require.NoError(t, n.create("a"))
	require.ErrorIs(t, attach("a", "c1"), errdefs.ErrUnavailable)
	_, err := n.Start(n.ctx(), "a")
	require.NoError(t, err)
	require.ErrorIs(t, attach("a", "nobody"), errdefs.ErrNotFound)
	require.ErrorIs(t, attach("a", "x1"), errdefs.ErrInvalidArgument)
	n.images.err = errdefs.ErrNotImplemented
	require.ErrorIs(t, attach("a", "c1"), errdefs.ErrNotImplemented)
	n.images.err = nil
	n.driver.vm.disk = errInjected
	require.ErrorIs(t, attach("a", "c1"), errdefs.ErrResourceExhausted)
	require.Empty(t, n.images.pins)
	n.driver.vm.disk = nil
	require.NoError(t, attach("a", "c1"))
	n.driver.only(t).die("x", false)
	_, err = n.Wait(n.ctx(), "a")
	require.NoError(t, err)
	require.ErrorIs(t, attach("a", "c1"), errdefs.ErrUnavailable)
}

// As long as the VM may have the disk its file has to stay.
func TestAttachRootFSThatMayHaveWorked(t *testing.T) {
	n := newNode(t)
	n.containers.sandbox["c1"] = "a"
	p := n.run("a")
	m := n.driver.only(t)
	pinned := map[string]int{"image-of-c": 1}
	n.driver.vm.disk, n.driver.vm.diskStays = fmt.Errorf("device_add: %w", context.DeadlineExceeded), true
	_, err := n.attachRootFS(n.ctx(), "a", "c1")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Equal(t, pinned, n.images.pins)
	require.Equal(t, map[string]bool{"image-of-c": false}, p.snapshot().Images)

	n.driver.vm.disk, n.driver.vm.unplug = nil, errInjected
	_, err = n.attachRootFS(n.ctx(), "a", "c1")
	require.ErrorIs(t, err, errInjected, "it cannot be unplugged, so it is not plugged in again")
	require.Equal(t, pinned, n.images.pins)
	n.restart()
	require.Equal(t, pinned, n.images.pins, "nor does another containerd forget it")

	n.driver.vm.unplug, n.driver.vm.disk, n.driver.vm.diskStays = nil, errInjected, false
	_, err = n.attachRootFS(n.ctx(), "a", "c1")
	require.ErrorIs(t, err, errInjected)
	require.Empty(t, m.disks)
	require.Empty(t, n.images.pins, "it is known now that the VM has no such disk")

	n.driver.vm.disk = nil
	_, err = n.attachRootFS(n.ctx(), "a", "c1")
	require.NoError(t, err)
	require.Equal(t, map[string]int{"image-of-c": 1}, m.disks)
	require.Equal(t, pinned, n.images.pins)
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}

// An earlier containerd may have ended between the plugging and its record.
func TestAttachRootFSAfterACrash(t *testing.T) {
	n := newNode(t)
	n.containers.sandbox["c1"] = "a"
	n.run("a")
	_, err := n.attachRootFS(n.ctx(), "a", "c1")
	require.NoError(t, err)
	rewrite(n, "a", func(r *record) { r.Images = map[string]bool{"image-of-c": false} })
	n.restart()
	serial, err := n.attachRootFS(n.ctx(), "a", "c1")
	require.NoError(t, err)
	require.Equal(t, "image-of-c", serial)
	require.Equal(t, map[string]int{"image-of-c": 1}, n.driver.only(t).disks)
	require.Equal(t, map[string]int{"image-of-c": 1}, n.images.pins)
}

func TestScratchDisks(t *testing.T) {
	t.Parallel()
	s := newScratchStore(t.TempDir(), 64<<20)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			if err := s.make(t.Context(), s.path(fmt.Sprint(i))); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	template, err := os.ReadFile(s.templatePath())
	require.NoError(t, err)
	require.Len(t, template, 64<<20)
	for i := range 4 {
		disk, err := os.ReadFile(s.path(fmt.Sprint(i)))
		require.NoError(t, err)
		require.True(t, string(disk) == string(template), "a copy")
		var st unix.Stat_t
		require.NoError(t, unix.Stat(s.path(fmt.Sprint(i)), &st))
		require.Less(t, st.Blocks*512, int64(8<<20), "sparse")
	}
	require.Error(t, s.make(t.Context(), s.path("0")), "never onto another's disk")
	require.FileExists(t, s.path("0"))
	require.NoError(t, removeScratch(s.path("0")))
	require.NoError(t, removeScratch(s.path("0")))
	require.NoError(t, removeScratch(""))
}
