// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package confine

import (
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Rights of Landlock, by what they are for. Which of them a kernel knows, its ABI
// version tells.
const (
	readRights    = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	executeRights = readRights | unix.LANDLOCK_ACCESS_FS_EXECUTE
	// writeRights are all but those to execute and to make devices.
	writeRights = readRights | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE |
		unix.LANDLOCK_ACCESS_FS_IOCTL_DEV | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE | unix.LANDLOCK_ACCESS_FS_REMOVE_DIR |
		unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_MAKE_SOCK |
		unix.LANDLOCK_ACCESS_FS_MAKE_FIFO
	allRights = writeRights | executeRights | unix.LANDLOCK_ACCESS_FS_MAKE_CHAR | unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK |
		unix.LANDLOCK_ACCESS_FS_MAKE_SYM | unix.LANDLOCK_ACCESS_FS_REFER
	// fileRights are those that a file, no directory, can have.
	fileRights = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE |
		unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV

	netRights = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
	scopes    = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL
)

// Versions of the ABI that brought something.
const (
	abiRefer    = 2
	abiTruncate = 3
	abiNet      = 4
	abiIoctl    = 5
	abiScopes   = 6
)

// abi is the version of the host's Landlock, 0 for none.
var abi = sync.OnceValue(func() int {
	n, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0
	}
	return int(n)
})

// Support says how far this host's kernel can confine a VMM, for people.
func Support() string {
	switch v := abi(); {
	case v == 0:
		return "users, seccomp; the kernel has no Landlock"
	case v < abiScopes:
		return fmt.Sprintf("users, seccomp, Landlock (version %d, without scopes)", v)
	default:
		return fmt.Sprintf("users, seccomp, Landlock (version %d)", v)
	}
}

// HasLandlock tells whether the kernel has Landlock, and it is on.
func HasLandlock() bool { return abi() > 0 }

// domain is a Landlock ruleset; the zero value restricts nothing.
type domain struct {
	fd   int
	made bool
	attr unix.LandlockRulesetAttr
}

// domain makes the command's ruleset of what the kernel knows.
func (c *Command) domain() (_ *domain, retErr error) {
	d := &domain{attr: known(abi())}
	if abi() == 0 {
		return d, nil
	}
	size := unsafe.Sizeof(d.attr)
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(pointer(&d.attr)), size, 0)
	if errno != 0 {
		return nil, fmt.Errorf("make a Landlock ruleset: %w", errno)
	}
	d.fd, d.made = int(fd), true
	defer func() {
		if retErr != nil {
			d.close()
		}
	}()
	for _, rule := range []struct {
		paths  []string
		rights uint64
	}{{[]string{c.Path}, executeRights}, {c.Execute, executeRights}, {c.Read, readRights}, {c.Write, writeRights}} {
		for _, path := range rule.paths {
			if err := d.allow(path, rule.rights); err != nil {
				return nil, fmt.Errorf("landlock rule for %s: %w", path, err)
			}
		}
	}
	return d, nil
}

// known is all that a version of the ABI can restrict. Older kernels want the fields
// that they do not know to be zero.
func known(version int) unix.LandlockRulesetAttr {
	attr := unix.LandlockRulesetAttr{Access_fs: allRights}
	if version < abiRefer {
		attr.Access_fs &^= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if version < abiTruncate {
		attr.Access_fs &^= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if version < abiIoctl {
		attr.Access_fs &^= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	if version >= abiNet {
		attr.Access_net = netRights
	}
	if version >= abiScopes {
		attr.Scoped = scopes
	}
	return attr
}

func (d *domain) allow(path string, rights uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // a path
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		rights &= fileRights
	}
	rule := unix.LandlockPathBeneathAttr{Allowed_access: rights & d.attr.Access_fs, Parent_fd: int32(fd)}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(d.fd), unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(pointer(&rule)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// enter restricts the calling thread, for good.
func (d *domain) enter() error {
	if !d.made {
		return nil
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(d.fd), 0, 0); errno != 0 {
		return fmt.Errorf("enter a Landlock domain: %w", errno)
	}
	return nil
}

func (d *domain) close() {
	if d.made {
		_ = unix.Close(d.fd)
		d.made = false
	}
}

func pointer[T any](p *T) unsafe.Pointer { return unsafe.Pointer(p) }
