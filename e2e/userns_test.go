// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// The IDs of the pods in these tests. Users and groups are not the same, so that nobody
// takes the ones for the others.
const (
	firstUser, firstGroup = 131072, 262144
	mappedIDs             = 65536
)

func usersAndGroups() (uids, gids []*runtimeapi.IDMapping) {
	return []*runtimeapi.IDMapping{{HostId: firstUser, Length: mappedIDs}}, []*runtimeapi.IDMapping{{HostId: firstGroup, Length: mappedIDs}}
}

func podUsers() *runtimeapi.UserNamespace {
	uids, gids := usersAndGroups()
	return &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: uids, Gids: gids}
}

// newUsernsPod runs a pod with a user namespace (hostUsers: false). It skips a test of runc
// where that cannot.
func newUsernsPod(t *testing.T, h string, change ...func(*runtimeapi.PodSandboxConfig)) *pod {
	t.Helper()
	requireUserns(t, h)
	return newPod(t, h, append(change, namespaceOptions(func(o *runtimeapi.NamespaceOption) { o.UsernsOptions = podUsers() }))...)
}

// requireUserns skips a test of runc where that cannot.
func requireUserns(t *testing.T, h string) {
	t.Helper()
	if h == testnode.RunC && !declaresUserns(t, h) {
		t.Skip("NOT TESTED: this host's runc has no ID-mapped mounts (it needs version 1.2), so CRI makes no user namespaces by it")
	}
}

// declaresUserns tells whether a handler says that it has user namespaces. kubelet asks.
func declaresUserns(t *testing.T, h string) bool {
	t.Helper()
	st, err := node(t).Runtime().Status(testContext(t), &runtimeapi.StatusRequest{})
	require.NoError(t, err)
	for _, handler := range st.GetRuntimeHandlers() {
		if handler.GetName() == h {
			return handler.GetFeatures().GetUserNamespaces()
		}
	}
	t.Fatalf("CRI has no handler %s", h)
	return false
}

// inUserns is a container's configuration in such a pod, as kubelet writes it: the mounts
// are ID-mapped.
func inUserns(cfg *runtimeapi.ContainerConfig) *runtimeapi.ContainerConfig {
	cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = podUsers()
	for _, m := range cfg.GetMounts() {
		m.UidMappings, m.GidMappings = usersAndGroups()
	}
	return cfg
}

var usernsCases = []insideCase{
	{"mapping", nil, "awk '{ print $1, $2, $3 }' /proc/self/uid_map /proc/self/gid_map; cat /proc/self/setgroups",
		fmt.Sprintf("0 %d %d\n0 %d %d\nallow\n", firstUser, mappedIDs, firstGroup, mappedIDs)},
	{"root", nil, "id -u; id -g; awk '/^(Uid|Gid)/ { print $2, $5 }' /proc/self/status", "0\n0\n0 0\n0 0\n"},
	{"files of the image", nil, "stat -c '%u:%g' / /bin /bin/sh /etc/passwd /work", "0:0\n0:0\n0:0\n0:0\n0:0\n"},
	{"writable layer", nil, "echo x > /new && chown 1000:2000 /new && stat -c '%u:%g' /new && echo more >> /etc/passwd && mv /etc/passwd /p && " +
		"stat -c '%u:%g' /p && mkdir /d && rmdir /d && rm /etc/group && ! ls /etc/group 2>/dev/null; ln -s x /l && stat -c '%u:%g' /l && ln /p /q && " +
		"chmod 600 /p && stat -c '%a %h' /q", "1000:2000\n0:0\n0:0\n600 2\n"},
	{"user", ofUser(func(*runtimeapi.LinuxContainerSecurityContext) {}), "id -u; id -g; id -G; " + showEffective +
		"; touch /x 2>&1; touch /tmp/x && stat -c '%u:%g' /tmp/x", "1000\n1000\n1000 2000 2001\n" + noCaps + "\ntouch: /x: Permission denied\n1000:1000\n"},
	{"last user", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.RunAsUser, s.RunAsGroup = &runtimeapi.Int64Value{Value: mappedIDs - 1}, &runtimeapi.Int64Value{Value: mappedIDs - 1}
	}), "id -u; id -g", "65535\n65535\n"},
	{"capabilities", nil, showCaps, defaultCaps + "\n"},
	{"no rights over the machine", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"ALL"}}
	}), "date -s 2000-01-01 2>&1 | grep -c 'not permitted'; mknod /n c 1 3 2>&1 | grep -c 'not permitted'; cat /dev/kmsg 2>&1 | head -c 1 | wc -c; " +
		"! echo 1 2>/dev/null > /proc/sys/kernel/panic && echo kept", "1\n1\n1\nkept\n"},
	{"streams opened again", nil, "echo same > /proc/self/fd/1; echo same > /dev/stderr", "same\nsame\n"},
	{"streams of a user", ofUser(func(*runtimeapi.LinuxContainerSecurityContext) {}), "echo out > /dev/stdout", "out\n"},
	{"network is the namespace's", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NET_ADMIN"}}
	}), "ip link set lo mtu 1400 && ip link show lo | grep -o 'mtu 1400'; ping -c 1 -W 5 127.0.0.1 | grep -o '1 packets received'", "mtu 1400\n1 packets received\n"},
	{"a user's network is not", ofUser(func(*runtimeapi.LinuxContainerSecurityContext) {}), "ip link set lo mtu 1300 2>&1 | grep -c 'not permitted'", "1\n"},
	{"mounts and names", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"SYS_ADMIN"}}
	}), "mkdir /m && mount -t tmpfs none /m && echo x > /m/x && umount /m && mount -t proc proc /m && test -d /m/1 && echo mounted; hostname other && hostname; hostname inside-pod",
		"mounted\nother\n"},
	{"devices", nil, "cd /dev && ls -d full null random tty urandom zero; stat -c '%F' null; test -c ptmx && echo x > null && head -c 3 zero | wc -c",
		"full\nnull\nrandom\ntty\nurandom\nzero\ncharacter special file\n3\n"},
	{"a device of its own", func(cfg *runtimeapi.ContainerConfig) {
		cfg.Devices = []*runtimeapi.Device{{HostPath: "/dev/net/tun", ContainerPath: "/dev/net/tun", Permissions: "rwm"}}
	}, "test -c /dev/net/tun && echo there", "there\n"},
	{"shared files", nil, "for f in hosts hostname resolv.conf; do stat -c '%F %a %u:%g' /etc/$f; touch /etc/$f; done; echo x > /dev/shm/x && cat /dev/shm/x",
		"regular file 644 0:0\nregular file 644 0:0\nregular file 644 0:0\nx\n"},
	{"read-only root", securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) { s.ReadonlyRootfs = true }),
		"touch /new 2>&1; touch /etc/hosts 2>&1; touch /dev/shm/ok && echo ok", "touch: /new: Read-only file system\ntouch: /etc/hosts: Read-only file system\nok\n"},
	{"seccomp", profile(runtimeapi.SecurityProfile_RuntimeDefault, ""), showSeccomp + "unshare -U true 2>&1 | grep -c 'not permitted'", "2\n1\n"},
	{"sysfs, proc and cgroup", nil, "touch /sys/x 2>/dev/null || echo refused; ls /sys/class/net | grep eth0; test -r /sys/fs/cgroup && ls /proc/self/ns | grep -c user", "refused\neth0\n1\n"},
}

// TestUserNamespace runs a container for each case in a pod with a user namespace.
func TestUserNamespace(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newUsernsPod(t, h, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Hostname = "inside-pod" })
		var cases []insideCase
		for _, tc := range usernsCases {
			change := tc.change
			tc.change = func(cfg *runtimeapi.ContainerConfig) {
				if change != nil {
					change(cfg)
				}
				inUserns(cfg)
			}
			cases = append(cases, tc)
		}
		p.inside(t, cases)
	})
}

// TestUserNamespaceShared checks that a pod's containers, and who is added to them, are in
// one user namespace, and which namespaces they share otherwise.
func TestUserNamespaceShared(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newUsernsPod(t, h, namespaceOptions(func(o *runtimeapi.NamespaceOption) { o.Pid = runtimeapi.NamespaceMode_POD }))
		const shared = "for n in user ipc net uts; do readlink /proc/self/ns/$n; done"
		inPod := func(name string) *container {
			cfg := inUserns(idleConfig(name))
			cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
			return p.start(cfg)
		}
		a, b := inPod("a"), inPod("b")
		own := p.start(inUserns(idleConfig("own")))
		cfg := inUserns(idleConfig("target"))
		cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_TARGET
		cfg.Linux.SecurityContext.NamespaceOptions.TargetId = own.id
		target := p.start(cfg)
		for _, c := range []*container{b, own, target} {
			require.Equal(t, a.sh(shared), c.sh(shared))
		}
		const pids = "readlink /proc/self/ns/pid"
		require.Equal(t, a.sh(pids), b.sh(pids))
		require.Equal(t, own.sh(pids), target.sh(pids))
		require.NotEqual(t, a.sh(pids), own.sh(pids))
		require.Equal(t, "2\n", a.sh("ls -l /proc/[0-9]*/exe 2>/dev/null | grep -c /helper"), "each sees the other")
		require.Equal(t, "0\n0\n", a.sh("stat -c %u /proc/1; id -u"))
		for _, c := range []*container{a, own} {
			const safe = "rw,nosuid,nodev,noexec,relatime\n"
			require.Equal(t, safe+safe, c.sh("for m in /proc /dev/mqueue; do awk -v m=$m '$2 == m { print $4 }' /proc/mounts; done"))
		}
		a.sh("echo shared > /dev/shm/file")
		require.Equal(t, "shared\n", own.sh("cat /dev/shm/file"))
		require.Equal(t, "0\n", b.sh("awk '/^Uid/ { print $2 }' /proc/1/status"))
	})
}

// TestUserNamespaceExec checks the streams and terminals of processes that are added, by
// root and by a user, who may open them again.
func TestUserNamespaceExec(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newUsernsPod(t, h)
		for _, user := range []int64{0, 1000} {
			cfg := inUserns(idleConfig(fmt.Sprint("c", user)))
			cfg.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: user}
			c := p.start(cfg)
			require.Equal(t, fmt.Sprintf("%d\nagain\n", user), c.sh("id -u; echo again > /proc/self/fd/1; echo error > /dev/stderr"))
			var out strings.Builder
			require.NoError(t, c.stream(remotecommand.StreamOptions{Stdout: &out, Tty: true},
				"/bin/sh", "-c", "stat -c %u $(tty); echo again > $(tty); test -t 0 -a -t 1 -a -t 2 && echo terminal"))
			require.Equal(t, fmt.Sprintf("%d\r\nagain\r\nterminal\r\n", user), out.String())
		}
		cfg := inUserns(shellConfig("terminal", "stat -c %u $(tty); test -t 0 -a -t 1 && echo terminal > $(tty)"))
		cfg.Stdin, cfg.Tty = true, true
		c := p.start(cfg)
		require.Zero(t, c.awaitExit().GetExitCode())
		require.Equal(t, "0\nterminal\n", c.text("stdout"))
	})
}

// TestUserNamespacePrivileged checks that a privileged container of such a pod may do what
// it wants to its namespaces, and nothing to the machine.
func TestUserNamespacePrivileged(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newUsernsPod(t, h, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Linux.SecurityContext.Privileged = true })
		cfg := inUserns(idleConfig("c"))
		cfg.Linux.SecurityContext.Privileged = true
		c := p.start(cfg)
		c.sh("mkdir /m && mount -t tmpfs none /m && mount --bind /etc /m && umount /m && umount /m")
		c.sh("echo 1 > /proc/sys/net/ipv4/ip_forward && ip addr add 192.0.2.1/32 dev lo && ping -c 1 -W 5 192.0.2.1")
		require.Equal(t, "1\n", c.sh("cat /proc/sys/net/ipv4/ip_forward"))
		c.sh("mkdir /dev/q && mount -t mqueue none /dev/q && touch /dev/q/x && rm /dev/q/x && umount /dev/q")
		for _, script := range []string{"echo 7 > /proc/sys/kernel/panic", "echo 7 > /proc/sys/vm/overcommit_memory", "mknod /n b 254 0", "date -s 2000-01-01"} {
			require.Regexp(t, "(?i)not permitted|permission denied|read-only", c.sh("("+script+") 2>&1 || true"), script)
		}
		if h == testnode.CloudHV {
			require.Equal(t, "no\n", c.sh("ls /dev/kvm /dev/vda /dev/vdb >/dev/null 2>&1 && echo yes || echo no"))
		}
	})
}

// TestUserNamespaceVolumes checks whom files of the host belong to, inside and outside, by
// mounts with and without ID mappings.
func TestUserNamespaceVolumes(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		dir := openDir(t)
		for name, owner := range map[string]int{"roots": 0, "users": 1000, "strangers": 100_000} {
			file := filepath.Join(dir, name)
			require.NoError(t, os.WriteFile(file, []byte(name+"\n"), 0o640))
			require.NoError(t, os.Chown(file, owner, owner))
		}
		cfg := inUserns(withMounts(idleConfig("c"),
			&runtimeapi.Mount{ContainerPath: "/v", HostPath: dir},
			&runtimeapi.Mount{ContainerPath: "/ro", HostPath: dir, Readonly: true},
			&runtimeapi.Mount{ContainerPath: "/file", HostPath: filepath.Join(dir, "roots")}))
		plain := openDir(t)
		require.NoError(t, os.Chmod(plain, 0o777))
		require.NoError(t, os.WriteFile(filepath.Join(plain, "roots"), nil, 0o644))
		require.NoError(t, os.WriteFile(filepath.Join(plain, "mine"), nil, 0o644))
		require.NoError(t, os.Chown(filepath.Join(plain, "mine"), firstUser, firstGroup))
		cfg.Mounts = append(cfg.Mounts, &runtimeapi.Mount{ContainerPath: "/plain", HostPath: plain})
		c := newUsernsPod(t, h).start(cfg)

		require.Equal(t, "0:0\n1000:1000\n65534:65534\n0:0\n0:0\n", c.sh("stat -c '%u:%g' /v/roots /v/users /v/strangers /file /ro/roots"))
		require.Equal(t, "roots\nusers\nroots\n", c.sh("cat /v/roots /v/users /file"))
		require.Contains(t, c.sh("cat /v/strangers 2>&1 || true"), "Permission denied")
		require.Contains(t, c.sh("chown 0:0 /v/strangers 2>&1 || true"), "not permitted")
		c.sh("umask 022; echo new > /v/new && mkdir /v/dir && ln -s new /v/link && ln /v/new /v/dir/hard && mkfifo /v/fifo && mv /v/fifo /v/dir/moved")
		c.sh("echo given > /v/given && chown 1000:2000 /v/given && chown 7:8 /v/users && echo more >> /file")
		require.Contains(t, c.sh("chown 65536 /v/given 2>&1 || true"), "nvalid argument", "nobody of the namespace's")
		require.Equal(t, "1000:2000\n7:8\n0:0\n", c.sh("stat -c '%u:%g' /v/given /v/users /v/link"))
		for name, want := range map[string]string{
			"new": "0:0", "dir": "0:0", "link": "0:0", "dir/hard": "0:0", "dir/moved": "0:0", "given": "1000:2000", "users": "7:8", "strangers": "100000:100000",
		} {
			require.Equal(t, want, owners(t, filepath.Join(dir, name)), name)
		}
		require.Contains(t, c.sh("(echo x > /ro/new) 2>&1 || true"), "Read-only file system")

		// Without mappings the owners are the host's own numbers.
		require.Equal(t, "65534:65534\n0:0\n", c.sh("stat -c '%u:%g' /plain/roots /plain/mine"))
		require.Contains(t, c.sh("(echo x > /plain/roots) 2>&1 || true"), "Permission denied")
		c.sh("echo x > /plain/mine && echo x > /plain/new && chown 5:6 /plain/new")
		require.Equal(t, fmt.Sprintf("%d:%d", firstUser+5, firstGroup+6), owners(t, filepath.Join(plain, "new")))
	})
}

// TestUserNamespaceVolumeFiles is TestVolumeFiles in a user namespace.
func TestUserNamespaceVolumeFiles(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		c := newUsernsPod(t, h).start(inUserns(withMounts(idleConfig("c"), &runtimeapi.Mount{ContainerPath: "/v", HostPath: openDir(t)})))
		out, errOut, code, err := c.n.ExecSync(testContext(t), c.id, testimage.HelperPath, "files", "/v")
		require.NoError(t, err)
		require.Equal(t, "checked\n", out, errOut)
		require.Zero(t, code)
		t.Logf("\n%s", errOut)
	})
}

// TestUserNamespaceImageVolume is TestImageVolume in a user namespace: CRI makes the volume,
// and has it mapped.
func TestUserNamespaceImageVolume(t *testing.T) {
	n := poolNode(t, map[string]any{"min": 0, "max": 0})
	img, err := testimage.Volume(suite.helper)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.VolumeRef, img))
	forHandlers(t, func(t *testing.T, h string) {
		requireUserns(t, h)
		p := podBy(t, n, h, namespaceOptions(func(o *runtimeapi.NamespaceOption) { o.UsernsOptions = podUsers() }))
		c := p.start(inUserns(testnode.ContainerConfig("c", testimage.VolumeRef, testimage.HelperPath, "term", "0")))
		require.Equal(t, "by the image\n", c.sh("cat /data/*"))
		require.Equal(t, "0:0\n0:0\n", c.sh("stat -c '%u:%g' /data /data/*"))
		c.sh("echo written > /data/new && rm /data/prepared")
		require.Equal(t, "written\n", c.sh("cat /data/*"))
	})
}

// owners are a file's, which may be a symbolic link.
func owners(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Lstat(path, &st))
	return fmt.Sprintf("%d:%d", st.Uid, st.Gid)
}

// TestUserNamespaceVolumeGroup is TestVolumeGroup in a user namespace: what fsGroup
// builds on.
func TestUserNamespaceVolumeGroup(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		dir := openDir(t)
		require.NoError(t, os.Chown(dir, 0, 2000))
		require.NoError(t, os.Chmod(dir, 0o2775|os.ModeSetgid))
		cfg := inUserns(withMounts(idleConfig("c"), &runtimeapi.Mount{ContainerPath: "/v", HostPath: dir}))
		cfg.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
		cfg.Linux.SecurityContext.SupplementalGroups = []int64{2000}
		c := newUsernsPod(t, h).start(cfg)
		require.Equal(t, "1000 2000 644\n", c.sh("umask 022; echo x > /v/f && echo more >> /v/f && stat -c '%u %g %a' /v/f"))
		require.Equal(t, "1000 2000 2755\n", c.sh("umask 022; mkdir /v/d && stat -c '%u %g %a' /v/d"))
		require.Contains(t, c.sh("(chown 0 /v/f) 2>&1 || true"), "not permitted")
		require.Equal(t, "1000:2000", owners(t, filepath.Join(dir, "f")))
	})
}

// TestUserNamespaceNetwork checks that the pod is reached at its addresses and by a
// port-forward, and that its sysctls are those of its namespaces.
func TestUserNamespaceNetwork(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newUsernsPod(t, h, func(cfg *runtimeapi.PodSandboxConfig) {
			cfg.Linux.Sysctls = map[string]string{
				"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "10000 20000", "net.ipv4.ping_group_range": "0 1000",
			}
		})
		c := p.start(inUserns(helperConfig("server", "serve", fmt.Sprint("127.0.0.1:", onV4), strconv.Itoa(onAny))))
		c.awaitLine("listening")
		require.Equal(t, "1\n10000\t20000\n0\n0\t1000\n", c.sh("cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_local_port_range "+
			"/proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range"))
		addrs := c.sh("ip addr show eth0")
		for _, ip := range p.ips() {
			require.Contains(t, addrs, ip+"/")
		}
		require.Contains(t, c.sh("ip addr show lo"), "127.0.0.1/8")
		require.Contains(t, c.sh("ip route"), fmt.Sprintf("default via %s dev eth0", p.n.HostIPs()[0]))
		c.sh(fmt.Sprintf("ping -c 1 -W 10 %s", p.n.HostIPs()[0]))
		seed := uint64(time.Now().UnixNano())
		require.NoError(t, pattern.RecvOn(p.forwarder(t).connect(t, onV4), forwarded, seed))
		require.NoError(t, pattern.SendOn(p.forwarder(t).connect(t, onAny), forwarded, seed))
	})
}

// TestUserNamespaceRestart checks that a pod in a user namespace does not care for
// containerd.
func TestUserNamespaceRestart(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		dir := openDir(t)
		mount := func() *runtimeapi.Mount { return &runtimeapi.Mount{ContainerPath: "/v", HostPath: dir} }
		p := newUsernsPod(t, h)
		c := p.start(inUserns(withMounts(idleConfig("c"), mount())))
		require.NoError(t, p.n.Restart(testContext(t), false))
		d := p.start(inUserns(withMounts(idleConfig("d"), mount())))
		const userns = "readlink /proc/self/ns/user"
		require.Equal(t, c.sh(userns), d.sh(userns))
		d.sh("echo x > /v/f")
		require.Equal(t, "0:0", owners(t, filepath.Join(dir, "f")))
		require.NoError(t, p.n.RemoveContainer(testContext(t), c.id))
		require.Equal(t, "0:0\n", d.sh("stat -c '%u:%g' /v/f"))
	})
}

// TestUserNamespaceRefused checks that the handler declares user namespaces, for which
// kubelet looks, and that who asks for one that cannot be is told.
func TestUserNamespaceRefused(t *testing.T) {
	requireCloudHV(t)
	n := node(t)
	require.True(t, declaresUserns(t, testnode.CloudHV))
	before, err := settled(testContext(t), n)
	require.NoError(t, err)
	for name, tc := range map[string]struct {
		change func(*runtimeapi.PodSandboxConfig, *runtimeapi.UserNamespace)
		want   string
	}{
		"mode": {func(_ *runtimeapi.PodSandboxConfig, u *runtimeapi.UserNamespace) {
			u.Mode = runtimeapi.NamespaceMode_CONTAINER
		}, "userns_options.mode = CONTAINER: want POD"},
		"target": {func(_ *runtimeapi.PodSandboxConfig, u *runtimeapi.UserNamespace) {
			u.Mode = runtimeapi.NamespaceMode_TARGET
		}, "userns_options.mode = TARGET: want POD"},
		"no root": {func(_ *runtimeapi.PodSandboxConfig, u *runtimeapi.UserNamespace) {
			u.Uids[0].ContainerId = 1
		}, "userns_options.uids: container_id = 1: want 0"},
		"groups": {func(cfg *runtimeapi.PodSandboxConfig, _ *runtimeapi.UserNamespace) {
			cfg.Linux.Sysctls = map[string]string{"net.ipv4.ping_group_range": "0 65536"}
		}, `is no group of the pod's user namespace`},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := podConfig(t)
			users := podUsers()
			cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = users
			tc.change(cfg, users)
			_, err = n.RunPod(testContext(t), cfg, testnode.CloudHV)
			require.ErrorContains(t, err, tc.want)
		})
	}
	require.NoError(t, n.AwaitCensus(testContext(t), before))
}
