// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// cniCache is where libcni keeps its results; containerd offers no other place.
const cniCache = cniDir + "/results"

// cniDir is libcni's own directory.
const cniDir = "/var/lib/cni"

// cgroupRoot is where cgroup hierarchies are mounted.
const cgroupRoot = "/sys/fs/cgroup"

// ourPrograms are the prefixes of programs that a node may have started.
var ourPrograms = []string{"containerd", "qemu-system", "cloud-hypervisor", "runc", "mkfs.", "crictl", "cloudhv", "ginkgo", "critest"}

// Close removes all pods, ends containerd and deletes everything that the node
// has made. What pods left behind is removed too: look at it before, with Census.
func (n *Node) Close(ctx context.Context) error {
	var errs []error
	if n.Pid() != 0 {
		errs = append(errs, n.RemoveAllPods(ctx), n.Stop(ctx))
	}
	n.mu.Lock()
	if n.conn != nil {
		errs = append(errs, n.ctrd.Close())
		n.conn, n.ctrd = nil, nil
	}
	n.mu.Unlock()
	errs = append(errs, n.sweep(ctx), os.RemoveAll(n.dir), n.lock.Close())
	if filepath.Dir(n.dir) == BaseDir {
		// Fails, as it should, while other nodes exist.
		_ = unix.Rmdir(BaseDir)
	}
	if n.ownCNI {
		// Fail, as they should, if somebody else uses them by now.
		_, _ = unix.Rmdir(cniCache), unix.Rmdir(cniDir)
	}
	return errors.Join(errs...)
}

// sweep ends the node's processes and removes all but the directory itself and
// the lock. It is for a node whose containerd has ended, maybe long ago.
func (n *Node) sweep(ctx context.Context) error {
	ctx, cancel := limited(ctx)
	defer cancel()
	errs := []error{Eventually(ctx, n.killProcesses), n.unmountAll(), n.closeFirewall(), n.RemoveChains(), n.removeBridges(), Eventually(ctx, n.removeCgroups)}
	caches, err := n.cniResults()
	errs = append(errs, err)
	for _, f := range caches {
		errs = append(errs, os.Remove(f))
	}
	entries, err := os.ReadDir(n.dir)
	errs = append(errs, err)
	for _, e := range entries {
		if e.Name() != lockFile {
			errs = append(errs, os.RemoveAll(filepath.Join(n.dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// killProcesses kills the node's processes and fails while there are any.
func (n *Node) killProcesses(context.Context) error {
	procs, err := n.processes()
	if err != nil {
		return err
	}
	var left []string
	for _, p := range procs {
		if p.zombie {
			continue
		}
		left = append(left, fmt.Sprintf("%s (%d)", p.name, p.pid))
		fd, err := unix.PidfdOpen(p.pid, 0)
		if err != nil {
			continue // it has ended
		}
		// Sending may fail for one that has just ended.
		_ = unix.PidfdSendSignal(fd, syscall.SIGKILL, nil, 0)
		unix.Close(fd)
	}
	if len(left) > 0 {
		return fmt.Errorf("processes are left: %s: %w", strings.Join(left, ", "), errdefs.ErrUnavailable)
	}
	return nil
}

func (n *Node) mounts() ([]*mountinfo.Info, error) { return mountsBelow(n.dir) }

func mountsBelow(dir string) ([]*mountinfo.Info, error) {
	ms, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, fmt.Errorf("listing mounts: %w", err)
	}
	return ms, nil
}

func (n *Node) unmountAll() error { return UnmountBelow(n.dir) }

// UnmountBelow unmounts all that is mounted at a directory of a node's or below it, the
// last first.
func UnmountBelow(dir string) error {
	ms, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	slices.SortFunc(ms, func(a, b *mountinfo.Info) int { return cmp.Compare(b.ID, a.ID) })
	var errs []error
	for _, m := range ms {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, fmt.Errorf("unmounting %s: %w", m.Mountpoint, err))
		}
	}
	return errors.Join(errs...)
}

// cgroups lists the node's cgroup directories in all hierarchies, parents first.
func (n *Node) cgroups() ([]string, error) {
	var dirs []string
	err := filepath.WalkDir(cgroupRoot, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
			return nil // removed meanwhile
		}
		if err != nil {
			return err
		}
		if d.IsDir() && slices.Contains(strings.Split(path, "/"), "chv-"+n.opts.Name) {
			dirs = append(dirs, path)
		}
		return nil
	})
	return dirs, err
}

func (n *Node) removeCgroups(context.Context) error {
	dirs, err := n.cgroups()
	errs := []error{err}
	for _, d := range slices.Backward(dirs) {
		if err := unix.Rmdir(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("removing cgroup %s: %w", d, err))
		}
	}
	return errors.Join(errs...)
}

// proc is a process of the node.
type proc struct {
	pid    int
	name   string
	zombie bool
	// args is the command line, joined by spaces.
	args string
}

// processes lists those whose command line names the node's directory, whose
// cgroup is one of the node's pods, and containerd's children; but not
// containerd itself while the node runs it.
func (n *Node) processes() ([]proc, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	self := n.Pid()
	var ps []proc
	for _, e := range entries {
		var pid int
		if _, err := fmt.Sscanf(e.Name(), "%d", &pid); err != nil || pid == self || pid == os.Getpid() {
			continue
		}
		if p, ok := n.inspect(pid, self); ok {
			ps = append(ps, p)
		}
	}
	return ps, nil
}

// Processes are the pids of the node's processes whose names begin so, but not those
// that have ended.
func (n *Node) Processes(prefixes ...string) ([]int, error) {
	all, err := n.processes()
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, p := range all {
		if !p.zombie && slices.ContainsFunc(prefixes, func(s string) bool { return strings.HasPrefix(p.name, s) }) {
			pids = append(pids, p.pid)
		}
	}
	return pids, nil
}

// inspect tells whether a process is the node's. One that has ended is not.
func (n *Node) inspect(pid, containerdPid int) (proc, bool) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	stat, err := os.ReadFile(dir + "stat")
	if err != nil {
		return proc{}, false
	}
	cmdline, _ := os.ReadFile(dir + "cmdline")
	cgroup, _ := os.ReadFile(dir + "cgroup")
	open, end := strings.IndexByte(string(stat), '('), strings.LastIndexByte(string(stat), ')')
	if open < 0 || end < open {
		return proc{}, false
	}
	p := proc{pid: pid, name: string(stat[open+1 : end]), args: strings.ReplaceAll(string(cmdline), "\x00", " ")}
	fields := strings.Fields(string(stat[end+1:]))
	p.zombie = len(fields) > 0 && fields[0] == "Z"
	if containerdPid != 0 && len(fields) > 1 && fields[1] == fmt.Sprint(containerdPid) {
		return p, true
	}
	if slices.ContainsFunc(strings.FieldsFunc(string(cgroup), func(r rune) bool { return r == '/' || r == '\n' }), func(s string) bool { return s == "chv-"+n.opts.Name }) {
		return p, true
	}
	return p, strings.Contains(p.args, n.dir+"/") && slices.ContainsFunc(ourPrograms, func(s string) bool { return strings.HasPrefix(p.name, s) })
}

// Kill9 sends a process SIGKILL and returns when it has ended.
func Kill9(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	defer f.Close()
	if err := unix.PidfdSendSignal(fd, syscall.SIGKILL, nil, 0); err != nil {
		return fmt.Errorf("killing process %d: %w", pid, err)
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(Scale(callLimit))
	}
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		k, err := unix.Poll(fds, int(time.Until(deadline).Milliseconds()))
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("waiting for process %d: %w", pid, err)
		case k == 0:
			return fmt.Errorf("process %d after SIGKILL: %w", pid, context.DeadlineExceeded)
		}
		return nil
	}
}
