// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package volumes

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/controller/shim/ninep"
)

// idMap says whom the files of an ID-mapped mount belong to: an owner that the file system
// has as ContainerID is HostID there, and so in the VM. A set has one for all mounts with
// the same mappings.
type idMap struct {
	// userns is a user namespace with these mappings, by which the kernel takes them.
	userns *os.File
	// maker is one whom the file system knows.
	maker ninep.Maker
}

// idMapOf finds or makes a mount's, nil for a mount without.
func (s *Set) idMapOf(m *specs.Mount) (*idMap, error) {
	if len(m.UIDMappings) == 0 || len(m.GIDMappings) == 0 {
		return nil, nil
	}
	name := fmt.Sprint(m.UIDMappings, m.GIDMappings)
	if ids := s.maps[name]; ids != nil {
		return ids, nil
	}
	userns, err := newUserNamespace(m.UIDMappings, m.GIDMappings)
	if err != nil {
		return nil, fmt.Errorf("its mappings %s are not what the kernel takes: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	ids := &idMap{userns: userns, maker: ninep.Maker{UID: m.UIDMappings[0].HostID, GID: m.GIDMappings[0].HostID}}
	s.maps[name] = ids
	return ids, nil
}

// newUserNamespace makes a user namespace that nobody is in.
func newUserNamespace(uids, gids []specs.LinuxIDMapping) (*os.File, error) {
	// The thread that starts the process is the one that traces it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// It stops before it runs, as it is traced.
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"cloudhv-userns"}, &syscall.ProcAttr{
		Sys: &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWUSER, Ptrace: true, Pdeathsig: syscall.SIGKILL,
			UidMappings: processMap(uids), GidMappings: processMap(gids),
		},
	})
	if err != nil {
		return nil, fmt.Errorf("make a user namespace: %w", err)
	}
	defer func() {
		_ = unix.Kill(pid, unix.SIGKILL)
		for {
			var st unix.WaitStatus
			_, err := unix.Wait4(pid, &st, 0, nil)
			if err != unix.EINTR && (err != nil || !st.Stopped()) { //nolint:errorlint // a system call's own
				return
			}
		}
	}()
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
	if err != nil {
		return nil, fmt.Errorf("make a user namespace: %w", err)
	}
	return f, nil
}

func processMap(ids []specs.LinuxIDMapping) []syscall.SysProcIDMap {
	var out []syscall.SysProcIDMap
	for _, m := range ids {
		out = append(out, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
	}
	return out
}

// apply maps the IDs of a clone that is mounted nowhere, and not those of what is mounted
// below it.
func (m *idMap) apply(fd int, source string) error {
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(m.userns.Fd())}
	err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr)
	if err == unix.EINVAL { //nolint:errorlint // a system call's own
		return fmt.Errorf("it lies on %s, which has no ID-mapped mounts: want another file system for a pod with a user namespace: %w",
			fileSystem(source), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("map its IDs: %w", err)
	}
	return nil
}

// fileSystem is what the host calls the file system that a path lies on.
func fileSystem(path string) string {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID, &st); err != nil {
		return "a file system"
	}
	info, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return "a file system"
	}
	for line := range strings.Lines(string(info)) {
		before, after, _ := strings.Cut(line, " - ")
		id, _, _ := strings.Cut(before, " ")
		name, _, _ := strings.Cut(after, " ")
		if id == fmt.Sprint(st.Mnt_id) {
			return name
		}
	}
	return "a file system"
}
