// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package config is the sandbox controller's configuration: what the section
//
//	[plugins.'io.containerd.sandbox.controller.v1.cloudhv']
//
// of containerd's configuration may hold, its defaults, and the check that
// turns it into Settings.
package config

// Value is an option's value as it is written, of any of TOML's types.
// containerd does not start, for any handler, when it cannot decode a value. So
// every type can be decoded, and Validate judges it.
type Value = any

// Config is the section as it is written. Sizes are strings with a binary unit
// ("512MiB", "10GiB"), durations are Go's ("30s", "2m"), paths are absolute.
type Config struct {
	// VMM is the hypervisor: "auto", "qemu" or "cloudhypervisor".
	VMM Value `toml:"vmm"`
	// QEMUBinary is QEMU's path; empty looks for it on PATH.
	QEMUBinary Value `toml:"qemu_binary"`
	// CloudHypervisorBinary is Cloud Hypervisor's path; empty looks for it on PATH. Whether
	// it is of use is found out when the hypervisor is chosen.
	CloudHypervisorBinary Value `toml:"cloud_hypervisor_binary"`
	// Kernel is the guest kernel, Image the guest's own erofs root file system.
	Kernel Value `toml:"kernel"`
	Image  Value `toml:"image"`
	// KernelParams, a list of strings, are appended to the guest kernel's command line.
	KernelParams Value `toml:"kernel_params"`

	// DefaultVCPUs and DefaultMemory are the size of a pod that states no limit. 0
	// vCPUs stand for as many as the host has, up to MaxVCPUs.
	DefaultVCPUs  Value `toml:"default_vcpus"`
	DefaultMemory Value `toml:"default_memory"`
	// MaxVCPUs and MaxMemory bound every pod, also when it is resized; 0 stands
	// for what the host has.
	MaxVCPUs  Value `toml:"max_vcpus"`
	MaxMemory Value `toml:"max_memory"`
	// BaseMemory is what a VM boots with; the rest is plugged.
	BaseMemory Value `toml:"base_memory"`
	// MemoryOverhead is added to a pod's limit for the guest's kernel and agent.
	MemoryOverhead Value `toml:"memory_overhead"`

	// BootParallel is how many VMs may start at a time; others wait for their
	// turn, which serves all of them sooner. It is a number for the whole host; 0
	// stands for as many as the host has processors in software emulation, and
	// for four times as many with hardware virtualization.
	BootParallel Value `toml:"boot_parallel"`

	// StateDir holds a directory for each sandbox: record, sockets, logs.
	StateDir Value `toml:"state_dir"`
	// CacheDir holds the file systems of images, and scratch disks.
	CacheDir Value `toml:"cache_dir"`
	// Shim is the task proxy's program: a path, or a name that is looked for
	// beside containerd's own binary and then on PATH.
	Shim Value `toml:"shim"`

	// ScratchSize is the size of a pod's writable disk (a sparse file).
	ScratchSize Value `toml:"scratch_size"`
	// ScratchBudget bounds the sizes of all pods' writable disks together; 0 does not.
	ScratchBudget Value `toml:"scratch_budget"`
	// ImageCacheLimit bounds the image file systems in CacheDir that no pod uses.
	ImageCacheLimit Value `toml:"image_cache_limit"`
	// Prebuild says of which images the file systems are made when they are pulled:
	// "used", those of which a pod has run another version, "always" or "never".
	Prebuild Value `toml:"prebuild"`
	// ConsoleLogLimit bounds the log of a guest's console.
	ConsoleLogLimit Value `toml:"console_log_limit"`

	// ClockSync is how often a guest's clock is compared with the host's; "0" never.
	ClockSync Value `toml:"clock_sync"`

	// Cgroup runs each VMM in a cgroup of its own, below the pod's.
	Cgroup Value `toml:"cgroup"`
	// CgroupParent is the group below which VMMs run that are no pod's yet, or whose
	// pod has no group.
	CgroupParent Value `toml:"cgroup_parent"`
	// Annotations, a list of strings, are the pod annotations that are honoured; a
	// final * stands for any rest. Others of ours are refused.
	Annotations Value `toml:"annotations"`
	// DirectVolumes, a list of strings, are where the block devices and files may be that
	// pods name as direct volumes: paths, of which each stands for all below too, and a
	// final * for any rest. Links in what a pod names are followed first.
	DirectVolumes Value `toml:"direct_volumes"`
	// EnableUnprivilegedPorts and EnableUnprivilegedICMP set the pod's sysctls as
	// CRI's options of the same names do for its own pods.
	EnableUnprivilegedPorts Value `toml:"enable_unprivileged_ports"`
	EnableUnprivilegedICMP  Value `toml:"enable_unprivileged_icmp"`
	// Debug makes the shims log every request.
	Debug Value `toml:"debug"`

	// RootFSBuilder, a RootFSBuilder or a table, bounds the process that writes an
	// image's file system.
	RootFSBuilder Value `toml:"rootfs_builder"`
	// Pool, a Pool or a table, sizes the pool of ready VMs.
	Pool Value `toml:"pool"`
	// Confinement, a Confinement or a table, keeps VMMs from the host.
	Confinement Value `toml:"confinement"`
	// Timeouts, a Timeouts or a table, bound what waits for something else.
	Timeouts Value `toml:"timeouts"`
}

// Pool is the section pool.
type Pool struct {
	// Restore makes VMs from a snapshot; false boots each.
	Restore Value `toml:"restore"`
	// Min and Max bound the VMs that are ready; with Max 0 none is, and each is
	// restored when its pod comes.
	Min Value `toml:"min"`
	Max Value `toml:"max"`
	// MaxMemory bounds what ready VMs may hold together; 0 stands for a tenth of the
	// host's.
	MaxMemory Value `toml:"max_memory"`
	// ReserveMemory is what must stay available on the host: with less the pool does
	// not grow, and with half of it lets its VMs go. 0 stands for a twentieth of the host's.
	ReserveMemory Value `toml:"reserve_memory"`
	// Parallel is how many are made ready at a time; 0 stands for half the host's
	// processors.
	Parallel Value `toml:"parallel"`
	// WarmUp runs a throw-away container in each VM before it is ready: "auto" (in
	// software emulation), "always" or "never".
	WarmUp Value `toml:"warm_up"`
	// Memory is how long a burst of pods is remembered, Window what counts as one.
	Memory Value `toml:"memory"`
	Window Value `toml:"window"`
	// TemplateDir holds the snapshots; empty stands for templates in cache_dir.
	TemplateDir Value `toml:"template_dir"`
}

// Confinement is the section confinement.
type Confinement struct {
	// Enabled runs each VMM as a user of its own, who may use nothing but its VM's files.
	Enabled Value `toml:"enabled"`
	// FirstUID and UIDs are the users, and the groups of the same numbers, that VMMs may
	// run as. There can be no more VMs than users.
	FirstUID Value `toml:"first_uid"`
	UIDs     Value `toml:"uids"`
}

// Values of Config.Prebuild.
const (
	PrebuildUsed   = "used"
	PrebuildAlways = "always"
	PrebuildNever  = "never"
)

// Values of Pool.WarmUp.
const (
	WarmUpAuto   = "auto"
	WarmUpAlways = "always"
	WarmUpNever  = "never"
)

// RootFSBuilder is the section rootfs_builder.
type RootFSBuilder struct {
	// Binary is mkfs.erofs's path; empty looks for it on PATH.
	Binary Value `toml:"binary"`
	// Memory bounds the process's address space.
	Memory Value `toml:"memory"`
	// ImageSize bounds the file it writes.
	ImageSize Value `toml:"image_size"`
	// Parallel is how many may run at a time.
	Parallel Value `toml:"parallel"`
}

// Timeouts is the section timeouts.
type Timeouts struct {
	// Boot bounds a VM's start, from its process to the agent's first answer.
	Boot Value `toml:"boot"`
	// AgentCall bounds one call to a guest's agent.
	AgentCall Value `toml:"agent_call"`
	// HotPlug bounds plugging a device, memory or vCPUs.
	HotPlug Value `toml:"hot_plug"`
	// PowerOff is how long a guest may take to turn itself off before its VMM is killed.
	PowerOff Value `toml:"power_off"`
	// Cleanup bounds each undoing of a failed or ended sandbox.
	Cleanup Value `toml:"cleanup"`
	// RootFSBuild bounds the making of one image's file system.
	RootFSBuild Value `toml:"rootfs_build"`
	// Recover bounds the taking up of sandboxes when containerd starts.
	Recover Value `toml:"recover"`
}

// Names of hypervisors in Config.VMM.
const (
	VMMAuto            = "auto"
	VMMQEMU            = "qemu"
	VMMCloudHypervisor = "cloudhypervisor"
)

// Default is the configuration that `containerd config default` prints.
func Default() *Config {
	return &Config{
		VMM:                     VMMAuto,
		QEMUBinary:              "",
		CloudHypervisorBinary:   "",
		Kernel:                  "/usr/share/cloudhv/vmlinux",
		Image:                   "/usr/share/cloudhv/rootfs.erofs",
		KernelParams:            []string{},
		DefaultVCPUs:            0,
		DefaultMemory:           "512MiB",
		MaxVCPUs:                0,
		MaxMemory:               "0",
		BaseMemory:              "512MiB",
		MemoryOverhead:          "64MiB",
		BootParallel:            0,
		StateDir:                "/run/cloudhv",
		CacheDir:                "/var/lib/cloudhv",
		Shim:                    "containerd-shim-cloudhv-v1",
		ScratchSize:             "10GiB",
		ScratchBudget:           "0",
		ImageCacheLimit:         "20GiB",
		Prebuild:                PrebuildUsed,
		ConsoleLogLimit:         "1MiB",
		ClockSync:               "1m",
		Cgroup:                  true,
		CgroupParent:            "/cloudhv",
		Annotations:             []string{"io.cloudhv.*", "io.katacontainers.config.hypervisor.*"},
		DirectVolumes:           []string{},
		EnableUnprivilegedPorts: true,
		EnableUnprivilegedICMP:  true,
		Debug:                   false,
		RootFSBuilder:           defaultBuilder(),
		Pool:                    defaultPool(),
		Confinement:             defaultConfinement(),
		Timeouts:                defaultTimeouts(),
	}
}

func defaultBuilder() RootFSBuilder {
	return RootFSBuilder{Binary: "", Memory: "1GiB", ImageSize: "64GiB", Parallel: 2}
}

func defaultPool() Pool {
	return Pool{
		Restore: true, Min: 1, Max: 16, MaxMemory: "0", ReserveMemory: "0", Parallel: 0, WarmUp: WarmUpAuto, Memory: "10m", Window: "5s", TemplateDir: "",
	}
}

// defaultConfinement has the first users after those that systemd's conventions give to
// containers.
func defaultConfinement() Confinement {
	return Confinement{Enabled: true, FirstUID: 1879048192, UIDs: 65536}
}

func defaultTimeouts() Timeouts {
	return Timeouts{
		Boot:        "90s",
		AgentCall:   "30s",
		HotPlug:     "30s",
		PowerOff:    "5s",
		Cleanup:     "30s",
		RootFSBuild: "10m",
		Recover:     "20s",
	}
}
