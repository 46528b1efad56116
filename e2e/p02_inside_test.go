// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// hostRelease is what uname -r says on the host.
func hostRelease(t *testing.T) string {
	t.Helper()
	var u unix.Utsname
	require.NoError(t, unix.Uname(&u))
	return unix.ByteSliceToString(u.Release[:])
}

// TestInsideMachine is the half of point 2 that a pod's machine decides.
func TestInsideMachine(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		const memory = 768 << 20 // more than base_memory, which every VM has
		p := newPod(t, h, func(cfg *runtimeapi.PodSandboxConfig) {
			cfg.Hostname = "a-name-of-its-own"
			cfg.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuPeriod: 100_000, CpuQuota: 200_000, CpuShares: 2048, MemoryLimitInBytes: memory}
		})
		cfg := idleConfig("c")
		cfg.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuPeriod: 100_000, CpuQuota: 200_000, MemoryLimitInBytes: memory}
		c := p.start(cfg)

		var total, available uint64
		var cpus int
		_, err := fmt.Sscan(c.exec(testimage.HelperPath, "mem"), &total, &available, &cpus)
		require.NoError(t, err)
		release := strings.TrimSpace(c.sh("uname -r"))
		if h == testnode.RunC {
			require.Equal(t, hostRelease(t), release)
			require.Equal(t, runtime.NumCPU(), cpus)
		} else {
			require.NotEqual(t, hostRelease(t), release)
			require.Equal(t, 2, cpus, "a pod of two CPUs")
			// The pod gets its limit and no less; what the kernel takes is ours to add.
			require.GreaterOrEqual(t, available, uint64(memory*95/100))
			// That is memory_overhead, of which the kernel's own code is seen by nobody.
			const overhead = 64 << 20
			require.Equal(t, int64(memory+overhead), p.info().MemoryBytes)
			require.LessOrEqual(t, total, uint64(memory+overhead))
			require.Greater(t, total, uint64(memory))
		}
		require.Equal(t, "a-name-of-its-own\n", c.sh("hostname"))
		require.Equal(t, "1\n", c.sh("readlink /proc/1/exe | grep -c helper"), "process 1 is the container's own")
		require.Less(t, len(strings.Fields(c.sh("ls /proc | grep '^[0-9]'"))), 8, "only its own processes")
		limit := strings.TrimSpace(c.sh("cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes"))
		require.Equal(t, strconv.Itoa(memory), limit, "the container's own memory limit")

		require.Equal(t, "a-name-of-its-own\n", c.sh("cat /etc/hostname"))
		require.Equal(t, fmt.Sprintf("search chv.test\nnameserver %s\noptions ndots:2\n", p.n.HostIPs()[0]), c.sh("cat /etc/resolv.conf"))
		hosts, err := os.ReadFile("/etc/hosts")
		require.NoError(t, err)
		require.Equal(t, string(hosts), c.sh("cat /etc/hosts"), "CRI gives a pod the host's")
		for _, f := range []string{"hosts", "hostname", "resolv.conf"} {
			require.Equal(t, "regular file 644 0:0\n", c.sh("stat -c '%F %a %u:%g' /etc/"+f), f)
			c.sh("touch /etc/" + f)
		}
	})
}

// TestInsideNetwork checks what the pod sees of its network.
func TestInsideNetwork(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		c := p.idle("c")
		addrs := c.sh("ip addr show eth0")
		require.Contains(t, addrs, fmt.Sprintf("mtu %d", testnode.PodMTU))
		for _, ip := range p.ips() {
			require.Contains(t, addrs, ip+"/")
		}
		require.Contains(t, addrs, "UP")
		require.Contains(t, c.sh("ip addr show lo"), "127.0.0.1/8")
		require.Contains(t, c.sh("ip route"), fmt.Sprintf("default via %s dev eth0", p.n.HostIPs()[0]))
		if len(p.n.HostIPs()) > 1 {
			require.Contains(t, c.sh("ip -6 route"), fmt.Sprintf("default via %s dev eth0", p.n.HostIPs()[1]))
			require.Contains(t, c.sh("ip -6 addr show lo"), "::1/128")
		}
		require.Equal(t, "64\n", c.sh("df -m /dev/shm | awk 'END { print $2 }'"), "MiB of /dev/shm")
	})
}

// TestInsidePIDNamespaces checks the three ways to share processes.
func TestInsidePIDNamespaces(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h, func(cfg *runtimeapi.PodSandboxConfig) {
			cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
		})
		ns := func(c *container) string { return c.sh("readlink /proc/self/ns/pid") }
		inPod := func(name string) *container {
			cfg := idleConfig(name)
			cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
			return p.start(cfg)
		}
		a, b := inPod("a"), inPod("b")
		require.Equal(t, ns(a), ns(b))
		require.Equal(t, "2\n", a.sh("ls -l /proc/[0-9]*/exe 2>/dev/null | grep -c /helper"), "each sees the other")
		own := p.idle("own")
		require.NotEqual(t, ns(a), ns(own))
		cfg := idleConfig("target")
		cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_TARGET
		cfg.Linux.SecurityContext.NamespaceOptions.TargetId = own.id
		target := p.start(cfg)
		require.Equal(t, ns(own), ns(target))
		// /dev/shm and IPC are the pod's, whoever's the processes are.
		a.sh("echo shared > /dev/shm/file")
		require.Equal(t, "shared\n", own.sh("cat /dev/shm/file"))
		const shared = "for n in ipc net uts; do readlink /proc/self/ns/$n; done"
		require.Equal(t, a.sh(shared), own.sh(shared))
	})
}

// insideCase is a container's configuration and what a script prints in it, which
// exits with 0.
type insideCase struct {
	name   string
	change func(*runtimeapi.ContainerConfig)
	script string
	want   string
}

func securityContext(change func(*runtimeapi.LinuxContainerSecurityContext)) func(*runtimeapi.ContainerConfig) {
	return func(cfg *runtimeapi.ContainerConfig) { change(cfg.GetLinux().GetSecurityContext()) }
}

// Sets of capabilities, as /proc/PID/status shows them.
const (
	defaultCaps   = "00000000a80425fb"
	netAdminCaps  = "00000000a80435fa" // and NET_ADMIN, without CHOWN
	noCaps        = "0000000000000000"
	showCaps      = "awk '/^Cap(Prm|Eff|Bnd)/ { print $2 }' /proc/self/status | uniq"
	showEffective = "awk '/^CapEff/ { print $2 }' /proc/self/status"
)

var insideCases = []insideCase{
	{"environment", func(cfg *runtimeapi.ContainerConfig) {
		cfg.Envs = []*runtimeapi.KeyValue{{Key: "ODD", Value: []byte("a b=$c\"'ü")}, {Key: "EMPTY"}}
	}, `echo "$FROM_IMAGE|$ODD|${EMPTY-unset}|$PATH|$HOSTNAME"`, "yes|a b=$c\"'ü||/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin|inside-pod\n"},
	{"image's directory", nil, "pwd", "/work\n"},
	{"directory", func(cfg *runtimeapi.ContainerConfig) { cfg.WorkingDir = "/made/on/demand" }, "pwd; ls -ld . | cut -c1-10", "/made/on/demand\ndrwxr-xr-x\n"},
	{"user", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
	}), "id -u; id -g; id -G; " + showEffective, "1000\n1000\n1000 2000 2001\n" + noCaps + "\n"},
	{"user, group and groups", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.RunAsUser, s.RunAsGroup = &runtimeapi.Int64Value{Value: 4321}, &runtimeapi.Int64Value{Value: 1234}
		s.SupplementalGroups = []int64{77, 99}
	}), "id -u; id -g; id -G", "4321\n1234\n1234 77 99\n"},
	{"user's name", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUsername = "app" }), "id -un; id -gn; echo $HOME", "app\napp\n/home/app\n"},
	{"capabilities", nil, showCaps, defaultCaps + "\n"},
	{"capabilities added and dropped", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"CHOWN"}}
	}), showCaps, netAdminCaps + "\n"},
	{"no capabilities", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}
	}), showCaps, noCaps + "\n"},
	{"no new privileges", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) { s.NoNewPrivs = true }), "awk '/^NoNewPrivs/ { print $2 }' /proc/self/status", "1\n"},
	{"seccomp", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	}), "awk '/^Seccomp:/ { print $2 }' /proc/self/status; unshare -U true 2>&1 | grep -c 'not permitted'", "2\n1\n"},
	{"writable root", nil, "echo x > /new && mkdir /work/d && mv /work/d /work/e && rm /etc/image-file && ls /etc/image-file 2>&1 | grep -c 'No such'", "1\n"},
	{"read-only root", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) { s.ReadonlyRootfs = true }),
		"touch /new 2>&1; touch /etc/hosts 2>&1; touch /dev/shm/ok && echo ok", "touch: /new: Read-only file system\ntouch: /etc/hosts: Read-only file system\nok\n"},
	{"masked and read-only paths", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.MaskedPaths, s.ReadonlyPaths = []string{"/etc/passwd", "/home"}, []string{"/proc/sys"}
	}), "wc -c < /etc/passwd; ls /home; ! echo 1 2>&1 > /proc/sys/kernel/pid_max", "0\n/bin/sh: can't create /proc/sys/kernel/pid_max: Read-only file system\n"},
	{"arguments", func(cfg *runtimeapi.ContainerConfig) { cfg.Args = []string{"zero", "", "a  b", "*"} }, `printf '[%s]' "$@"; echo`, "[][a  b][*]\n"},
	{"devices", nil, "cd /dev && ls -d full null random tty urandom zero; test -c ptmx && echo x > null && head -c 3 zero | wc -c", "full\nnull\nrandom\ntty\nurandom\nzero\n3\n"},
	{"limits of files", nil, "test $(ulimit -n) -ge 1024 && echo enough", "enough\n"},
}

// TestInsideContainer is the half of point 2 that a container's configuration decides.
func TestInsideContainer(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Hostname = "inside-pod" })
		p.inside(t, insideCases)
	})
}

// inside runs a container for each case, and compares what it prints.
func (p *pod) inside(t *testing.T, cases []insideCase) {
	for i, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			sub := *p
			sub.t = t
			cfg := shellConfig(fmt.Sprintf("c%d", i), tc.script)
			if tc.change != nil {
				tc.change(cfg)
			}
			c := sub.start(cfg)
			st := c.awaitExit()
			lines, err := readLog(c.log)
			require.NoError(t, err)
			var got strings.Builder
			for _, l := range lines {
				got.WriteString(l.text + "\n")
			}
			require.Equal(t, tc.want, got.String())
			require.Zero(t, st.GetExitCode())
			require.NoError(t, p.n.RemoveContainer(testContext(t), c.id))
		})
	}
}

// TestInsidePrivileged checks a privileged container: it has all capabilities of
// its kernel, and of the host's devices it has none in a virtual machine.
func TestInsidePrivileged(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Linux.SecurityContext.Privileged = true })
		cfg := idleConfig("c")
		cfg.Linux.SecurityContext.Privileged = true
		c := p.start(cfg)
		caps, err := strconv.ParseUint(strings.TrimSpace(c.sh(showEffective)), 16, 64)
		require.NoError(t, err)
		const sysAdmin = 1 << 21
		require.NotZero(t, caps&sysAdmin)
		c.sh("mkdir /m && mount -t tmpfs none /m && umount /m")
		if h == testnode.CloudHV {
			require.Equal(t, "no\n", c.sh("ls /dev/kvm /dev/vda1 /dev/loop-control >/dev/null 2>&1 && echo yes || echo no"))
		}
	})
}

// TestInsideSysctls checks that a pod's sysctls are its own.
func TestInsideSysctls(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		before, err := os.ReadFile("/proc/sys/kernel/shm_rmid_forced")
		require.NoError(t, err)
		p := newPod(t, h, func(cfg *runtimeapi.PodSandboxConfig) {
			cfg.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "10000 20000"}
		})
		c := p.idle("c")
		require.Equal(t, "1\n10000\t20000\n0\n", c.sh("cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_local_port_range /proc/sys/net/ipv4/ip_unprivileged_port_start"))
		after, err := os.ReadFile("/proc/sys/kernel/shm_rmid_forced")
		require.NoError(t, err)
		require.Equal(t, string(before), string(after))
	})
}
