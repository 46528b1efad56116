// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/confine"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// command is what runs a VM's hypervisor. It opens its files by their paths, so what it
// may use is made its user's, or readable to it.
func command(host vmm.Host, cfg vmm.Config, from *vmm.Snapshot) (confine.Command, error) {
	own := filepath.Join(cfg.Dir, ownDir)
	c := confine.Command{Path: host.Binary, Args: commandLine(cfg, from), Dir: own}
	if cfg.UID == 0 {
		return c, nil
	}
	c.UnixSockets, c.Threads = true, cfg.Max.VCPUs+maxThreads
	c.Read = []string{"/sys/kernel/mm", cfg.RootFS}
	c.Write = []string{own, cfg.Scratch, disksDir(cfg)}
	give := []string{own, cfg.Scratch}
	switch {
	case from != nil:
		c.Read = append(c.Read, from.Dir)
	default:
		c.Read = append(c.Read, cfg.Kernel)
		if cfg.MemoryFile != "" {
			// The snapshot's files are its own until they are complete.
			give = append(give, filepath.Dir(cfg.MemoryFile), cfg.MemoryFile)
			c.Write = append(c.Write, filepath.Dir(cfg.MemoryFile))
		}
	}
	err := makeDisksDir(cfg)
	for _, path := range slices.Concat(c.Read, c.Write) {
		if path != "" && path != own { // the way to own is opened when it starts
			err = errors.Join(err, confine.Reachable(path, cfg.UID))
		}
	}
	for _, path := range give {
		if path != "" {
			err = errors.Join(err, os.Chown(path, int(cfg.UID), int(cfg.UID)))
		}
	}
	if err != nil {
		return c, fmt.Errorf("cloud-hypervisor: VM %s: %w", cfg.ID, err)
	}
	return c, nil
}

// disksDir is the directory of the disks that are plugged into a confined VM: beside its
// own disk, on the file system where images are.
func disksDir(cfg vmm.Config) string {
	if cfg.UID == 0 || cfg.Scratch == "" {
		return ""
	}
	return vmm.DisksDir(cfg.Scratch)
}

func makeDisksDir(cfg vmm.Config) error {
	dir := disksDir(cfg)
	if dir == "" {
		return nil
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return confine.Enterable(dir, cfg.UID)
}

// lend gives the hypervisor a disk's file, by a name that only it can use, and returns
// that. It sees no other files of where the disk lies.
func (vm *machine) lend(disk vmm.Disk) (path string, _ error) {
	vm.mu.Lock()
	own := vm.own
	vm.mu.Unlock()
	if own.Disks == "" || disk.ReadOnly && disk.Path == own.RootFS {
		return disk.Path, nil
	}
	path = filepath.Join(own.Disks, disk.Serial)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	if device, err := deviceOf(disk.Path); err != nil || device != nil {
		if err == nil {
			err = vm.lendDevice(path, disk.ReadOnly, device.Rdev)
		}
		return path, err
	}
	err := os.Link(disk.Path, path)
	if ended := vm.Check(); ended != nil {
		return "", ended
	}
	if errors.Is(err, syscall.EXDEV) {
		return "", fmt.Errorf("%s is on another file system than the VM's disk, and a confined hypervisor cannot be given it: %w: %w", disk.Path, err, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return "", err
	}
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return "", err
	case disk.ReadOnly:
		// Who cannot go through the directories above the disk cannot read it all the same.
		return path, os.Chmod(path, info.Mode().Perm()|0o444)
	default:
		return path, os.Chown(path, int(vm.State().UID), int(vm.State().UID))
	}
}

// takeBack undoes lend: the disk's file has its first name only, and is no longer the
// hypervisor's user's. What the hypervisor has open stays open: until it has ended, a disk
// that it could write to is not to be another VM's.
func (vm *machine) takeBack(serial string) error {
	vm.mu.Lock()
	dir := vm.own.Disks
	vm.mu.Unlock()
	if dir == "" {
		return nil
	}
	path := filepath.Join(dir, serial)
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if owner(info) == vm.State().UID {
		err = os.Lchown(path, 0, 0)
	}
	return errors.Join(err, os.Remove(path))
}

func owner(info os.FileInfo) uint32 { return info.Sys().(*syscall.Stat_t).Uid }

// Kill ends the VMM and removes what it was given, too.
func (vm *machine) Kill(ctx context.Context) error {
	err := vm.VM.Kill(ctx)
	vm.mu.Lock()
	dir := vm.own.Disks
	vm.mu.Unlock()
	if err == nil && dir != "" {
		err = os.RemoveAll(dir)
	}
	return err
}

// closeOwn takes the hypervisor's working directory from it, when its sockets are there:
// nobody then finds another socket, or a link to one, in their place.
func (vm *machine) closeOwn() error {
	uid := vm.State().UID
	if uid == 0 {
		return nil
	}
	dir := vm.Path(ownDir)
	if err := confine.Enterable(dir, uid); err != nil {
		return err
	}
	for _, name := range []string{consoleSocket, guestSocket} {
		info, err := os.Lstat(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if info.Mode().Type() != os.ModeSocket {
			return fmt.Errorf("%s is no socket: %w", name, errdefs.ErrPermissionDenied)
		}
	}
	return nil
}

// seal makes a snapshot's files root's, and readable to clones, who write to none.
func seal(dir string) error {
	// From now on the names in it stay what they are.
	if err := errors.Join(os.Chown(dir, 0, 0), os.Chmod(dir, 0o711)); err != nil { //nolint:gosec // clones go through it
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		err = errors.Join(err, sealFile(filepath.Join(dir, e.Name())))
	}
	return err
}

func sealFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no file: %w", path, errdefs.ErrPermissionDenied)
	}
	if n := info.Sys().(*syscall.Stat_t).Nlink; n != 1 {
		// Whose file it is besides, nobody knows.
		return fmt.Errorf("%s has %d names: %w", path, n, errdefs.ErrPermissionDenied)
	}
	return errors.Join(f.Chown(0, 0), f.Chmod(0o444))
}
