// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go/features"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	wirev1 "github.com/cloudhv/containerd-cloudhv/controller/shim/wire/v1"
)

const (
	runtimeName = "io.containerd.cloudhv.v1"
	// featuresType is the name that containerd registers for OCI features.
	featuresType = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
	// allowMounts is the annotation that tells which mounts of a root file system
	// the shim sees to. The controller's answer to CRI has no other place for it.
	allowMounts = "containerd.io/runtime-allow-mounts"
)

// ownMounts are the mount types and transformations ("…/*") that containerd is
// not to do before a create: whatever a snapshotter says, the plugin makes the
// guest's disk out of the snapshot's chain, and the mounts are never done. What
// needs no mount manager, such as overlay and bind, is handed over as it is in
// any case; these are those that some snapshotter leaves to the manager.
var ownMounts = []string{
	"overlay", "bind", "erofs", "ext4", "xfs", "btrfs", "loop", "block",
	"format/*", "mkdir/*", "mkfs/*",
}

// printInfo writes a containerd.types.RuntimeInfo.
func printInfo(stdout io.Writer) error {
	feat, err := json.Marshal(guestFeatures())
	if err != nil {
		return fmt.Errorf("encode features: %w", err)
	}
	data, err := proto.Marshal(&wirev1.RuntimeInfo{
		Name:        runtimeName,
		Version:     &wirev1.RuntimeVersion{Version: version, Revision: revision},
		Features:    &anypb.Any{TypeUrl: featuresType, Value: feat},
		Annotations: map[string]string{allowMounts: strings.Join(ownMounts, ",")},
	})
	if err != nil {
		return fmt.Errorf("encode runtime info: %w", err)
	}
	_, err = stdout.Write(data)
	return err
}

// guestFeatures are those of the guest's crun 1.8.1 and kernel, less what the
// way into the guest does not carry: listeners of seccomp. Recursive read-only and
// ID-mapped mounts are the host's doing (package volumes).
func guestFeatures() *features.Features {
	yes, no := true, false
	return &features.Features{
		OCIVersionMin: "1.0.0",
		OCIVersionMax: "1.0.2",
		MountOptions:  mountOptions,
		Linux: &features.Linux{
			Namespaces:   []string{"cgroup", "ipc", "mount", "network", "pid", "user", "uts"},
			Capabilities: capabilities,
			Cgroup:       &features.Cgroup{V1: &no, V2: &yes, Systemd: &no, SystemdUser: &no, Rdma: &no},
			Seccomp: &features.Seccomp{
				Enabled:   &yes,
				Actions:   seccompActions,
				Operators: seccompOperators,
				Archs:     seccompArchs[runtime.GOARCH],
			},
			Apparmor:        &features.Apparmor{Enabled: &no},
			Selinux:         &features.Selinux{Enabled: &no},
			IntelRdt:        &features.IntelRdt{Enabled: &no},
			MountExtensions: &features.MountExtensions{IDMap: &features.IDMap{Enabled: &yes}},
			NetDevices:      &features.NetDevices{Enabled: &no},
		},
	}
}

var (
	mountOptions = []string{
		"async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "mand", "noatime", "nodev",
		"nodiratime", "noexec", "nomand", "norelatime", "nostrictatime", "nosuid", "private", "rbind", "relatime",
		"remount", "ro", "rprivate", "rro", "rslave", "rw", "slave", "strictatime", "suid", "sync", "tmpcopyup",
	}
	capabilities = []string{
		"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
		"CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
		"CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
		"CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
		"CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
		"CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
		"CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
	}
	seccompActions = []string{
		"SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD",
		"SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
	}
	seccompOperators = []string{
		"SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE",
	}
	seccompArchs = map[string][]string{
		"amd64": {"SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_X86_64"},
		"arm64": {"SCMP_ARCH_ARM", "SCMP_ARCH_AARCH64"},
	}
)
