// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// File descriptors that the hypervisor inherits.
const (
	fdAPI = 3 + iota
	fdEvents
	// fdTAP is there if the machine has a network device from the start.
	fdTAP
)

// Names in Config.Dir.
const (
	apiSocket = "api.sock"
	// eventPipe and logPipe are FIFOs for what the hypervisor tells and prints: they are
	// bounded, and keep the last words for a reader that comes later.
	eventPipe = "event.fifo"
	logPipe   = "vmm.fifo"
	// ownDir is the hypervisor's working directory, and all that it needs of the VM's
	// directory beside what it inherits.
	ownDir = "own"
)

// Names in ownDir. They stand in the machine's configuration, which is the template's
// for all its clones.
const (
	consoleSocket = "con.sock"
	guestSocket   = "v.sock"

	// Links to the VM's files. They are there while it starts.
	kernelLink  = "kernel"
	rootLink    = "root"
	scratchLink = "scratch"
	// templateLink is the directory of the guest's RAM, and of the snapshot.
	templateLink = "snap"
)

// links are removed when the VM has started: a guest that resets then ends its VM, as
// the hypervisor finds nothing to boot from. It knows no other way.
var links = own(kernelLink, rootLink, scratchLink, templateLink)

// fileNames are all that a VM leaves in its directory.
var fileNames = slices.Concat(links, own(consoleSocket, guestSocket), []string{ownDir, apiSocket, eventPipe, logPipe})

// own are names in ownDir as names in Config.Dir.
func own(names ...string) []string {
	paths := make([]string, len(names))
	for i, name := range names {
		paths[i] = filepath.Join(ownDir, name)
	}
	return paths
}

const (
	// zone is the guest's RAM.
	zone = "ram"
	// builtIn is the network device that is there from the start. No NIC that is plugged
	// has such an ID.
	builtIn = "builtin"
	// guestCID is every guest's: the host reaches them by their sockets.
	guestCID = 3
	// plugUnit is what the room for plugged memory is a multiple of, in bytes.
	plugUnit = 128 << 20
	// maxDevices is how many a machine has at most, on its one PCI bus.
	maxDevices = 31
)

// link makes the working directory, with the links to a VM's files.
func link(cfg vmm.Config, from *vmm.Snapshot) error {
	targets := map[string]string{kernelLink: cfg.Kernel, rootLink: cfg.RootFS, scratchLink: cfg.Scratch}
	switch {
	case from != nil:
		targets[templateLink] = from.Dir
		delete(targets, kernelLink) // it is in the guest's RAM
	case cfg.MemoryFile != "":
		targets[templateLink] = filepath.Dir(cfg.MemoryFile)
	}
	dir := filepath.Join(cfg.Dir, ownDir)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("cloud-hypervisor: %w", err)
	}
	for name, target := range targets {
		if target == "" {
			continue
		}
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("cloud-hypervisor: %w", err)
		}
	}
	return nil
}

// commandLine is the hypervisor's, without the binary. The VM's directory is named in
// it, by which a process is found that nobody has written down.
func commandLine(cfg vmm.Config, from *vmm.Snapshot) []string {
	args := []string{"--api-socket", "fd=" + strconv.Itoa(fdAPI), "--event-monitor", "fd=" + strconv.Itoa(fdEvents)}
	if from != nil {
		return append(args, "--restore", restoreArg(cfg.Dir, cfg.TAP != nil))
	}
	args = append(args,
		"--cpus", fmt.Sprintf("boot=%d,max=%d", cfg.Size.VCPUs, cfg.Max.VCPUs),
		"--memory", "size=0,hotplug_method=virtio-mem,thp="+onOff(cfg.MemoryFile == ""),
		"--memory-zone", zoneArg(cfg),
		"--kernel", filepath.Join(cfg.Dir, ownDir, kernelLink), "--cmdline", kernelParams(cfg),
		"--serial", "socket="+consoleSocket, "--console", "off",
		"--vsock", fmt.Sprintf("cid=%d,socket=%s", guestCID, guestSocket),
		"--disk", "path="+rootLink+",id=root,serial=root,readonly=on,sparse=off,image_type=raw",
	)
	if cfg.Scratch != "" {
		args = append(args, "path="+scratchLink+",id=scratch,serial="+vmm.ScratchSerial+",image_type=raw")
	}
	if cfg.TAP != nil {
		args = append(args, "--net", fmt.Sprintf("fd=[%d],id=%s,mac=%s", fdTAP, builtIn, vmm.BuiltInMAC))
	}
	return args
}

// restoreArg restores what is in templateLink of the VM with that directory. The RAM is a private mapping of the
// template's, as the snapshot's configuration has it: there is nothing to copy.
func restoreArg(dir string, nic bool) string {
	arg := "source_url=file://" + filepath.Join(dir, ownDir, templateLink) + ",memory_restore_mode=copy,resume=true"
	if nic {
		arg += fmt.Sprintf(",net_fds=[%s@[%d]]", builtIn, fdTAP)
	}
	return arg
}

// zoneArg is the guest's RAM: its own, or the file that a snapshot is to have. What is
// plugged is the VM's own in any case.
func zoneArg(cfg vmm.Config) string {
	arg := fmt.Sprintf("id=%s,size=%dM", zone, cfg.Size.MemoryBytes>>20)
	if cfg.MemoryFile != "" {
		arg += ",shared=on,file=" + templateLink + "/" + filepath.Base(cfg.MemoryFile)
	}
	if room := cfg.Max.MemoryBytes - cfg.Size.MemoryBytes; room > 0 {
		room = (room + plugUnit - 1) / plugUnit * plugUnit // Resize keeps to Config.Max
		arg += fmt.Sprintf(",hotplug_size=%dM", room>>20)
	}
	return arg
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// kernelParams is the guest kernel's command line.
func kernelParams(cfg vmm.Config) string {
	params := []string{
		"console=ttyS0", "quiet", "panic=-1",
		"root=/dev/vda", "rootfstype=erofs", "ro", "init=/init",
		// A second processor changes no kernel text, which each clone would have to copy.
		"noreplace-smp",
		// auto-movable: the kernel puts nothing of its own into memory that is plugged, up to
		// three times what it has booted with, so that all of that can be given back.
		"memhp_default_state=online", "memory_hotplug.online_policy=auto-movable",
		"random.trust_cpu=on", "rcupdate.rcu_expedited=1",
	}
	return strings.Join(append(params, cfg.KernelParams...), " ")
}
