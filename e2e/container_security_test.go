// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// ofUser is a security context with the user 1000, whom the image has in groups 2000
// and 2001.
func ofUser(change func(*runtimeapi.LinuxContainerSecurityContext)) func(*runtimeapi.ContainerConfig) {
	return securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
		change(s)
	})
}

// profile is a container's seccomp profile.
func profile(kind runtimeapi.SecurityProfile_ProfileType, path string) func(*runtimeapi.ContainerConfig) {
	return securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: kind, LocalhostRef: path}
	})
}

const (
	showSeccomp  = "awk '/^Seccomp:/ { print $2 }' /proc/self/status; "
	sortedGroups = "id -G | tr ' ' '\\n' | sort -n | tr '\\n' ' '; echo"
)

// securityCases are the cases of container's security context that TestInsideContainer has not;
// noMkdir is a seccomp profile of the host that forbids mkdir.
func securityCases(noMkdir string) []insideCase {
	masked := []string{"/proc/kcore", "/proc/keys", "/sys/firmware"}
	return []insideCase{
		{"groups merged", ofUser(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.SupplementalGroups, s.SupplementalGroupsPolicy = []int64{77}, runtimeapi.SupplementalGroupsPolicy_Merge
		}), sortedGroups, "77 1000 2000 2001 \n"},
		{"groups strict", ofUser(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.SupplementalGroups, s.SupplementalGroupsPolicy = []int64{77}, runtimeapi.SupplementalGroupsPolicy_Strict
		}), sortedGroups, "77 1000 \n"},
		{"privileges may be gained", ofUser(func(s *runtimeapi.LinuxContainerSecurityContext) { s.NoNewPrivs = false }),
			"awk '/^NoNewPrivs/ { print $2 }' /proc/self/status", "0\n"},
		{"all capabilities", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"ALL"}}
		}), "caps=$(" + showEffective + "); test $((0x$caps & 1<<21)) -ne 0 && test $((0x$caps & 1<<12)) -ne 0 && echo many", "many\n"},
		{"a capability of no user's", ofUser(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NET_ADMIN"}}
		}), showEffective + "; awk '/^CapBnd/ { print $2 }' /proc/self/status", noCaps + "\n00000000a80435fb\n"},
		{"seccomp unconfined", profile(runtimeapi.SecurityProfile_Unconfined, ""), showSeccomp + "mkdir /d && echo made", "0\nmade\n"},
		{"seccomp of the host", profile(runtimeapi.SecurityProfile_Localhost, noMkdir),
			showSeccomp + "mkdir /d 2>&1 | grep -c 'not permitted'; touch /f && echo made", "2\n1\nmade\n"},
		{"masked by default", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) { s.MaskedPaths = masked }),
			"wc -c < /proc/keys; ls /sys/firmware | wc -l", "0\n0\n"},
		{"nothing masked", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.MaskedPaths, s.ReadonlyPaths = []string{}, []string{}
		}), "awk '$2 ~ \"^/proc/\" { n++ } END { print n + 0 }' /proc/mounts", "0\n"},
		{"sysfs is read-only", nil, "touch /sys/x 2>/dev/null || echo refused; awk '$2 == \"/sys\" { print substr($4, 1, 2) }' /proc/mounts", "refused\nro\n"},
		{"one user namespace", nil, "awk '{ print $1, $2, $3 }' /proc/self/uid_map", "0 0 4294967295\n"},
	}
}

// TestSecurityContext runs a container for each case.
func TestSecurityContext(t *testing.T) {
	one := uint(1)
	b, err := json.Marshal(specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno, ErrnoRet: &one},
	}})
	require.NoError(t, err)
	noMkdir := filepath.Join(t.TempDir(), "no-mkdir.json")
	require.NoError(t, os.WriteFile(noMkdir, b, 0o600))
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		p.inside(t, securityCases(noMkdir))
	})
}

// TestPrivileged checks that a privileged container may do to its kernel what it wants,
// and that this is its VM's kernel and not the host's.
func TestPrivileged(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Linux.SecurityContext.Privileged = true })
		cfg := idleConfig("c")
		cfg.Linux.SecurityContext.Privileged = true
		c := p.start(cfg)
		require.Equal(t, "0\n", c.sh(strings.TrimSuffix(showSeccomp, "; ")))
		require.Equal(t, "0\n", c.sh("awk '$2 ~ \"^/proc/\" { n++ } END { print n + 0 }' /proc/mounts"), "nothing is masked")
		if h == testnode.RunC {
			return // it is the host's kernel, which this leaves alone
		}
		host, err := os.ReadFile("/proc/sys/kernel/hostname")
		require.NoError(t, err)
		panicOnOops, err := os.ReadFile("/proc/sys/kernel/panic")
		require.NoError(t, err)
		c.sh("echo 77 > /proc/sys/kernel/panic && mount -t tmpfs none /mnt 2>/dev/null || mkdir /mnt && mount -t tmpfs none /mnt && mknod /mnt/n c 1 3 && echo x > /mnt/n; sysctl -w kernel.hostname=other >/dev/null")
		require.Equal(t, "77\nother\n", c.sh("cat /proc/sys/kernel/panic /proc/sys/kernel/hostname"))
		after, err := os.ReadFile("/proc/sys/kernel/hostname")
		require.NoError(t, err)
		require.Equal(t, string(host), string(after))
		after, err = os.ReadFile("/proc/sys/kernel/panic")
		require.NoError(t, err)
		require.Equal(t, string(panicOnOops), string(after))
	})
}

// TestSharedIPC checks that a pod's containers have System V's and POSIX's IPC in
// common, and that another pod's have not.
func TestSharedIPC(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p, q := newPod(t, h), newPod(t, h)
		a, b, other := p.idle("a"), p.idle("b"), q.idle("other")
		const ns = "readlink /proc/self/ns/ipc"
		require.Equal(t, a.sh(ns), b.sh(ns))
		a.sh("echo of-a > /dev/shm/file; mkdir -p /q && mount | grep -c mqueue >/dev/null")
		require.Equal(t, "of-a\n", b.sh("cat /dev/shm/file"))
		require.Equal(t, "none\n", other.sh("cat /dev/shm/file 2>/dev/null || echo none"))
		require.Equal(t, "mqueue\n", a.sh("awk '$2 == \"/dev/mqueue\" { print $3 }' /proc/mounts"))
	})
}

// TestSharedProcesses is shareProcessNamespace: a container sees another's processes,
// their root file systems too, and may signal them.
func TestSharedProcesses(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h, func(cfg *runtimeapi.PodSandboxConfig) {
			cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
		})
		shared := func(cfg *runtimeapi.ContainerConfig) *runtimeapi.ContainerConfig {
			cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
			return cfg
		}
		a := p.start(shared(helperConfig("a", "term", "3")))
		a.awaitLine("ready")
		a.sh("echo mark-of-a > /mark")
		debug := shared(idleConfig("debug"))
		debug.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"SYS_PTRACE"}}
		b := p.start(debug)
		pid := strings.TrimSpace(b.sh("for p in /proc/[0-9]*; do grep -qs mark-of-a $p/root/mark && basename $p; done | head -n 1"))
		require.NotEmpty(t, pid)
		require.NotEqual(t, "1", pid, "the first process is the pod's")
		b.sh("kill -TERM " + pid)
		require.Equal(t, int32(3), a.awaitExit().GetExitCode())
		b.exec("true")
	})
}

// TestEphemeralContainer adds a container to a running pod that targets another one's
// processes, as kubectl debug does.
func TestEphemeralContainer(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		main := p.start(shellConfig("main", "echo main > /mark; trap 'exit 0' TERM; echo ready; while :; do sleep 1 & wait; done"))
		main.awaitLine("ready")
		cfg := shellConfig("debugger", "cat /proc/1/root/mark; tr '\\0' ' ' < /proc/1/cmdline | cut -c1-10; hostname; ip addr show eth0 | grep -c 'inet '; cat")
		cfg.Stdin, cfg.StdinOnce = true, true
		cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_TARGET
		cfg.Linux.SecurityContext.NamespaceOptions.TargetId = main.id
		cfg.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"SYS_PTRACE"}}
		debugger := p.start(cfg)
		debugger.awaitLog(func(l []logLine) bool { return len(l) == 4 })
		require.Equal(t, "main\n/bin/sh -c\n"+p.cfg.GetHostname()+"\n1\n", debugger.text("stdout"))
		// Its end ends nobody else, and with its target it is gone too.
		require.NoError(t, p.n.StopContainer(testContext(t), debugger.id, 0))
		require.Equal(t, runtimeapi.ContainerState_CONTAINER_RUNNING, main.status().GetState())
		again := p.start(func() *runtimeapi.ContainerConfig {
			cfg.Metadata.Attempt = 1
			cfg.LogPath = "debugger_1.log"
			return cfg
		}())
		require.NoError(t, p.n.StopContainer(testContext(t), main.id, 0))
		require.Equal(t, int32(137), again.awaitExit().GetExitCode())
	})
}
