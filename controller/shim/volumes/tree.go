// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package volumes

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/controller/shim/ninep"
	"github.com/cloudhv/containerd-cloudhv/guest/api/thread"
)

// Options say how a volume is mounted.
type Options struct {
	// Readonly is for the volume itself, and RecursiveReadonly for all that is mounted
	// below it as well.
	Readonly, RecursiveReadonly bool
	// Recursive brings along what is mounted below the source.
	Recursive bool
	// Slave has what the host mounts below the source later appear in the volume.
	Slave bool
	// ids are the mappings of an ID-mapped mount, nil for another.
	ids *idMap
}

// maker is as whom files are made.
func (o Options) maker() ninep.Maker {
	if o.ids == nil {
		return ninep.Maker{}
	}
	return o.ids.maker
}

// tree is a clone of a part of the host's mounts. It keeps the file systems in it in use,
// but none of the host's mounts.
type tree struct {
	// fd is the root, an O_PATH descriptor.
	fd int
	// namespace is the mount namespace that the tree lies in, if it is a slave; else -1:
	// the tree is nowhere, and goes with fd.
	namespace int
}

// close gives up the namespace; fd is somebody else's by then.
func (t *tree) close() {
	if t.namespace >= 0 {
		_ = unix.Close(t.namespace)
	}
}

// openTree clones what is mounted at source, which may be a symbolic link.
func openTree(source string, o Options) (*tree, error) {
	if o.Slave {
		return openSlave(source, o)
	}
	fd, err := cloneTree(source, o, unix.MS_PRIVATE)
	if err != nil {
		return nil, err
	}
	return &tree{fd: fd, namespace: -1}, nil
}

// cloneTree makes a detached clone with the attributes that o asks for.
func cloneTree(source string, o Options, propagation uint64) (_ int, retErr error) {
	if err := checkSource(source); err != nil {
		return -1, err
	}
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if o.Recursive {
		flags |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, source, flags)
	if err != nil {
		return -1, fmt.Errorf("clone the mounts: %w", err)
	}
	defer func() {
		if retErr != nil {
			_ = unix.Close(fd)
		}
	}()
	if o.ids != nil {
		if err := o.ids.apply(fd, source); err != nil {
			return -1, err
		}
	}
	// The server follows no link and opens no device; the kernel shall not either.
	all := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSYMFOLLOW, Propagation: propagation}
	if o.RecursiveReadonly {
		all.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &all); err != nil {
		return -1, fmt.Errorf("set the mounts' attributes: %w", err)
	}
	if o.Readonly {
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return -1, fmt.Errorf("make the mount read-only: %w", err)
		}
	}
	return fd, nil
}

// checkSource refuses what the guest could not use. It is looked at again once it is
// cloned, so it may change meanwhile.
func checkSource(source string) error {
	var st unix.Stat_t
	if err := unix.Stat(source, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: source, Err: err}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR:
		return checkPages(source)
	case unix.S_IFSOCK:
		return refused("a socket", "nobody in the VM could connect to it")
	case unix.S_IFIFO:
		return refused("a FIFO", "nobody in the VM would meet its other end")
	case unix.S_IFBLK:
		return refused("a block device", "it is the host's")
	}
	return refused("a character device", "it is the host's")
}

// checkPages refuses files that are huge pages of the host's, which can only be mapped.
func checkPages(source string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(source, &st); err != nil {
		return &fs.PathError{Op: "statfs", Path: source, Err: err}
	}
	if st.Type == unix.HUGETLBFS_MAGIC {
		return fmt.Errorf("it is of huge pages (medium: HugePages): want another medium, as the host's huge pages are not in a VM: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func refused(what, why string) error {
	return fmt.Errorf("it is %s: want a directory or a regular file, as %s: %w", what, why, errdefs.ErrInvalidArgument)
}

// openSlave is openTree for a tree that goes on receiving the host's mounts. The kernel
// brings those to mounts in a namespace only, so this one has a namespace to itself, with
// nothing else in it.
func openSlave(source string, o Options) (t *tree, _ error) {
	// The thread leaves the process's namespace.
	err := thread.Run(func() (err error) {
		t, err = slaveTree(source, o)
		return err
	})
	return t, err
}

// slaveTree is openSlave on a thread of its own.
func slaveTree(source string, o Options) (_ *tree, retErr error) {
	t := &tree{fd: -1, namespace: -1}
	defer func() {
		if retErr != nil {
			t.close()
			if t.fd >= 0 {
				_ = unix.Close(t.fd)
			}
		}
	}()
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return nil, fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return nil, fmt.Errorf("part from the host's mounts: %w", err)
	}
	var err error
	if t.namespace, err = unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open the mount namespace: %w", err)
	}
	if t.fd, err = cloneTree(source, o, unix.MS_SLAVE); err != nil {
		return nil, err
	}
	if err := settle(t.fd); err != nil {
		return nil, fmt.Errorf("attach the clone: %w", err)
	}
	return t, nil
}

// settle makes a tmpfs the root of this thread's mount namespace, with fd's tree in it
// and nothing else.
func settle(fd int) error {
	// What lies below is not needed any more; /proc was.
	const root = "/proc"
	if err := unix.Mount("tmpfs", root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=64k,mode=700"); err != nil {
		return err
	}
	at := filepath.Join(root, "volume")
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		err = os.Mkdir(at, 0o700)
	} else {
		err = os.WriteFile(at, nil, 0o600)
	}
	if err != nil {
		return err
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return err
	}
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return err
	}
	return unix.Unmount(".", unix.MNT_DETACH)
}

// hasMounts tells whether anything is mounted below a directory.
func hasMounts(source string) (bool, error) {
	dir, err := filepath.EvalSymlinks(source)
	if err != nil {
		return false, err
	}
	data, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return false, err
	}
	below := strings.TrimSuffix(dir, "/") + "/"
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		const mountPoint = 4
		if len(fields) <= mountPoint {
			return false, errors.New("mountinfo has a line that is too short")
		}
		if strings.HasPrefix(unescape.Replace(fields[mountPoint]), below) {
			return true, nil
		}
	}
	return false, nil
}

// unescape undoes what the kernel does to a path in mountinfo.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
