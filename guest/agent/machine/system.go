// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package machine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/boot"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/disk"
)

// VM is the System of a real one.
type VM struct {
	// Unmount unmounts what was mounted of disks of the host's; nil if nothing can be.
	Unmount func(context.Context) error
}

var _ System = VM{}

const (
	rndAddEntropy = 0x40085203
	rndReseedCRNG = 0x5207
)

// AddEntropy credits b to the kernel's pool and reseeds its generator from it,
// at once, so that what was drawn before tells nothing about what comes.
func (VM) AddEntropy(b []byte) error {
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("add entropy: %w", err)
	}
	defer f.Close()
	arg := entropyArg(b)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndAddEntropy, uintptr(unsafe.Pointer(&arg[0]))); errno != 0 {
		return fmt.Errorf("add entropy: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndReseedCRNG, 0); errno != 0 {
		return fmt.Errorf("reseed random generator: %w", errno)
	}
	return nil
}

// entropyArg is the kernel's struct rand_pool_info: bits, bytes, data.
func entropyArg(b []byte) []byte {
	arg := binary.NativeEndian.AppendUint32(nil, uint32(len(b)*8))
	arg = binary.NativeEndian.AppendUint32(arg, uint32(len(b)))
	return append(arg, b...)
}

// syncLimit bounds the writing back. It is less than what the host waits for by default
// (timeouts.power_off).
const syncLimit = 4 * time.Second

var errNotFirst = errors.New("not the first process of a VM")

// Quiesce kills everything and writes back what outlives the machine: it can be ended
// without a loss.
func (v VM) Quiesce() error {
	if os.Getpid() != 1 {
		return errNotFirst
	}
	err := unix.Kill(-1, unix.SIGKILL)
	if errors.Is(err, unix.ESRCH) {
		err = nil
	}
	if !outlived() {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), syncLimit)
	defer cancel()
	synced := make(chan error, 1)
	go func() {
		unix.Sync()
		if v.Unmount != nil {
			synced <- v.Unmount(ctx)
		}
		close(synced)
	}()
	select {
	case unmountErr := <-synced:
		err = errors.Join(err, unmountErr)
	case <-ctx.Done():
		err = errors.Join(err, fmt.Errorf("disks of the host's were not written back within %v: %w", syncLimit, ctx.Err()))
	}
	return err
}

// outlived says whether something that was written here is to be read after the
// machine's end. The scratch disk, with the containers' layers, ends with it.
func outlived() bool {
	serials, err := disk.Finder{}.Writable()
	return err != nil || slices.ContainsFunc(serials, func(s string) bool { return s != boot.ScratchSerial })
}

// PowerOff quiesces the machine and turns it off.
func (v VM) PowerOff() error {
	if os.Getpid() != 1 {
		return errNotFirst
	}
	return errors.Join(v.Quiesce(), unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
}
