// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package points

// exempt are the functions with side effects that have no point, by the reason.
var exempt = reasons(map[string][]string{
	"the point is before its one call": {
		"controller/clock.go stampedConfigure",
		"controller/controller.go Clear",
		"controller/controller.go Disconnect",
		"controller/controller.go Listen",
		"controller/guest.go askResize",
		"controller/guest.go guestOf",
		"controller/guest.go powerOff",
		"controller/held.go Kill",
		"controller/network/waiting.go Make",
		"controller/pool.go WarmUp",
		"controller/record.go save",
		"controller/recover.go keepDamaged",
		"controller/rootfs/build.go commit",
		"controller/rootfs/mkfs.go wait",
		"controller/scratch.go make",
		"controller/scratch.go removeScratch",
		"controller/shim/sizing.go askResize",
		"controller/shims.go listenFile",
		"vmpool/make.go move",
		"vmpool/record.go save",
		"vmpool/snapshot/manifest.go seal",
		"vmpool/vmm/vmproc/files.go Listen",
		"vmpool/vmm/vmproc/vmproc.go Kill",
	},
	"it undoes what has failed": {
		"controller/create.go Create",
		"controller/rootfs/store.go removeFile",
		"vmpool/snapshot/store.go Collect",
		"controller/shims.go holdShim",
	},
	"it follows the end of a process, whatever ended it": {
		"vmpool/vmm/vmproc/vmproc.go RemoveFiles",
		"vmpool/vmm/vmproc/vmproc.go watch",
	},
	"it is done once a node, when containerd starts or the first pod comes": {
		"controller/network/waiting.go Remove",
		"controller/network/waiting.go mount",
		"controller/rootfs/store.go New",
		"controller/scratch.go makeTemplate",
		"controller/scratch.go template",
		"vmpool/pool.go New",
		"vmpool/snapshot/store.go Open",
	},
	"without it all goes on, and the log says so": {
		"controller/shims.go resetOOMScore",
		"vmpool/vmm/vmproc/vmproc.go adjustOOM",
	},
	"it asks, and changes nothing that outlives the VM": {
		"controller/clock.go askClock",
		"controller/shim/stats.go ask",
		"controller/shim/verbs.go Pause",
		"controller/shim/verbs.go ResizePty",
		"controller/shim/verbs.go Resume",
		"controller/shim/verbs.go freeze",
	},
	"it ends or holds back the builder's process": {
		"controller/rootfs/mkfs.go Run",
		"controller/rootfs/prebuild.go attend",
	},
	"a container's log directory is kubelet's": {
		"controller/shim/stdio.go openOutput",
	},
	"TestSnapshotFaults and TestPoolFaults are about it": {
		"vmpool/pool.go Forget",
		"vmpool/recover.go sweep",
		"vmpool/snapshot/store.go SetAside",
	},
})

// reasons turns a list by reason into one by function.
func reasons(by map[string][]string) map[string]string {
	list := map[string]string{}
	for reason, names := range by {
		for _, name := range names {
			list[name] = reason
		}
	}
	return list
}
