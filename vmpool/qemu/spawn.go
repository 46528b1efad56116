// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cloudhv/containerd-cloudhv/vmpool/confine"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmproc"
)

// maxThreads is how many threads QEMU may have beside those of vCPUs: one that waits,
// at most 64 that read and write files, and some that come and go.
const maxThreads = 80

// spawn starts the process, in its cgroup, with its sockets made. The caller calls
// seal once QEMU has opened what it begins with.
func (vm *machine) spawn(ctx context.Context, host vmm.Host, cfg vmm.Config, from *vmm.Snapshot) (seal func(), _ error) {
	sockets, err := listen(cfg.Dir)
	defer vmproc.CloseAll(sockets)
	if err != nil {
		return nil, err
	}
	has, err := inherit(cfg, from)
	defer has.closeOwn()
	if err != nil {
		return nil, err
	}
	printed, err := vmproc.OpenPipe(filepath.Join(cfg.Dir, logPipe), os.O_RDWR)
	if err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	defer printed.Close() //nolint:errcheck // QEMU has its own
	if err := vm.openLogs(ctx); err != nil {
		return nil, err
	}
	memory, err := openMemory(cfg, from)
	if err != nil {
		return nil, err
	}
	command := confine.Command{
		Path: host.Binary, Args: commandLine(cfg, host.Accelerator, from, has), Dir: cfg.Dir, Output: printed,
		Files: append(sockets, has.files...), Threads: cfg.Max.VCPUs + maxThreads, Lend: memory,
	}
	// Its disks and devices it inherits, or is handed.
	_, command.Read = confine.Program(host.Binary, "share/qemu", "share/seabios")
	if from == nil {
		command.Read = append(command.Read, cfg.Kernel)
	}
	proc, err := vm.Start(ctx, command, host.Accelerator)
	if err != nil {
		closeLent(memory)
		return nil, err
	}
	return func() {
		proc.Seal()
		closeLent(memory)
	}, nil
}

// openMemory opens the file of the guest's RAM, if it has one, by the path by which
// QEMU does: to read, as QEMU does not change what it maps privately, although it opens
// it for writing; to write too for the making of a snapshot.
func openMemory(cfg vmm.Config, from *vmm.Snapshot) (map[string]*os.File, error) {
	path, flag := cfg.MemoryFile, os.O_RDWR|os.O_CREATE
	if from != nil {
		path, flag = memoryPath(from.Dir), os.O_RDONLY
	}
	if path == "" {
		return nil, nil
	}
	f, err := os.OpenFile(path, flag, 0o600)
	if err != nil {
		return nil, fmt.Errorf("qemu: memory of VM %s: %w", cfg.ID, err)
	}
	return map[string]*os.File{path: f}, nil
}

func closeLent(lent map[string]*os.File) {
	for _, f := range lent {
		_ = f.Close()
	}
}

// listen makes QEMU's sockets. The caller closes the files.
func listen(dir string) (files []*os.File, _ error) {
	for _, name := range socketNames {
		f, err := vmproc.Listen(filepath.Join(dir, name))
		if err != nil {
			return files, fmt.Errorf("qemu: %w", err)
		}
		files = append(files, f)
	}
	return files, nil
}
