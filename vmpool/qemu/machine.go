// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// File descriptors that QEMU inherits. Its sockets are made before it starts, so
// that nobody has to wait for them to appear.
const (
	fdMonitor = 3 + iota
	fdConsole
	fdVM
	fdPod
	// firstFile is that of the first file that is there only if it is wanted.
	firstFile
)

// inherited collects the files that QEMU inherits, from firstFile on: so it need not
// be able to open them. They are its own to close, except the TAP.
type inherited struct {
	files []*os.File
	// paths are those of the files that it finds in a set, by the set's number.
	paths map[int]string
	// tap, kernel, root and scratch are descriptors and sets.
	tap, kernel, root, scratch int
}

func (i *inherited) add(f *os.File) (fd int) {
	i.files = append(i.files, f)
	return firstFile + len(i.files) - 1
}

// open opens a file for QEMU. Its descriptor is the number of its set too.
func (i *inherited) open(path string, flag int) (fd int, _ error) {
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return 0, fmt.Errorf("qemu: %w", err)
	}
	fd = i.add(f)
	i.paths[fd] = path
	return fd, nil
}

// inherit opens what QEMU inherits of a configuration. The caller calls closeOwn, after
// an error too.
func inherit(cfg vmm.Config, from *vmm.Snapshot) (i *inherited, err error) {
	i = &inherited{paths: map[int]string{}}
	if cfg.TAP != nil {
		i.tap = i.add(cfg.TAP)
	}
	if i.root, err = i.open(cfg.RootFS, os.O_RDONLY); err != nil {
		return i, err
	}
	if cfg.Scratch != "" {
		if i.scratch, err = i.open(cfg.Scratch, os.O_RDWR); err != nil {
			return i, err
		}
	}
	if from == nil {
		i.kernel, err = i.open(cfg.Kernel, os.O_RDONLY)
	}
	return i, err
}

func (i *inherited) closeOwn() {
	for n, f := range i.files {
		if firstFile+n != i.tap {
			_ = f.Close()
		}
	}
}

// setArgs name the sets. A set's opaque part is for those who look at a command line.
func (i *inherited) setArgs() (args []string) {
	for _, fd := range slices.Sorted(maps.Keys(i.paths)) {
		if fd != i.kernel {
			args = append(args, "-add-fd", fmt.Sprintf("fd=%d,set=%d,opaque=%s", fd, fd, escape(i.paths[fd])))
		}
	}
	return args
}

// setPath is what QEMU opens for a file in a set.
func setPath(set int) string { return "/dev/fdset/" + strconv.Itoa(set) }

// Sockets in Config.Dir, in the order of the descriptors.
var socketNames = []string{fdMonitor - 3: "qmp.sock", fdConsole - 3: "con.sock", fdVM - 3: "vm.sock", fdPod - 3: "pod.sock"}

// builtIn is the ID of the network device that is there from the start, and of
// its netdev. No NIC that is plugged has such an ID.
const builtIn = "builtin"

const (
	monitorSocket = "qmp.sock"
	consoleSocket = "con.sock"
	vmSocket      = "vm.sock"
	podSocket     = "pod.sock"
	// logPipe is a FIFO for what QEMU prints: it is bounded, and keeps the last
	// words for a reader that comes later.
	logPipe = "vmm.fifo"
)

// memoryGap is room for QEMU to align the hot-plugged region in.
const memoryGap = 1 << 30

const (
	// slots is how many disks and NICs can be hot-plugged: each takes a PCI Express
	// port of its own, which costs some 10 ms of an emulated boot.
	slots = 20
	// firstSlotDevice is where the ports begin on the root bus, eight to a device.
	firstSlotDevice = 16
)

func slotName(slot int) string { return "slot" + strconv.Itoa(slot) }

// modern devices lack the registers of virtio before 1.0, which take I/O ports.
const modern = ",disable-legacy=on"

// memoryDevice is the virtio-mem device's ID.
const memoryDevice = "vmem0"

// commandLine is QEMU's, without the binary. What is there from the start sits on
// the root bus, what is hot-plugged behind ports that ACPI knows. The machine is
// the same whether it boots or is restored, as its state demands.
func commandLine(cfg vmm.Config, accel string, from *vmm.Snapshot, has *inherited) []string {
	args := []string{
		"-name", "cloudhv-" + escape(cfg.ID),
		"-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", "q35,sata=off,smbus=off,hpet=off,vmport=off,i8042=off,dump-guest-core=off,memory-backend=ram",
		// qboot does what a kernel given to QEMU needs, in a tenth of SeaBIOS's time.
		"-bios", "qboot.rom",
		"-smp", strconv.Itoa(cfg.Max.VCPUs),
		"-m", fmt.Sprintf("size=%dM,slots=1,maxmem=%dM", cfg.Size.MemoryBytes>>20, (cfg.Max.MemoryBytes+memoryGap)>>20),
		"-object", memoryArg(cfg, from),
		// A VM whose state does not say whether it ran runs when it is loaded.
		"-global", "migration.store-global-state=off",
	}
	args = append(args, has.setArgs()...)
	if from == nil {
		args = append(args, "-kernel", ownFile(has.kernel), "-append", kernelParams(cfg, accel))
	} else {
		// What -kernel brings with it is part of the machine. The kernel is not read.
		args = append(args, "-option-rom", "pvh.bin", "-incoming", "defer")
	}
	if accel == vmm.AccelKVM {
		args = append(args, "-accel", "kvm", "-cpu", "host")
	} else {
		args = append(args, "-accel", fmt.Sprintf("tcg,thread=multi,tb-size=%d", codeBuffer>>20), "-cpu", "max")
	}
	args = append(args, diskArgs("root", "root", has.root, true)...)
	if cfg.Scratch != "" {
		args = append(args, diskArgs("scratch", vmm.ScratchSerial, has.scratch, false)...)
	}
	args = append(args, imageArgs()...)
	if room := cfg.Max.MemoryBytes - cfg.Size.MemoryBytes; room > 0 {
		args = append(args,
			"-object", fmt.Sprintf("memory-backend-ram,id=vmem,size=%d,reserve=off", room),
			"-device", "virtio-mem-pci,id="+memoryDevice+",memdev=vmem,requested-size=0")
	}
	for slot := range slots {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=%s,bus=pcie.0,chassis=%d,multifunction=on,addr=%d.%d",
			slotName(slot), slot+1, firstSlotDevice+slot/8, slot%8))
	}
	if cfg.TAP != nil {
		// A clone announces nothing: the guest gives the device its address later.
		args = append(args, "-netdev", fmt.Sprintf("tap,id=%s,fd=%d,vhost=off", builtIn, has.tap),
			"-device", fmt.Sprintf("virtio-net-pci,id=%s,netdev=%s,mac=%s,romfile=,guest_announce=off", builtIn, builtIn, vmm.BuiltInMAC)+modern)
	}
	args = append(args,
		"-device", "virtio-rng-pci"+modern, "-device", "virtio-serial-pci,id=serial,max_ports=3"+modern)
	args = append(args, chardev(fdMonitor, "monitor", "-mon", "chardev=monitor,mode=control")...)
	args = append(args, chardev(fdConsole, "console", "-serial", "chardev:console")...)
	args = append(args, chardev(fdVM, "vm", "-device", "virtserialport,bus=serial.0,nr=1,chardev=vm,name=io.cloudhv.vm")...)
	args = append(args, chardev(fdPod, "pod", "-device", "virtserialport,bus=serial.0,nr=2,chardev=pod,name=io.cloudhv.pod")...)
	return args
}

// memoryArg is the guest's RAM: its own; the file that a snapshot is to have; or
// the snapshot's, of which a page is copied when it is written.
func memoryArg(cfg vmm.Config, from *vmm.Snapshot) string {
	switch {
	case from != nil:
		return fmt.Sprintf("memory-backend-file,id=ram,size=%d,share=off,mem-path=%s", cfg.Size.MemoryBytes, escape(memoryPath(from.Dir)))
	case cfg.MemoryFile != "":
		return fmt.Sprintf("memory-backend-file,id=ram,size=%d,share=on,mem-path=%s", cfg.Size.MemoryBytes, escape(cfg.MemoryFile))
	default:
		return fmt.Sprintf("memory-backend-ram,id=ram,size=%d", cfg.Size.MemoryBytes)
	}
}

func chardev(fd int, id string, use ...string) []string {
	return append([]string{"-chardev", fmt.Sprintf("socket,id=%s,fd=%d,server=on,wait=off", id, fd)}, use...)
}

// ownFile is the path by which QEMU opens a file that it has inherited.
func ownFile(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// diskArgs attach a raw image from the start. The scratch disk's content dies
// with the VM, so its flushes need not reach the host's disk; a full host is an
// I/O error in the guest and no stopped VM.
func diskArgs(id, serial string, set int, readOnly bool) []string {
	blockdev := fmt.Sprintf("driver=raw,node-name=%s,read-only=%s,cache.no-flush=on,discard=unmap,file.driver=file,file.locking=off,file.filename=%s",
		id, onOff(readOnly), setPath(set))
	if readOnly {
		blockdev = fmt.Sprintf("driver=raw,node-name=%s,read-only=on,file.driver=file,file.locking=off,file.filename=%s", id, setPath(set))
	}
	return []string{
		"-blockdev", blockdev,
		"-device", fmt.Sprintf("virtio-blk-pci,drive=%s,serial=%s,werror=report,rerror=report", id, serial) + modern,
	}
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// escape doubles the commas that separate QEMU's options.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// guestHZ is the guest kernel's CONFIG_HZ.
const guestHZ = 100

// hostTSC is measured once.
var hostTSC = sync.OnceValue(tscKHz)

// kernelParams is the guest kernel's command line. Config.Size's processors start;
// the agent brings others on line when the pod asks for them.
func kernelParams(cfg vmm.Config, accel string) string {
	params := []string{
		"console=ttyS0", "quiet", "panic=-1",
		"root=/dev/vda", "rootfstype=erofs", "ro", "init=/init",
		// noreplace-smp: no patching of kernel text when a second processor comes.
		fmt.Sprintf("maxcpus=%d", cfg.Size.VCPUs), "noreplace-smp",
		// auto-movable: the kernel puts nothing of its own into memory that is plugged, up to
		// three times what it has booted with, so that all of that can be given back.
		"memhp_default_state=online", "memory_hotplug.online_policy=auto-movable",
		"random.trust_cpu=on", "rcupdate.rcu_expedited=1",
	}
	if accel == vmm.AccelTCG {
		// An emulated processor does not speculate.
		params = append(params, "mitigations=off", "tsc=reliable", "no_timer_check")
		if khz := hostTSC(); khz > 0 {
			// The counter's frequency, and from it the delay loop's, which each
			// processor would calibrate anew.
			params = append(params, fmt.Sprintf("tsc_early_khz=%d", khz), fmt.Sprintf("lpj=%d", khz*1000/guestHZ))
		}
	}
	return strings.Join(append(params, cfg.KernelParams...), " ")
}
