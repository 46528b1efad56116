// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package config is the sandbox controller's configuration: what the section
//
//	[plugins.'io.containerd.sandbox.controller.v1.cloudhv']
//
// of containerd's configuration may hold, its defaults, and the check that
// turns it into Settings.
package config

import "strconv"

// Config is the section as it is written. Sizes are strings with a binary unit
// ("512MiB", "10GiB"), durations are Go's ("30s", "2m"), paths are absolute.
//
// containerd does not start when a value's type is wrong, for any handler. So
// the types here take every scalar and leave the complaint to Validate.
type Config struct {
	// VMM is the hypervisor: "auto", "qemu" or "cloudhypervisor".
	VMM Text `toml:"vmm"`
	// QEMUBinary is QEMU's path; empty looks for it on PATH.
	QEMUBinary Text `toml:"qemu_binary"`
	// Kernel is the guest kernel, Image the guest's own erofs root file system.
	Kernel Text `toml:"kernel"`
	Image  Text `toml:"image"`
	// KernelParams are appended to the guest kernel's command line.
	KernelParams []string `toml:"kernel_params"`

	// DefaultVCPUs and DefaultMemory are the size of a pod that states no limit.
	DefaultVCPUs  Count `toml:"default_vcpus"`
	DefaultMemory Text  `toml:"default_memory"`
	// MaxVCPUs and MaxMemory bound every pod, also when it is resized; 0 stands
	// for what the host has.
	MaxVCPUs  Count `toml:"max_vcpus"`
	MaxMemory Text  `toml:"max_memory"`
	// BaseMemory is what a VM boots with; the rest is plugged.
	BaseMemory Text `toml:"base_memory"`
	// MemoryOverhead is added to a pod's limit for the guest's kernel and agent
	// when the pod's config states no overhead of its own.
	MemoryOverhead Text `toml:"memory_overhead"`

	// BootParallel is how many VMs may start at a time; others wait for their
	// turn, which serves all of them sooner. 0 stands for one a processor of the
	// host in software emulation, and four with hardware virtualization.
	BootParallel Count `toml:"boot_parallel"`

	// StateDir holds a directory for each sandbox: record, sockets, logs.
	StateDir Text `toml:"state_dir"`
	// CacheDir holds the file systems of images, and scratch disks.
	CacheDir Text `toml:"cache_dir"`
	// Shim is the task proxy's program: a path, or a name that is looked for
	// beside containerd's own binary and then on PATH.
	Shim Text `toml:"shim"`

	// ScratchSize is the size of a pod's writable disk (a sparse file).
	ScratchSize Text `toml:"scratch_size"`
	// ImageCacheLimit bounds the image file systems in CacheDir that no pod uses.
	ImageCacheLimit Text `toml:"image_cache_limit"`
	// ConsoleLogLimit bounds the log of a guest's console.
	ConsoleLogLimit Text `toml:"console_log_limit"`

	// Cgroup runs each VMM in a cgroup of its own, below the pod's.
	Cgroup bool `toml:"cgroup"`
	// Annotations lists the pod annotations that are honoured; a final * stands
	// for any rest. Others of ours are refused.
	Annotations []string `toml:"annotations"`
	// EnableUnprivilegedPorts and EnableUnprivilegedICMP set the pod's sysctls as
	// CRI's options of the same names do for its own pods.
	EnableUnprivilegedPorts bool `toml:"enable_unprivileged_ports"`
	EnableUnprivilegedICMP  bool `toml:"enable_unprivileged_icmp"`
	// Debug makes the shims log every request.
	Debug bool `toml:"debug"`

	// RootFSBuilder bounds the process that writes an image's file system.
	RootFSBuilder RootFSBuilder `toml:"rootfs_builder"`
	// Timeouts bound what waits for something else.
	Timeouts Timeouts `toml:"timeouts"`
}

// RootFSBuilder is the section rootfs_builder.
type RootFSBuilder struct {
	// Binary is mkfs.erofs's path; empty looks for it on PATH.
	Binary Text `toml:"binary"`
	// Memory bounds the process's address space.
	Memory Text `toml:"memory"`
	// ImageSize bounds the file it writes.
	ImageSize Text `toml:"image_size"`
	// Parallel is how many may run at a time.
	Parallel Count `toml:"parallel"`
}

// Timeouts is the section timeouts.
type Timeouts struct {
	// Boot bounds a VM's start, from its process to the agent's first answer.
	Boot Text `toml:"boot"`
	// AgentCall bounds one call to a guest's agent.
	AgentCall Text `toml:"agent_call"`
	// HotPlug bounds plugging a device, memory or vCPUs.
	HotPlug Text `toml:"hot_plug"`
	// PowerOff is how long a guest may take to turn itself off before its VMM is killed.
	PowerOff Text `toml:"power_off"`
	// Cleanup bounds each undoing of a failed or ended sandbox.
	Cleanup Text `toml:"cleanup"`
	// RootFSBuild bounds the making of one image's file system.
	RootFSBuild Text `toml:"rootfs_build"`
	// Recover bounds the taking up of sandboxes when containerd starts.
	Recover Text `toml:"recover"`
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
		Kernel:                  "/usr/share/cloudhv/vmlinux",
		Image:                   "/usr/share/cloudhv/rootfs.erofs",
		KernelParams:            []string{},
		DefaultVCPUs:            1,
		DefaultMemory:           "512MiB",
		MaxVCPUs:                0,
		MaxMemory:               "0",
		BaseMemory:              "128MiB",
		MemoryOverhead:          "64MiB",
		BootParallel:            0,
		StateDir:                "/run/cloudhv",
		CacheDir:                "/var/lib/cloudhv",
		Shim:                    "containerd-shim-cloudhv-v1",
		ScratchSize:             "10GiB",
		ImageCacheLimit:         "20GiB",
		ConsoleLogLimit:         "1MiB",
		Cgroup:                  true,
		Annotations:             []string{"io.cloudhv.*", "io.katacontainers.config.hypervisor.*"},
		EnableUnprivilegedPorts: true,
		EnableUnprivilegedICMP:  true,
		RootFSBuilder:           RootFSBuilder{Memory: "1GiB", ImageSize: "64GiB", Parallel: 2},
		Timeouts: Timeouts{
			Boot:        "90s",
			AgentCall:   "30s",
			HotPlug:     "30s",
			PowerOff:    "5s",
			Cleanup:     "30s",
			RootFSBuild: "10m",
			Recover:     "20s",
		},
	}
}

// Text is a string that accepts any scalar of TOML as it was written.
type Text string

// UnmarshalText implements encoding.TextUnmarshaler.
func (t *Text) UnmarshalText(b []byte) error {
	*t = Text(b)
	return nil
}

// Count is a whole number. What is not one becomes NotANumber, for Validate.
type Count int64

// NotANumber is the Count of a value that is no whole number.
const NotANumber Count = -1 << 63

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *Count) UnmarshalText(b []byte) error {
	n, err := strconv.ParseInt(string(b), 10, 64)
	if err != nil {
		n = int64(NotANumber)
	}
	*c = Count(n)
	return nil
}
