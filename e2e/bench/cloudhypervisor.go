// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	"github.com/cloudhv/containerd-cloudhv/vmpool/sparse"
)

// bareCloudHypervisor restores by Cloud Hypervisor: one process, which is told all that
// it needs by its command line.
type bareCloudHypervisor struct {
	binary string
	// pid and args are those of a VMM of ours that is copied.
	pid    int
	args   []string
	rootfs string
	nic    bool
}

// Names in the working directory of a VMM of ours, which a snapshot's configuration has.
const (
	templateLink = "snap"
	rootLink     = "root"
	guestSocket  = "v.sock"
)

// builtInNIC is the network device that a template has.
const builtInNIC = "builtin"

func (c *bareCloudHypervisor) copy(dir string) (from string, _ error) {
	memory, err := mapped(c.pid, "/memory")
	if err != nil {
		return "", err
	}
	if c.rootfs, err = opened(c.pid, "/rootfs.erofs"); err != nil {
		return "", err
	}
	c.nic = strings.Contains(strings.Join(c.args, " "), "net_fds=")
	from = filepath.Dir(memory)
	for _, name := range []string{"memory", "config.json", "state.json"} {
		if err := sparse.CopyFile(filepath.Join(dir, name), filepath.Join(from, name)); err != nil {
			return "", err
		}
	}
	return from, nil
}

func (c *bareCloudHypervisor) restore(ctx context.Context, vm *bareVM, dir string) (endpoint string, _ error) {
	err := errors.Join(os.Symlink(dir, filepath.Join(vm.dir, templateLink)), os.Symlink(c.rootfs, filepath.Join(vm.dir, rootLink)))
	if err != nil {
		return "", err
	}
	restore := "source_url=file://" + filepath.Join(vm.dir, templateLink) + ",memory_restore_mode=copy,resume=true"
	if c.nic {
		restore += ",net_fds=[" + builtInNIC + "@[3]]" // the TAP
	}
	if err := vm.start(c.binary, []string{"--api-socket", "api.sock", "--restore", restore}); err != nil {
		return "", err
	}
	// It tells nobody that it listens, and the name is there before.
	socket := filepath.Join(vm.dir, guestSocket)
	for {
		if conn, err := net.Dial("unix", socket); err == nil {
			_ = conn.Close()
			return transport.VsockEndpoint(socket, transport.VsockVM), nil
		}
		sleep(ctx, time.Millisecond)
		if ctx.Err() != nil {
			return "", fmt.Errorf("the VMM makes no %s: %w", guestSocket, context.Cause(ctx))
		}
	}
}

// mapped is a file that a process has mapped, by how its path ends.
func mapped(pid int, suffix string) (string, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(maps)) {
		if i := strings.IndexByte(line, '/'); i >= 0 && strings.HasSuffix(strings.TrimSpace(line), suffix) {
			return strings.TrimSpace(line[i:]), nil
		}
	}
	return "", fmt.Errorf("process %d has mapped no %s: %w", pid, suffix, errdefs.ErrNotFound)
}

// opened is a file that a process has open, by how its path ends.
func opened(pid int, suffix string) (string, error) {
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		return "", err
	}
	for _, fd := range fds {
		if path, err := os.Readlink(fd); err == nil && strings.HasSuffix(path, suffix) {
			return path, nil
		}
	}
	return "", fmt.Errorf("process %d has no %s open: %w", pid, suffix, errdefs.ErrNotFound)
}
