// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package podns makes and holds the namespaces of a pod that has a user namespace of its
// own. Other pods need none: their containers are in the VM's.
//
// The user namespace owns a network, an IPC, a UTS and a PID namespace, all made with it
// by one process, package pause's. The first three outlive that process, as they are held
// here; the PID namespace, which is for containers that share theirs, ends with it.
package podns

import (
	"errors"
	"fmt"
	"math"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/pause"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/reap"
	"github.com/cloudhv/containerd-cloudhv/guest/api/thread"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// Namespaces are those of one pod. A nil *Namespaces stands for the VM's own; it has File,
// Spec, Check and Do only.
type Namespaces struct {
	uids, gids *guestv1.IDMapping

	user, net, ipc, uts *os.File

	mu       sync.Mutex
	pausePid int // 0 once it has ended
}

// Validate reports all that is wrong with a mapping.
func Validate(u *guestv1.UserNamespace) error {
	var errs []error
	for _, m := range []struct {
		name string
		ids  *guestv1.IDMapping
	}{{"uids", u.GetUids()}, {"gids", u.GetGids()}} {
		// The highest number means no ID.
		if m.ids.GetSize() == 0 || uint64(m.ids.GetFirst())+uint64(m.ids.GetSize()) > math.MaxUint32 {
			errs = append(errs, fmt.Errorf("user_namespace.%s: %d IDs from %d on: want at least one, and all below %d: %w",
				m.name, m.ids.GetSize(), m.ids.GetFirst(), uint32(math.MaxUint32), errdefs.ErrInvalidArgument))
		}
	}
	return errors.Join(errs...)
}

// New makes the namespaces. self is the path of this binary. They live as long as the
// machine.
func New(self string, reaper *reap.Reaper, u *guestv1.UserNamespace) (_ *Namespaces, retErr error) {
	if err := Validate(u); err != nil {
		return nil, err
	}
	n := &Namespaces{uids: u.GetUids(), gids: u.GetGids()}
	birth := reaper.Expect()
	defer birth.End()
	pid, err := pause.Start(self, &pause.IDs{
		UID: int(n.uids.GetFirst()), UIDs: int(n.uids.GetSize()),
		GID: int(n.gids.GetFirst()), GIDs: int(n.gids.GetSize()),
	})
	if err != nil {
		return nil, err
	}
	n.pausePid = pid
	birth.Watch(pid, func(reap.Exit) { n.pauseEnded() })
	defer func() {
		if retErr != nil {
			_ = unix.Kill(pid, unix.SIGKILL)
			n.close()
		}
	}()
	for _, ns := range []struct {
		name string
		to   **os.File
	}{{"user", &n.user}, {"net", &n.net}, {"ipc", &n.ipc}, {"uts", &n.uts}} {
		if *ns.to, err = os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, ns.name)); err != nil {
			return nil, fmt.Errorf("hold the pod's namespaces: %w", err)
		}
	}
	return n, nil
}

func (n *Namespaces) close() {
	for _, f := range []*os.File{n.user, n.net, n.ipc, n.uts} {
		if f != nil {
			_ = f.Close()
		}
	}
}

func (n *Namespaces) pauseEnded() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pausePid = 0
	log.L.Warn("the process that holds the pod's PID namespace has ended")
}

// PausePid is the first process of the PID namespace that the pod's containers may share.
func (n *Namespaces) PausePid() (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.pausePid == 0 {
		return 0, fmt.Errorf("the PID namespace that the pod's containers share has ended: %w", errdefs.ErrFailedPrecondition)
	}
	return n.pausePid, nil
}

// File is the user namespace, nil for the VM's own.
func (n *Namespaces) File() *os.File {
	if n == nil {
		return nil
	}
	return n.user
}

// NetworkFD is a descriptor of the network namespace.
func (n *Namespaces) NetworkFD() int { return int(n.net.Fd()) }

// Root is what the user namespace's user and group 0 are in the VM.
func (n *Namespaces) Root() (uid, gid int) {
	return int(n.uids.GetFirst()), int(n.gids.GetFirst())
}

// User is what a user of the user namespace is in the VM; false if it is not mapped.
func (n *Namespaces) User(id uint32) (uint32, bool) { return inVM(n.uids, id) }

// Group is what a group of the user namespace is in the VM; false if it is not mapped.
func (n *Namespaces) Group(id uint32) (uint32, bool) { return inVM(n.gids, id) }

func inVM(m *guestv1.IDMapping, id uint32) (uint32, bool) {
	return m.GetFirst() + id, id < m.GetSize()
}

// Spec are the namespaces that a container joins, as the runtime finds them.
func (n *Namespaces) Spec() []specs.LinuxNamespace {
	if n == nil {
		return nil
	}
	path := func(f *os.File) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()) }
	return []specs.LinuxNamespace{
		{Type: specs.UserNamespace, Path: path(n.user)},
		{Type: specs.NetworkNamespace, Path: path(n.net)},
		{Type: specs.IPCNamespace, Path: path(n.ipc)},
		{Type: specs.UTSNamespace, Path: path(n.uts)},
	}
}

// Check refuses a container whose ID mappings are not the pod's.
func (n *Namespaces) Check(l *specs.Linux) error {
	var uids, gids []specs.LinuxIDMapping
	if n != nil {
		uids, gids = mapping(n.uids), mapping(n.gids)
	}
	for _, m := range []struct {
		name      string
		got, want []specs.LinuxIDMapping
	}{{"uidMappings", l.UIDMappings, uids}, {"gidMappings", l.GIDMappings, gids}} {
		if len(m.got) != len(m.want) || len(m.got) > 0 && m.got[0] != m.want[0] {
			return fmt.Errorf("spec: linux.%s is %v: want the pod's, %v: %w", m.name, m.got, m.want, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func mapping(m *guestv1.IDMapping) []specs.LinuxIDMapping {
	return []specs.LinuxIDMapping{{HostID: m.GetFirst(), Size: m.GetSize()}}
}

// Do runs f on a thread in the pod's network, IPC and UTS namespaces, whose parameters it
// finds in /proc/sys.
func (n *Namespaces) Do(f func() error) error {
	if n == nil {
		return f()
	}
	return n.onThread(f)
}

// DoAsRoot is Do with the user and group IDs of the user namespace's root, and without
// rights over the VM.
func (n *Namespaces) DoAsRoot(f func() error) error {
	return n.onThread(func() error {
		uid, gid := n.Root()
		// Of this thread alone, where unix.Setresuid would be of all.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, keepID, uintptr(gid), keepID); errno != 0 {
			return fmt.Errorf("become group %d: %w", gid, errno)
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keepID, uintptr(uid), keepID); errno != 0 {
			return fmt.Errorf("become user %d: %w", uid, errno)
		}
		return f()
	})
}

// keepID leaves an ID as it is.
const keepID = ^uintptr(0)

// onThread runs f on a thread that has joined the namespaces, and that ends then.
func (n *Namespaces) onThread(f func() error) error {
	return thread.Run(func() error { return n.join(f) })
}

func (n *Namespaces) join(f func() error) error {
	for _, ns := range []struct {
		of   *os.File
		kind int
	}{{n.net, unix.CLONE_NEWNET}, {n.ipc, unix.CLONE_NEWIPC}, {n.uts, unix.CLONE_NEWUTS}} {
		if err := unix.Setns(int(ns.of.Fd()), ns.kind); err != nil {
			return fmt.Errorf("join the pod's namespaces: %w", err)
		}
	}
	return f()
}
