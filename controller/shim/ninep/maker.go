// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package ninep

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// Maker is as whom names are made in a volume, before they are given to whom they belong.
// That is root, unless the volume is an ID-mapped mount: there root may be nobody whom the
// file system knows, and the kernel lets nobody such make anything (EOVERFLOW).
type Maker struct{ UID, GID uint32 }

// noFixup keeps a thread's capabilities when its user changes (SECBIT_NO_SETUID_FIXUP).
const noFixup = 1 << 2

// do runs f as the maker, who has root's rights over files.
func (m Maker) do(f func() error) error {
	if m == (Maker{}) {
		return f()
	}
	// IDs and bits are the thread's.
	runtime.LockOSThread()
	bits, err := unix.PrctlRetInt(unix.PR_GET_SECUREBITS, 0, 0, 0, 0)
	if err == nil {
		err = unix.Prctl(unix.PR_SET_SECUREBITS, uintptr(bits|noFixup), 0, 0, 0)
	}
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("keep the rights of root: %w", err)
	}
	_, gidErr := unix.SetfsgidRetGid(int(m.GID))
	_, uidErr := unix.SetfsuidRetUid(int(m.UID))
	if err = errors.Join(gidErr, uidErr); err == nil {
		err = f()
	}
	_, uidErr = unix.SetfsuidRetUid(0)
	_, gidErr = unix.SetfsgidRetGid(0)
	if errors.Join(uidErr, gidErr, unix.Prctl(unix.PR_SET_SECUREBITS, uintptr(bits), 0, 0, 0)) == nil {
		runtime.UnlockOSThread()
	}
	// Else the thread ends with the goroutine that it is locked to.
	return err
}
