// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package confine

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/errdefs"
)

// DeviceGroups are the groups that a user must be in to open a device.
// ErrFailedPrecondition means that no group can, or only root's.
func DeviceGroups(path string) ([]uint32, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	const anyone, group = 0o006, 0o060
	gid := info.Sys().(*syscall.Stat_t).Gid
	switch mode := info.Mode().Perm(); {
	case mode&anyone == anyone:
		return nil, nil
	case mode&group == group && gid != 0:
		return []uint32{gid}, nil
	default:
		return nil, fmt.Errorf("%s has mode %04o and group %d, and confined VMMs are no root: give it to a group (chgrp kvm %s; chmod 0660 %s): %w",
			path, mode, gid, path, path, errdefs.ErrFailedPrecondition)
	}
}

// Enterable lets a user enter a directory that root keeps: so it may be where its
// process works, and that process may use what it knows the name and has the
// permission of.
func Enterable(dir string, uid uint32) error {
	if err := os.Chown(dir, 0, int(uid)); err != nil {
		return err
	}
	return os.Chmod(dir, 0o710)
}

// obstacle names the directory, if there is one, that keeps the command's user from its
// program or from where it is to work.
func (c *Command) obstacle() string {
	for _, dir := range []string{c.Dir, filepath.Dir(c.Path)} {
		if text := closed(dir, c.UID); text != "" {
			return ": " + text
		}
	}
	return ""
}

// Reachable returns ErrFailedPrecondition if a user may not go through the directories
// above a path, and names the one that is closed. What does not exist is not looked at.
func Reachable(path string, uid uint32) error {
	if text := closed(filepath.Dir(path), uid); text != "" {
		return fmt.Errorf("user %d cannot reach %s: %s: %w", uid, path, text, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// closed says which directory, of one and those above it, a user may not enter.
func closed(dir string, uid uint32) string {
	for ; dir != "/" && dir != "."; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			continue
		}
		const anyone, group = 0o001, 0o010
		st := info.Sys().(*syscall.Stat_t)
		if mode := info.Mode().Perm(); mode&anyone == 0 && (st.Gid != uid || mode&group == 0) && st.Uid != uid {
			return fmt.Sprintf("others may not enter %s, whose mode is %04o", dir, mode)
		}
	}
	return ""
}

// Program is what a dynamically linked program executes and reads: the system's
// libraries, and its own below the directory that it is installed in, where data names
// directories too.
func Program(path string, data ...string) (execute, read []string) {
	execute = []string{"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"}
	read = []string{"/etc/ld.so.cache"}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return execute, read
	}
	for _, program := range []string{path, real} {
		prefix := filepath.Dir(filepath.Dir(program))
		execute = append(execute, filepath.Join(prefix, "lib"), filepath.Join(prefix, "lib64"))
		for _, d := range data {
			read = append(read, filepath.Join(prefix, d))
		}
	}
	return execute, read
}
