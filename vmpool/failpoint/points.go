// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package failpoint

// Create: what a sandbox has before it is started.
const (
	// CreateDir is before the sandbox's directory is made.
	CreateDir Point = "create/dir"
	// CreateRecord is before the first record is written.
	CreateRecord Point = "create/record"
	// CreateGroupLink is before the link to the VMM's cgroup is made.
	CreateGroupLink Point = "create/group-link"
	// CreateDone is when all is made.
	CreateDone Point = "create/done"
)

// Start: a VM, its network and its shim.
const (
	// StartRecord is before the record says that the sandbox starts.
	StartRecord Point = "start/record"
	// StartAcquired is before the record names the VM that the pool gave.
	StartAcquired Point = "start/acquired"
	// StartForwards is before the port-forwards' listeners are made.
	StartForwards Point = "start/forwards"
	// StartShimConfig, StartShimSocket and StartShimLog are before the shim's files are made.
	StartShimConfig Point = "start/shim-config"
	StartShimSocket Point = "start/shim-socket"
	StartShimLog    Point = "start/shim-log"
	// StartShim is before the shim's process is started.
	StartShim Point = "start/shim"
	// StartShimRecord is before the record names the shim that runs.
	StartShimRecord Point = "start/shim-record"
	// StartJoin is before the pod's network is joined to the VM.
	StartJoin Point = "start/join"
	// StartNIC is before a further network device is plugged in.
	StartNIC Point = "start/nic"
	// StartGuest is before the guest's first answer is awaited.
	StartGuest Point = "start/guest"
	// StartGuestRecord is before the record tells of the guest.
	StartGuestRecord Point = "start/guest-record"
	// StartResize is before the VM is made as large as the pod.
	StartResize Point = "start/resize"
	// StartConfigure is before the agent makes the VM the pod's.
	StartConfigure Point = "start/configure"
	// StartVMRecord is before the record tells of the VM as it is now.
	StartVMRecord Point = "start/vm-record"
	// StartReady is before the record says that the sandbox is ready.
	StartReady Point = "start/ready"
	// StartDone is when the sandbox is ready, and nobody knows.
	StartDone Point = "start/done"
)

// Boot: the VM of a sandbox that gets none from the pool.
const (
	// BootUser is before the record names the VMM's user.
	BootUser Point = "boot/user"
	// BootScratch is before the writable disk is made.
	BootScratch Point = "boot/scratch"
	// BootTAP is before the TAP of the built-in network device is made.
	BootTAP Point = "boot/tap"
	// BootVMM is before the driver is asked.
	BootVMM Point = "boot/vmm"
	// BootRecord is before the record names the VMM that runs.
	BootRecord Point = "boot/record"
)

// Move: the processes of a ready sandbox enter their pod's cgroup, in the background.
const (
	// MoveVMM and MoveShim are before the processes are moved.
	MoveVMM  Point = "move/vmm"
	MoveShim Point = "move/shim"
	// MoveRecord is before the record names the VMM's new cgroup.
	MoveRecord Point = "move/record"
)

// Join: the pod's network and the VM's.
const (
	// JoinPair is before the pair of devices is made, JoinPairUp before its end is led to
	// the VM's TAP.
	JoinPair   Point = "join/pair"
	JoinPairUp Point = "join/pair-up"
	// JoinTAP is before the TAP of a further interface is made.
	JoinTAP Point = "join/tap"
	// JoinRedirect is before CNI's interface is redirected.
	JoinRedirect Point = "join/redirect"
)

// End: Stop, and what a sandbox comes to whose VM or shim has died, or whose start has
// failed.
const (
	// EndRecord is before the record says that the sandbox is being stopped.
	EndRecord Point = "end/record"
	// EndShimLeaves is before the shim leaves the pod's cgroup.
	EndShimLeaves Point = "end/shim-leaves"
	// EndPowerOff is before the guest is asked to end.
	EndPowerOff Point = "end/power-off"
	// EndKill is before the VMM is killed.
	EndKill Point = "end/kill"
	// EndNetwork is before the network is disconnected.
	EndNetwork Point = "end/network"
	// EndScratch is before the writable disk is removed.
	EndScratch Point = "end/scratch"
	// EndGroups is before the VMM's cgroup is removed.
	EndGroups Point = "end/groups"
	// EndStopped is before the record says that the sandbox is stopped.
	EndStopped Point = "end/stopped"
	// EndDone is when that is written.
	EndDone Point = "end/done"
)

// Remove: Shutdown, after the sandbox has ended.
const (
	// RemoveShim is before the shim is ended.
	RemoveShim Point = "remove/shim"
	// RemoveGroups is before its cgroups are removed.
	RemoveGroups Point = "remove/groups"
	// RemoveNetwork is before the rest of the network is removed.
	RemoveNetwork Point = "remove/network"
	// RemoveVM is before what the pool knows of the VM is removed.
	RemoveVM Point = "remove/vm"
	// RemoveDir is before the sandbox's directory is removed, RemoveDone when it is.
	RemoveDir  Point = "remove/dir"
	RemoveDone Point = "remove/done"
)

// Update: another size of a VM that runs.
const (
	// UpdateRecord is before the record says that the size is open.
	UpdateRecord Point = "update/record"
	// UpdateGrow is before the VM grows, UpdateGuestGrown before the guest is told.
	UpdateGrow       Point = "update/grow"
	UpdateGuestGrown Point = "update/guest-grown"
	// UpdateGuestShrinks is before the guest lets go, UpdateShrink before the VM shrinks,
	// and UpdateGuestShrunk before the guest is told.
	UpdateGuestShrinks Point = "update/guest-shrinks"
	UpdateShrink       Point = "update/shrink"
	UpdateGuestShrunk  Point = "update/guest-shrunk"
	// UpdateTakeBack is before a VM gets back the size that it had.
	UpdateTakeBack Point = "update/take-back"
	// UpdateDone is before the record tells of the new size.
	UpdateDone Point = "update/done"
	// UpdateSizing is before the record tells what decides a size that stays.
	UpdateSizing Point = "update/sizing"
)

// Attach: the controller's part of a container's creation.
const (
	// AttachImage is before the image's file is made or found.
	AttachImage Point = "attach/image"
	// AttachRecord is before the record says that the disk is being plugged.
	AttachRecord Point = "attach/record"
	// AttachUnplug is before a disk is removed of which nobody knows whether it is there.
	AttachUnplug Point = "attach/unplug"
	// AttachDisk is before the disk is plugged in.
	AttachDisk Point = "attach/disk"
	// AttachDone is before the record says that the disk is there.
	AttachDone Point = "attach/done"
	// AttachRefused is before the record says that it is not.
	AttachRefused Point = "attach/refused"
)

// Disk: a block device or direct volume of the host's becomes a container's, and is taken away.
const (
	// DiskShare is before the record says that another container has a disk that is there.
	DiskShare Point = "disk/share"
	// DiskRecord is before the record says that a disk is being plugged in.
	DiskRecord Point = "disk/record"
	// DiskUnplug is before a disk is removed of which nobody knows whether it is there.
	DiskUnplug Point = "disk/unplug"
	// DiskPlug is before the disk is plugged in, DiskDone before the record says that it is.
	DiskPlug Point = "disk/plug"
	DiskDone Point = "disk/done"
	// DiskForget is before the record says that it is not.
	DiskForget Point = "disk/forget"
	// DiskUnshare is before the record says that a container has a disk no more that others have.
	DiskUnshare Point = "disk/unshare"
	// DiskRelease is before the record says that a disk is being taken away, DiskRemove before
	// it is, and DiskRemoved before the record forgets it.
	DiskRelease Point = "disk/release"
	DiskRemove  Point = "disk/remove"
	DiskRemoved Point = "disk/removed"
)

// Image: the file of an image's layers is made.
const (
	// ImageFile is before the file is made that is to be the image.
	ImageFile Point = "image/file"
	// ImageMountPoint is before the directory is made for a view of the layers.
	ImageMountPoint Point = "image/mount-point"
	// ImageLease is before the view's lease is made, ImageView before the view is.
	ImageLease Point = "image/lease"
	ImageView  Point = "image/view"
	// ImageMount is before the view is mounted.
	ImageMount Point = "image/mount"
	// ImageWrite is before the image is written.
	ImageWrite Point = "image/write"
	// ImageCommit is before it gets its name.
	ImageCommit Point = "image/commit"
)

// VM: what every VM of the pool has, for a pod that waits, for the pool or for a proof.
const (
	// VMDir is before the VM's directory is made.
	VMDir Point = "vm/dir"
	// VMRecord is before its first record is written.
	VMRecord Point = "vm/record"
	// VMScratch is before its disk is copied.
	VMScratch Point = "vm/scratch"
	// VMTAP is before its TAP is made.
	VMTAP Point = "vm/tap"
	// VMRestore is before the driver is asked.
	VMRestore Point = "vm/restore"
	// VMStarted is before the record names the VMM that runs.
	VMStarted Point = "vm/started"
)

// VMM: what drivers do to start one.
const (
	// VMMCgroup is before the VMM's cgroup is made, VMMLimits before it gets its limits.
	VMMCgroup Point = "vmm/cgroup"
	VMMLimits Point = "vmm/limits"
	// VMMFiles is before sockets and pipes are made.
	VMMFiles Point = "vmm/files"
	// VMMProcess is before the process is started.
	VMMProcess Point = "vmm/process"
	// VMMEnter is before the process enters its cgroup.
	VMMEnter Point = "vmm/enter"
	// VMMControl is before the driver connects to the VMM.
	VMMControl Point = "vmm/control"
	// VMMLoad is before the snapshot's state is loaded.
	VMMLoad Point = "vmm/load"
	// VMMRuns is when the VMM runs, and nobody knows.
	VMMRuns Point = "vmm/runs"
)

// Refill: a VM becomes one of the ready ones.
const (
	// RefillAnswer is before the guest's answer is awaited.
	RefillAnswer Point = "refill/answer"
	// RefillWarmUp is before it is made warm.
	RefillWarmUp Point = "refill/warm-up"
	// RefillPause is before it is paused.
	RefillPause Point = "refill/pause"
	// RefillRecord is before the record says that it is ready.
	RefillRecord Point = "refill/record"
	// RefillDone is before it may be handed out.
	RefillDone Point = "refill/done"
)

// Handover: a pod gets a VM that was ready.
const (
	// HandoverRecord is before the record names the pod.
	HandoverRecord Point = "handover/record"
	// HandoverResume is before the VM goes on.
	HandoverResume Point = "handover/resume"
	// HandoverCheck is before its guest is asked.
	HandoverCheck Point = "handover/check"
	// HandoverDone is when it has answered.
	HandoverDone Point = "handover/done"
)

// Discard: a VM of the pool is ended.
const (
	// DiscardKill is before the VMM is killed.
	DiscardKill Point = "discard/kill"
	// DiscardScratch is before its disk is removed, DiscardGroup before its cgroup, and
	// DiscardDir before its directory.
	DiscardScratch Point = "discard/scratch"
	DiscardGroup   Point = "discard/group"
	DiscardDir     Point = "discard/dir"
)

// Snapshot: the base snapshot is made.
const (
	// SnapshotDir is before its directory is made aside, SnapshotMemory before the file of
	// the guest's memory.
	SnapshotDir    Point = "snapshot/dir"
	SnapshotMemory Point = "snapshot/memory"
	// SnapshotScratch is before the template's disk is made, SnapshotTAP before its TAP,
	// and SnapshotBoot before it is booted.
	SnapshotScratch Point = "snapshot/scratch"
	SnapshotTAP     Point = "snapshot/tap"
	SnapshotBoot    Point = "snapshot/boot"
	// SnapshotStarted is before the record names the template's VMM.
	SnapshotStarted Point = "snapshot/started"
	// SnapshotAnswer is before the template's guest is awaited, SnapshotWarmUp before it is
	// made warm.
	SnapshotAnswer Point = "snapshot/answer"
	SnapshotWarmUp Point = "snapshot/warm-up"
	// SnapshotDisconnect, SnapshotPause and SnapshotSave are before the template is let go,
	// paused and saved; SnapshotKill is before it is killed.
	SnapshotDisconnect Point = "snapshot/disconnect"
	SnapshotPause      Point = "snapshot/pause"
	SnapshotSave       Point = "snapshot/save"
	SnapshotKill       Point = "snapshot/kill"
	// SnapshotDisk is before the template's disk becomes the snapshot's, SnapshotOwner
	// before it is given to us.
	SnapshotDisk  Point = "snapshot/disk"
	SnapshotOwner Point = "snapshot/owner"
	// SnapshotProve is before a VM is restored from it.
	SnapshotProve Point = "snapshot/prove"
	// SnapshotSeal is before the manifest is written, SnapshotName before the directory gets
	// its name, and SnapshotRead before it is read.
	SnapshotSeal Point = "snapshot/seal"
	SnapshotName Point = "snapshot/name"
	SnapshotRead Point = "snapshot/read"
	// SnapshotAway is before one is taken away that nothing wants, SnapshotDelete before its
	// files are removed.
	SnapshotAway   Point = "snapshot/away"
	SnapshotDelete Point = "snapshot/delete"
)

// Recover: what a containerd does first with what an earlier one left.
const (
	// RecoverFind is before a record is read.
	RecoverFind Point = "recover/find"
	// RecoverHold is before the processes of a sandbox are taken hold of.
	RecoverHold Point = "recover/hold"
	// RecoverPool is before the pool's VMs are taken up.
	RecoverPool Point = "recover/pool"
	// RecoverPoolAttach is before one of them is, and RecoverPoolKill before one is killed.
	RecoverPoolAttach Point = "recover/pool-attach"
	RecoverPoolKill   Point = "recover/pool-kill"
	// RecoverNone is before the directory of a sandbox without a record is removed.
	RecoverNone Point = "recover/none"
	// RecoverStrays is before processes are looked for that no record names.
	RecoverStrays Point = "recover/strays"
	// RecoverEnd is before a sandbox is ended that cannot go on.
	RecoverEnd Point = "recover/end"
	// RecoverOrphan is before a sandbox is removed that containerd does not know.
	RecoverOrphan Point = "recover/orphan"
	// RecoverAttach is before the driver takes up a VM, RecoverAdopt before it is the sandbox's.
	RecoverAttach Point = "recover/attach"
	RecoverAdopt  Point = "recover/adopt"
	// RecoverAside is before a damaged record is set aside.
	RecoverAside Point = "recover/aside"
	// RecoverSweep is before what nobody claims is removed.
	RecoverSweep Point = "recover/sweep"
	// RecoverDone is when all sandboxes are known.
	RecoverDone Point = "recover/done"
)

// Task: the shim's part.
const (
	// TaskCreateVolumes is before the container's mounts are cloned.
	TaskCreateVolumes Point = "task-create/volumes"
	// TaskCreateGrow and TaskCreateAttach are before the controller is asked.
	TaskCreateGrow   Point = "task-create/grow"
	TaskCreateAttach Point = "task-create/attach"
	// TaskCreateDisks is before the controller is asked for disks of the host's, and
	// TaskDeleteDisks before it is asked to take them away.
	TaskCreateDisks Point = "task-create/disks"
	TaskDeleteDisks Point = "task-delete/disks"
	// TaskCreateStreams is before the guest's streams are dialled.
	TaskCreateStreams Point = "task-create/streams"
	// TaskCreateMount is before the guest mounts the volumes.
	TaskCreateMount Point = "task-create/mount"
	// TaskCreateGuest is before the agent creates the container, TaskCreateDone when it has.
	TaskCreateGuest Point = "task-create/guest"
	TaskCreateDone  Point = "task-create/done"
	// TaskStartGuest is before the agent starts the container, TaskStartDone when it has.
	TaskStartGuest Point = "task-start/guest"
	TaskStartDone  Point = "task-start/done"
	// ExecStreams is before the guest's streams are dialled, ExecGuest before the agent is
	// told of the process, and ExecDone when it is.
	ExecStreams Point = "exec/streams"
	ExecGuest   Point = "exec/guest"
	ExecDone    Point = "exec/done"
	// ExecStartGuest is before the agent starts the process, ExecStartDone when it has.
	ExecStartGuest Point = "exec/start-guest"
	ExecStartDone  Point = "exec/start-done"
	// TaskKillGuest is before the agent sends a signal.
	TaskKillGuest Point = "task-kill/guest"
	// TaskDeleteGuest is before the agent deletes a container, TaskDeleteDone when it has.
	TaskDeleteGuest Point = "task-delete/guest"
	TaskDeleteDone  Point = "task-delete/done"
	// ExecDeleteGuest and ExecDeleteDone are the same for a process that was added.
	ExecDeleteGuest Point = "exec/delete-guest"
	ExecDeleteDone  Point = "exec/delete-done"
	// TaskUpdateGrow is before the controller is asked for a larger VM, TaskUpdateGuest
	// before the agent changes a container's limits.
	TaskUpdateGuest Point = "task-update/guest"
	// TaskLost is before the shim notes that the VM is lost.
	TaskLost Point = "task-lost/note"
)
