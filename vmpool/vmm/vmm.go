// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package vmm is the contract between the controller and a hypervisor's driver.
// A driver is one folder beside this one; nothing outside it names the
// hypervisor. What drivers have in common, and a fake that behaves, is here too.
//
// # Order of calls
//
// Probe comes first and may be repeated. Boot, Restore and Attach make a VM;
// Driver methods may be called concurrently. A VM's methods may be called
// concurrently too, and in any order; after the VM has ended every one of them
// but State, ID, Done, Exit, Kill and Close fails with ErrUnavailable. Kill and Close are
// idempotent.
//
// # What a failure leaves behind
//
// A failed Boot or Restore leaves no process, cgroup or device, and in
// Config.Dir nothing but the console log. A failed hot-plug leaves the VM as it
// was. Errors wrap an errdefs sentinel: ErrInvalidArgument for a request that
// can never work, ErrNotImplemented for what this hypervisor cannot do,
// ErrUnavailable when the VM is gone, ErrFailedPrecondition when the host lacks
// something.
package vmm

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
)

// Driver runs VMs by one hypervisor. It keeps no state of its own: a VM is
// described by its State, which the caller persists.
type Driver interface {
	// Name is the driver's name in configuration and records, such as "qemu".
	Name() string
	// Probe finds out whether VMs can run on this host, and how. The error holds
	// every reason why not, and wraps ErrFailedPrecondition.
	Probe(ctx context.Context) (Host, error)
	// Boot starts a VM and returns when its process runs and is under control;
	// the guest may still be starting (VM.Dial waits for it).
	Boot(ctx context.Context, cfg Config) (VM, error)
	// Restore starts a VM from a snapshot that this driver made, and returns when
	// its guest runs. RAM is a private mapping of the snapshot's: its files stay as
	// they are, and are in use until the VM has ended. Config.Size and Config.Max
	// are the snapshot's, and Config.Scratch is a copy of the template's disk.
	Restore(ctx context.Context, cfg Config, from Snapshot) (VM, error)
	// Attach takes up a VM that another process of ours started, by the State
	// that was recorded. It returns ErrNotFound when that VM no longer runs; its
	// pid alone proves nothing, so start time and boot ID are compared.
	Attach(ctx context.Context, state State) (VM, error)
}

// Host is what Probe found.
type Host struct {
	// Driver is the name of the driver that was probed.
	Driver string
	// Binary is the hypervisor's path, Version its version as it tells it.
	Binary, Version string
	// Accelerator is "kvm", "mshv" or "tcg" (software emulation).
	Accelerator string
	// Reason says why this accelerator, for the log and for people.
	Reason string
	// SnapshotLayout names how this hypervisor's snapshots are made, where there is
	// more than one way: see Snapshot.Layout.
	SnapshotLayout string
	// OverheadBytes is the most that a VM's process takes beside its guest's memory.
	OverheadBytes int64
}

// Config describes a VM to start. The caller owns all files it names.
type Config struct {
	// ID names the VM in logs and processes.
	ID string
	// Dir is an existing directory of the VM's own, for sockets and logs. A
	// driver uses names of at most 12 bytes in it.
	Dir string
	// Kernel is the guest kernel, RootFS the guest's erofs image.
	Kernel, RootFS string
	// KernelParams are appended to the driver's own kernel parameters.
	KernelParams []string
	// Scratch is the VM's own writable disk image, Disk serial ScratchSerial.
	Scratch string
	// MemoryFile, if set, is the file that Boot makes and keeps the guest's RAM in,
	// so that a snapshot can be taken in the file's directory. Restore ignores it.
	MemoryFile string
	// TAP, if set, is the file of a TAP device (IFF_VNET_HDR) for the network device
	// that the machine then has from the start, with BuiltInMAC. A snapshot has that
	// device too: Restore wants a TAP if, and only if, the template had one. The file
	// stays the caller's, who may close it when Boot or Restore returns.
	TAP *os.File
	// Size is what the VM starts with, Max up to what Resize may go.
	Size, Max Size
	// ConsoleLimit bounds the console log, in bytes; older output is dropped first.
	ConsoleLimit int64
	// CgroupPath is the cgroup to make and to run the VMM in, below the
	// hierarchy's root; empty means none.
	CgroupPath string
	// UID is the user, and the group of that number, that the VMM runs as, no other
	// process does, and that owns nothing: a driver lets it have what its VM needs. With
	// 0 it runs as this process does, and is confined by nothing but its own filter.
	UID uint32
}

// ScratchSerial is the virtio-blk serial of Config.Scratch in the guest.
const ScratchSerial = "scratch"

// ImageSerial is the serial of the disk for an image that a machine may have from its
// start: see VM.AddDisk.
const ImageSerial = "image"

// BuiltInMAC is the address of the network device that a VM has from the start. All
// VMs begin with the same: the agent gives the device the pod's before it is up.
const BuiltInMAC = "02:63:68:76:00:00"

// Names of files in Config.Dir, and the limit that they stay under.
const (
	// ConsoleLog is what the guest's console printed, ConsoleLog + ".1" what came before.
	ConsoleLog = "console.log"
	// VMMLog is what the VMM itself printed.
	VMMLog = "vmm.log"
	// MaxDirName is the longest name that a driver uses in Config.Dir, in bytes.
	MaxDirName = 12
)

// KeptError tells that a guest has not given back the memory that was asked for. It
// is an ErrUnavailable.
type KeptError struct {
	// MemoryBytes is what the VM has, and Wanted what it was to have.
	MemoryBytes, Wanted int64
}

func (e *KeptError) Error() string {
	return fmt.Sprintf("the guest keeps memory in use: it has %d bytes, of which %d should be left", e.MemoryBytes, e.Wanted)
}

// Unwrap makes it an ErrUnavailable.
func (e *KeptError) Unwrap() error { return errdefs.ErrUnavailable }

// Size is how large a VM is.
type Size struct {
	// VCPUs that may run. See VM.Resize.
	VCPUs int
	// MemoryBytes of RAM.
	MemoryBytes int64
}

// State is what must be recorded to Attach to a VM later.
type State struct {
	Driver string `json:"driver"`
	ID     string `json:"id"`
	Dir    string `json:"dir"`
	// Pid is the VMM's process, StartTime its start in clock ticks since boot
	// (field 22 of /proc/pid/stat) and BootID the host's boot it belongs to.
	Pid       int    `json:"pid"`
	StartTime uint64 `json:"start_time"`
	BootID    string `json:"boot_id"`
	// Cgroup is Config.CgroupPath, UID Config.UID.
	Cgroup string `json:"cgroup,omitempty"`
	UID    uint32 `json:"uid,omitempty"`
	// Data is the driver's own.
	Data json.RawMessage `json:"data,omitempty"`
}

// Identity is that of the VMM's process.
func (s State) Identity() process.Identity {
	return process.Identity{Pid: s.Pid, StartTime: s.StartTime, BootID: s.BootID}
}

// VM is one running virtual machine.
type VM interface {
	// ID is Config.ID.
	ID() string
	// State is what Attach needs; it changes with hot-plug and Resize, so record
	// it after those.
	State() State
	// Dial connects to a port of the guest's agent. While the guest starts it
	// waits; it returns ErrUnavailable as soon as the VM has ended.
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	// PodEndpoint is the address by which another process, the pod's shim, dials
	// the guest with transport.Open. One process at a time may hold it.
	PodEndpoint() string

	// AddDisk makes a disk one of the guest's and returns the serial by which the
	// guest finds it. A device that is hot-plugged has Disk.Serial. A driver may have
	// given the machine an empty read-only disk from the start, with ImageSerial, into
	// which it puts the first image file that fits, as no device has to be found then: the
	// guest then sees a larger disk, whose end cannot be read, and must have kept
	// nothing of what it read there before.
	// RemoveDisk takes the disk with that Disk.Serial away. A hot-plugged one the guest
	// must give back; the other one is empty at once, so the guest is to have unmounted
	// it. Removing what is not there succeeds.
	AddDisk(ctx context.Context, disk Disk) (serial string, _ error)
	RemoveDisk(ctx context.Context, serial string) error
	// AddNIC hot-plugs a network device and RemoveNIC unplugs it. The files stay
	// the caller's, who may close them when AddNIC returns.
	AddNIC(ctx context.Context, nic NIC) error
	RemoveNIC(ctx context.Context, id string) error
	// Resize makes the VM's memory and vCPUs as large as said, or says why not.
	// The guest has answered before. Its agent's Resize must follow a growth and precede
	// a shrinking.
	// Memory is the guest's to give back: a Resize that shrinks it waits some
	// seconds, and fails with a KeptError if the guest keeps some, which it goes on
	// giving back when it can. Calling Resize again with the same size hurries it, and
	// with a larger one lets the guest keep what it has.
	Resize(ctx context.Context, size Size) error

	// Pause stops the vCPUs, Resume lets them run.
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	// Disconnect ends this process's connections to the guest, which Dial makes
	// anew, and returns when the guest has come to rest, or at the latest when ctx
	// ends. It precedes the Pause for a Snapshot.
	Disconnect(ctx context.Context) error
	// Snapshot completes the snapshot of a paused VM in the directory of its
	// Config.MemoryFile. That file is the guest's RAM, so the VM must not be resumed
	// afterwards, but killed. ErrFailedPrecondition means that it is not paused, or
	// was booted without a MemoryFile.
	Snapshot(ctx context.Context) (Snapshot, error)
	// SetCgroup moves the VMM into another group, which it makes, and removes the
	// one that it was in. State changes.
	SetCgroup(ctx context.Context, path string) error

	// Kill ends the VMM process at once, waits for it and removes what it leaves
	// (its cgroup, sockets). For a clean end ask the agent to power off first.
	Kill(ctx context.Context) error
	// Close lets go of the VM without ending it: connections, watchers, files.
	Close() error
	// Done is closed when the VMM process has ended; Exit then tells about it.
	Done() <-chan struct{}
	Exit() Exit
}

// Exit tells how a VM ended.
type Exit struct {
	At time.Time
	// Cause in words: "guest powered off", "killed by signal 9", with the last
	// lines of the VMM's own log if it failed.
	Cause string
	// Requested is true if Kill was called or the guest turned itself off.
	Requested bool
}

// Disk is a block device to plug.
type Disk struct {
	// Serial identifies it among the VM's disks: 1 to 20 of [a-z0-9-], and neither
	// ScratchSerial nor ImageSerial. As a rule it is the virtio-blk serial: see
	// VM.AddDisk.
	Serial string
	// Path of a raw image or block device. The guest sees a block device with the size
	// and the sizes of blocks that it has; its node on the host stays as it is.
	Path     string
	ReadOnly bool
}

// NIC is a network device to plug, on TAP file descriptors that are opened by
// the caller with IFF_VNET_HDR, one per queue pair.
type NIC struct {
	// ID identifies it among the VM's NICs: 1 to 12 of [a-z0-9-].
	ID  string
	MAC net.HardwareAddr
	MTU int
	// Queues are the TAP's files.
	Queues []*os.File
}

// Snapshot is a VM's state on disk: the files in Dir.
type Snapshot struct {
	Driver string `json:"driver"`
	// Layout is Host.SnapshotLayout of when it was made. A driver refuses one that it
	// does not know.
	Layout string `json:"layout,omitempty"`
	Dir    string `json:"-"`
	// Size of the machine in it, and the Max it was booted with.
	Size Size `json:"size"`
	Max  Size `json:"max"`
	// BuiltInNIC tells that it has a network device: see Config.TAP.
	BuiltInNIC bool `json:"built_in_nic,omitempty"`
}

// CheckTAP says whether a VM can be restored with a TAP, or without. The error
// wraps ErrInvalidArgument.
func (s Snapshot) CheckTAP(tap *os.File) error {
	if s.BuiltInNIC != (tap != nil) {
		return fmt.Errorf("the snapshot has a network device: %v; a TAP was given: %v: %w", s.BuiltInNIC, tap != nil, errdefs.ErrInvalidArgument)
	}
	return nil
}
