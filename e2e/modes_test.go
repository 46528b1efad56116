// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
	"github.com/cloudhv/containerd-cloudhv/guest/api/thread"
)

// TestModes looks at the owner and the mode of each file, directory and socket that a node
// has with pods running and VMs ready: nobody but root, and of its own files a VM's user,
// gets to what is a pod's.
func TestModes(t *testing.T) {
	requireCloudHV(t)
	n := poolNode(t, map[string]any{"min": 1, "max": 2}, func(o *testnode.Options) { o.Metrics = freeAddress(t) })
	img, err := testimage.Helper(suite.helper)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.HelperRef, img))
	require.NoError(t, n.AwaitPool(testContext(t), 1))
	p := podOn(t, n)
	p.idle("c").exec("true")
	sockets, files := 0, 0
	for _, dir := range []string{n.StateDir(), n.CacheDir()} {
		require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err != nil {
				return ignoreMissing(err)
			}
			t.Logf("%s %6d %6d %s", d.Type().String()+fmt.Sprintf(" %04o", st.Mode&0o7777), st.Uid, st.Gid, strings.TrimPrefix(path, n.Dir()))
			assert.True(t, st.Uid == 0 || st.Uid >= firstUID && st.Uid <= lastUID, "%s belongs to %d", path, st.Uid)
			assert.Zero(t, st.Mode&0o6000, "%s: setuid or setgid", path)
			switch st.Mode & unix.S_IFMT {
			case unix.S_IFLNK:
			case unix.S_IFDIR:
				assert.Zero(t, st.Mode&0o026, "%s: others may list it or write to it", path)
			case unix.S_IFSOCK, unix.S_IFIFO:
				sockets++
				assert.Zero(t, st.Mode&0o022, "%s: others may connect", path)
			default:
				files++
				assert.Zero(t, st.Mode&0o022, "%s: others may write to it", path)
				// A network namespace is mounted there, which takes rights to enter.
				if path != n.Dir("run", ".netns") && !forVMMs(strings.TrimPrefix(path, n.CacheDir())) {
					assert.Zero(t, st.Mode&0o044, "%s: others may read it", path)
				}
			}
			return nil
		}))
	}
	require.GreaterOrEqual(t, sockets, 5)
	require.GreaterOrEqual(t, files, 8)
	for _, path := range []string{n.Dir("c.sock"), n.Dir("c.sock.ttrpc")} {
		info, err := os.Stat(path)
		require.NoError(t, err)
		assert.Zero(t, info.Mode().Perm()&0o006, path)
	}
}

// forVMMs tells whether a file of the cache is one that VMMs open, each as its own user:
// images, which are no pod's, those of them that a VM's own directory has, and the snapshot that
// VMs are restored from.
func forVMMs(path string) bool {
	dir, _ := filepath.Split(path)
	return strings.HasPrefix(path, "/images/") || strings.HasPrefix(path, "/templates/") || strings.HasSuffix(dir, ".img.d/")
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// TestNothingListens looks at the sockets of containerd, of VMMs and of shims: none of ours
// is on the host's network, and in a pod's namespace there are the two listeners of its
// port-forwards, on its localhost.
func TestNothingListens(t *testing.T) {
	requireCloudHV(t)
	address := freeAddress(t)
	n := poolNode(t, map[string]any{"min": 1, "max": 2}, func(o *testnode.Options) { o.Metrics = address })
	require.NoError(t, n.AwaitPool(testContext(t), 1))
	p := podOn(t, n)
	require.NoError(t, n.AwaitPool(testContext(t), 1))
	host, err := listenersHere()
	require.NoError(t, err)
	ours := listenersOf(t, n.Pid(), host)
	// CRI's server for exec, attach and port-forward, and the metrics, as configured.
	require.Len(t, ours, 2, "%v", ours)
	for _, l := range ours {
		require.True(t, strings.HasPrefix(l, "tcp 127.0.0.1:"), l)
	}
	require.Contains(t, ours, "tcp "+address)
	vms := ctlJSON[[]ctlVM](t, n, "vms")
	require.GreaterOrEqual(t, len(vms), 2)
	for _, vm := range vms {
		for _, pid := range []int{vm.VMMPid, vm.ShimPid} {
			if pid != 0 {
				require.Empty(t, listenersOf(t, pid, host), "process %d on the host's network", pid)
			}
		}
	}
	inside, err := listenersIn(p.netNS(t))
	require.NoError(t, err)
	got := listenersOf(t, p.info().ShimPid, inside)
	require.Len(t, inside, 2, "%v", inside)
	require.Len(t, got, 2, "%v", got)
	for _, l := range got {
		at, err := net.ResolveTCPAddr("tcp", strings.TrimPrefix(strings.TrimPrefix(l, "tcp6 "), "tcp "))
		require.NoError(t, err)
		require.True(t, at.IP.IsLoopback(), l)
	}
	abstract, err := os.ReadFile("/proc/net/unix")
	require.NoError(t, err)
	for line := range strings.Lines(string(abstract)) {
		f := strings.Fields(line)
		require.False(t, len(f) > 7 && strings.HasPrefix(f[7], "@") && strings.Contains(f[7], "cloudhv"), line)
	}
}

// listenersHere are the sockets of the thread's network namespace that take connections or
// datagrams, by their inodes.
func listenersHere() (map[uint64]string, error) {
	found := map[uint64]string{}
	for name, states := range map[string]string{"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07", "udplite": "07", "raw": "07", "raw6": "07"} {
		f, err := os.Open("/proc/thread-self/net/" + name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		s := bufio.NewScanner(f)
		for s.Scan() {
			fields := strings.Fields(s.Text())
			if len(fields) < 10 || fields[3] != states {
				continue
			}
			inode, err := strconv.ParseUint(fields[9], 10, 64)
			if err != nil {
				continue // the title
			}
			found[inode] = name + " " + readableAddress(fields[1])
		}
		if err := errors.Join(s.Err(), f.Close()); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// readableAddress reads the kernel's hexadecimal form, on little-endian processors.
func readableAddress(text string) string {
	ip, port, _ := strings.Cut(text, ":")
	var b []byte
	for i := 0; i+8 <= len(ip); i += 8 {
		word, _ := strconv.ParseUint(ip[i:i+8], 16, 32)
		b = append(b, byte(word), byte(word>>8), byte(word>>16), byte(word>>24))
	}
	n, _ := strconv.ParseUint(port, 16, 16)
	return net.JoinHostPort(net.IP(b).String(), strconv.FormatUint(n, 10))
}

// listenersIn is listenersHere in another network namespace.
func listenersIn(path string) (found map[uint64]string, err error) {
	err = thread.Run(func() (err error) {
		if err = enterNetNS(path); err == nil {
			found, err = listenersHere()
		}
		return err
	})
	return found, err
}

// listenersOf are those that a process has open.
func listenersOf(t *testing.T, pid int, all map[uint64]string) (own []string) {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	require.NoError(t, err)
	require.NotEmpty(t, fds)
	for _, fd := range fds {
		to, err := os.Readlink(fd)
		text, ok := strings.CutPrefix(to, "socket:[")
		if err != nil || !ok {
			continue
		}
		inode, err := strconv.ParseUint(strings.TrimSuffix(text, "]"), 10, 64)
		require.NoError(t, err)
		if l := all[inode]; l != "" {
			own = append(own, l)
		}
	}
	return own
}
