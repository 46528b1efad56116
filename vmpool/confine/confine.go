// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package confine starts a VMM so that one which a guest has taken over reaches
// nothing but its own files: as a user of its own, without capabilities, which it can
// never get (no_new_privs, an empty bounding set), with a seccomp filter before its
// own, and in a Landlock domain.
//
// All of this is the calling thread's and is inherited by fork and exec, so no helper
// program is needed: a thread restricts itself, starts the program and ends.
package confine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/api/thread"
)

// Command is a program to start, and what it may use of the host.
type Command struct {
	// Path is the program's absolute path, Args its arguments without its name.
	Path string
	Args []string
	// Dir is its working directory, which the user must be able to search.
	Dir string
	Env []string
	// Output takes what it prints; nil drops it. Its standard input is /dev/null.
	Output *os.File
	// Files become its descriptors 3, 4 and so on. They stay the caller's.
	Files []*os.File

	// UID is the user, and the group of that number, that it runs as. With 0 it runs as
	// this process does, and nothing below matters.
	UID uint32
	// Groups are those that it is in beside, such as that of /dev/kvm.
	Groups []uint32
	// Execute, Read and Write are files, or directories with all below, that it may open
	// beyond Path: for reading and executing, for reading, for everything. Paths that do
	// not exist are passed over. Permissions of files count all the same.
	Execute, Read, Write []string
	// Lend are files that it gets when it opens their path for reading and writing, in
	// whatever mode they were opened here: for programs that want to write to what they
	// are only to read. All that it opens so elsewhere is as without, until Process.Seal;
	// after that each such opening fails with ENOSYS. Lent files stay the caller's, who
	// must not close them before Seal.
	Lend map[string]*os.File
	// UnixSockets lets it make unix sockets, of streams to listen on, and of datagrams for
	// what ioctl wants one: connecting is never allowed, nor sending to an address, nor any
	// other kind of socket but those that it inherits. It has no sendmsg then. Names it gives
	// its sockets until Process.Seal; after that giving one fails with ENOSYS, as nobody can
	// tell here a path from an abstract name, which others on the host may wait for.
	UnixSockets bool
	// Threads bounds its threads and processes together; 0 for no bound. The cgroup has
	// a bound as well.
	Threads int
}

// Process is a program that was started.
type Process struct {
	// Cmd is to be waited for by the caller.
	*exec.Cmd
	lender *lender
}

// Start starts the program. On a kernel without Landlock, or with an old one, it is
// confined by what there is: see Support. After an error no process is left.
func Start(c Command) (*Process, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close() //nolint:errcheck // only read
	cmd := exec.Command(c.Path, c.Args...)
	cmd.Dir, cmd.Env, cmd.Stdin = c.Dir, c.Env, null
	cmd.ExtraFiles = c.Files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out := c.Output
	if out == nil {
		if out, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0); err != nil {
			return nil, err
		}
		defer out.Close() //nolint:errcheck // nothing is written
	}
	cmd.Stdout, cmd.Stderr = out, out
	if c.UID == 0 {
		return &Process{Cmd: cmd}, cmd.Start()
	}
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: c.UID, Gid: c.UID, Groups: c.Groups}
	return c.startConfined(cmd)
}

// startConfined restricts a thread, which starts the program and ends.
func (c *Command) startConfined(cmd *exec.Cmd) (_ *Process, retErr error) {
	domain, err := c.domain()
	if err != nil {
		return nil, err
	}
	defer domain.close()
	filter, err := program(c.UnixSockets, len(c.Lend) > 0)
	if err != nil {
		return nil, err
	}
	listener := -1
	err = thread.Run(func() (err error) {
		if listener, err = restrict(domain, filter, c.UnixSockets || len(c.Lend) > 0); err != nil {
			return err
		}
		return cmd.Start()
	})
	p := &Process{Cmd: cmd}
	if listener >= 0 {
		p.lender = newLender(listener, c.Lend)
	}
	if err != nil {
		p.Seal()
		if errors.Is(err, unix.EACCES) {
			err = fmt.Errorf("%w%s", err, c.obstacle())
		}
		return nil, fmt.Errorf("start %s as user %d: %w", c.Path, c.UID, err)
	}
	if err := p.limit(c.Threads); err != nil {
		p.Seal()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, fmt.Errorf("start %s as user %d: %w", c.Path, c.UID, err)
	}
	return p, nil
}

// Seal ends the start: from now on the program opens no file for reading and writing if
// files were lent to it, and gives no socket a name. It may be called again.
func (p *Process) Seal() {
	if p.lender != nil {
		p.lender.close()
	}
}

// limit sets resource limits: no core, which would hold the guest's memory, and a
// bound of threads, which are all that this user has.
func (p *Process) limit(threads int) error {
	pid := p.Cmd.Process.Pid
	err := unix.Prlimit(pid, unix.RLIMIT_CORE, &unix.Rlimit{}, nil)
	if threads > 0 {
		n := uint64(threads)
		err = errors.Join(err, unix.Prlimit(pid, unix.RLIMIT_NPROC, &unix.Rlimit{Cur: n, Max: n}, nil))
	}
	switch {
	case errors.Is(err, unix.ESRCH): // it has ended, which the caller sees
		return nil
	case errors.Is(err, unix.EPERM):
		// A containerd that was itself denied CAP_SYS_RESOURCE. The cgroup bounds threads,
		// and the VMM keeps its guest's memory out of cores.
		return nil
	}
	return err
}

// restrict restricts the calling thread. It returns the seccomp filter's listener, or
// -1.
func restrict(d *domain, filter []unix.SockFilter, asks bool) (listener int, _ error) {
	if err := dropCapabilities(); err != nil {
		return -1, err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return -1, fmt.Errorf("set no_new_privs: %w", err)
	}
	if err := d.enter(); err != nil {
		return -1, err
	}
	return install(filter, asks)
}

// dropCapabilities empties the thread's sets of capabilities but those that it works
// with itself, which its child loses by becoming another user.
func dropCapabilities() error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if err := unix.Capget(&head, &sets[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	sets[0].Inheritable, sets[1].Inheritable = 0, 0
	if err := unix.Capset(&head, &sets[0]); err != nil {
		return fmt.Errorf("clear inheritable capabilities: %w", err)
	}
	for c := uintptr(0); ; c++ {
		switch err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); {
		case errors.Is(err, unix.EINVAL): // there are no more
			return nil
		case errors.Is(err, unix.EPERM):
			// A containerd that was itself denied CAP_SETPCAP. no_new_privs holds without.
			return nil
		case err != nil:
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
}

// Need says whether the host's kernel has what confinement cannot do without. The
// error wraps ErrFailedPrecondition.
func Need() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("VMMs are confined by root only: %w", errdefs.ErrFailedPrecondition)
	}
	action := uint32(unix.SECCOMP_RET_USER_NOTIF)
	if err := seccomp(unix.SECCOMP_GET_ACTION_AVAIL, 0, pointer(&action)); err != nil {
		return fmt.Errorf("the kernel's seccomp has no user notification (Linux 5.14): %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return nil
}
