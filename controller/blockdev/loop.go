// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package blockdev

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// loopControl is what gives loop devices.
const loopControl = "/dev/loop-control"

// loopAttempts is how often another loop device is taken, when somebody else was first.
const loopAttempts = 32

// loop makes a loop device of a file.
func (f *Found) loop(nodes *Nodes, readOnly bool) (*Source, error) {
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	backing, err := os.OpenFile(f.self(), mode, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", f.Path, err)
	}
	defer backing.Close() //nolint:errcheck // the device has its own
	control, err := os.OpenFile(loopControl, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("a file becomes a disk by a loop device, and the host gives none: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	defer control.Close() //nolint:errcheck // nothing is buffered
	for range loopAttempts {
		free, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("get a loop device: %w: %w", err, errdefs.ErrResourceExhausted)
		}
		s, err := configure(nodes, "loop"+strconv.Itoa(free), backing, readOnly)
		if errors.Is(err, unix.EBUSY) {
			continue
		}
		return s, err
	}
	return nil, fmt.Errorf("get a loop device: others were first, %d times: %w", loopAttempts, errdefs.ErrUnavailable)
}

// configure gives a loop device its file. EBUSY means that it has one.
func configure(nodes *Nodes, name string, backing *os.File, readOnly bool) (_ *Source, retErr error) {
	number, err := numberOf(name)
	if err != nil {
		return nil, err
	}
	path, err := nodes.node(number)
	if err != nil {
		return nil, err
	}
	s := &Source{Number: number, Path: path, ReadOnly: readOnly}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, s.Close())
		}
	}()
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	if s.held, err = os.OpenFile(path, mode, 0); err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	config := unix.LoopConfig{Fd: uint32(backing.Fd())}
	// Without a flag of its own it is as large as the file, and goes with its last user.
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
	if readOnly {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	if err := unix.IoctlLoopConfigure(int(s.held.Fd()), &config); err != nil {
		return nil, fmt.Errorf("make %s of a file: %w", name, err)
	}
	return s, nil
}
