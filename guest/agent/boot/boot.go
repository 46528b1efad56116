// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package boot turns the bare machine that the kernel hands to its first process
// into one that containers can run in: mounts, device nodes, limits, loopback.
// It makes few system calls and starts no process, because each boot pays.
package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/cgroup"
)

// mount is one of the kernel's file systems.
type mount struct {
	fstype, target string
	flags          uintptr
	data           string
	// optional mounts may fail: what they serve is then missing, nothing else.
	optional bool
}

const secure = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// mounts are made in this order. The root file system is read-only and has the
// mount points that are not below another one here.
var mounts = []mount{
	{fstype: "proc", target: "/proc", flags: secure},
	{fstype: "sysfs", target: "/sys", flags: secure},
	{fstype: "devtmpfs", target: "/dev", flags: unix.MS_NOSUID, data: "mode=0755"},
	{fstype: "devpts", target: "/dev/pts", flags: unix.MS_NOSUID | unix.MS_NOEXEC, data: "newinstance,ptmxmode=0666,mode=0620,gid=5"},
	{fstype: "mqueue", target: "/dev/mqueue", flags: secure},
	{fstype: "tmpfs", target: "/run", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=0755"},
	{fstype: "tmpfs", target: "/tmp", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=1777"},
	{fstype: "cgroup2", target: cgroup.Mountpoint, flags: secure, data: "nsdelegate,memory_recursiveprot"},
	{fstype: "securityfs", target: "/sys/kernel/security", flags: secure, optional: true},
}

// links are what programs expect in /dev and the kernel does not make.
var links = [][2]string{
	{"/proc/self/fd", "/dev/fd"},
	{"/proc/self/fd/0", "/dev/stdin"},
	{"/proc/self/fd/1", "/dev/stdout"},
	{"/proc/self/fd/2", "/dev/stderr"},
	{"pts/ptmx", "/dev/ptmx"},
}

// Machine makes the mounts and sets the limits. It is for PID 1 of a VM only.
func Machine(ctx context.Context) error {
	if err := mountAll(mounts); err != nil {
		return err
	}
	// Another /dev/ptmx belongs to no instance of devpts.
	_ = os.Remove("/dev/ptmx")
	for _, l := range links {
		if err := os.Symlink(l[0], l[1]); err != nil {
			log.G(ctx).WithError(err).Warn("cannot make a link in /dev")
		}
	}
	if err := cgroups(); err != nil {
		return err
	}
	// What follows is wanted, but a VM without it still runs pods.
	err := errors.Join(limits(), LoopbackUp(), unix.Sethostname([]byte("localhost")))
	if err != nil {
		log.G(ctx).WithError(err).Warn("boot is incomplete")
	}
	return nil
}

// PodCgroup is the path, below the hierarchy's root, of the parent of all
// containers' cgroups.
const PodCgroup = "pod"

// cgroups makes controllers available to containers. crun would do the same at
// the pod's first container, but it takes grace periods of RCU, and here nobody
// waits for them yet.
func cgroups() error {
	root := cgroup.Group(cgroup.Mountpoint)
	pod := root + "/" + PodCgroup
	if err := root.EnableControllers(); err != nil {
		return fmt.Errorf("enable cgroup controllers: %w", err)
	}
	if err := os.Mkdir(string(pod), 0o755); err != nil {
		return fmt.Errorf("make the pod's cgroup: %w", err)
	}
	if err := pod.EnableControllers(); err != nil {
		return fmt.Errorf("enable the pod's cgroup controllers: %w", err)
	}
	return nil
}

// Preload asks the kernel to read a file into memory, and does not wait for it.
func Preload(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("preload: %w", err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_WILLNEED); err != nil {
		return fmt.Errorf("preload %s: %w", path, err)
	}
	return nil
}

func mountAll(all []mount) error {
	for _, m := range all {
		err := mountOne(m)
		if err != nil && !m.optional {
			return err
		}
	}
	return nil
}

func mountOne(m mount) error {
	err := unix.Mount(m.fstype, m.target, m.fstype, m.flags, m.data)
	if errors.Is(err, unix.ENOENT) {
		if err := os.Mkdir(m.target, 0o755); err != nil {
			return fmt.Errorf("mount point: %w", err)
		}
		err = unix.Mount(m.fstype, m.target, m.fstype, m.flags, m.data)
	}
	// The kernel may have mounted devtmpfs already.
	if err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s at %s: %w", m.fstype, m.target, err)
	}
	return nil
}

const (
	// maxFiles is what containers see as the limit of open files under containerd.
	maxFiles = 1 << 20
	// maxSignals replaces a limit that the kernel derives from RAM at boot.
	maxSignals = 1 << 16
)

// limits are inherited by containers. The kernel derives several from the RAM at
// boot, which is little, and more of it is plugged later.
func limits() error {
	var errs []error
	for _, l := range []struct {
		resource int
		value    uint64
	}{
		{unix.RLIMIT_NOFILE, maxFiles},
		{unix.RLIMIT_NPROC, unix.RLIM_INFINITY},
		{unix.RLIMIT_SIGPENDING, maxSignals},
	} {
		if err := unix.Setrlimit(l.resource, &unix.Rlimit{Cur: l.value, Max: l.value}); err != nil {
			errs = append(errs, fmt.Errorf("set resource limit %d: %w", l.resource, err))
		}
	}
	return errors.Join(errs...)
}

// LoopbackUp sets lo's flag; the kernel gives it its addresses by itself.
func LoopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	defer func() { _ = unix.Close(s) }()
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}

// Uptime is the time since the kernel started.
func Uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// ScaleLimits adapts what the kernel derived from its RAM at boot to the RAM
// there is now: threads and open files in the whole VM, and the buffers of TCP
// and UDP, by the kernel's own formulas.
func ScaleLimits(memoryBytes uint64) error {
	const page, threadBytes = 4096, 16 << 10
	pages := memoryBytes / page
	tcp, udp := max(pages/16, 128), max(pages/8, 128)
	var errs []error
	for _, s := range []struct{ path, value string }{
		{"kernel/threads-max", strconv.FormatUint(max(memoryBytes/(threadBytes*8), 4096), 10)},
		{"fs/file-max", strconv.FormatUint(max(memoryBytes/10240, 1<<16), 10)},
		{"net/ipv4/tcp_mem", fmt.Sprintf("%d %d %d", tcp/4*3, tcp, tcp/4*3*2)},
		{"net/ipv4/udp_mem", fmt.Sprintf("%d %d %d", udp/4*3, udp, udp/4*3*2)},
	} {
		if err := os.WriteFile(filepath.Join("/proc/sys", s.path), []byte(s.value), 0); err != nil {
			errs = append(errs, fmt.Errorf("scale limits: %w", err))
		}
	}
	return errors.Join(errs...)
}
