// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// TestVolumeRandom does at random what programs do with a file, each time compared with a
// copy in memory: in a volume, in the container's writable layer, and in both at the same time
// by two processes. What the volume has at the end the host sees.
func TestVolumeRandom(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		dir := openDir(t)
		c := newPod(t, h).start(withMounts(idleConfig("c"), &runtimeapi.Mount{ContainerPath: "/v", HostPath: dir}))
		for seed := range 3 {
			began := time.Now()
			c.exec(testimage.HelperPath, "fsx", "/work/x", strconv.Itoa(count.operations), strconv.Itoa(seed))
			scratch := time.Since(began)
			began = time.Now()
			got := c.exec(testimage.HelperPath, "fsx", "/v/x", strconv.Itoa(count.operations), strconv.Itoa(seed))
			t.Logf("%d operations of seed %d: %s in the writable layer, %s in the volume", count.operations, seed, scratch, time.Since(began))
			f, err := os.Open(filepath.Join(dir, "x"))
			require.NoError(t, err)
			sum, err := pattern.Digest(f)
			require.NoError(t, err)
			require.NoError(t, f.Close())
			require.Equal(t, sum+"\n", got, "the host sees what the container has written")
		}
		c.sh(fmt.Sprintf("%[1]s fsx /v/a %[2]d 7 >/tmp/a & %[1]s fsx /v/b %[2]d 7 >/tmp/b && wait $! && cmp /tmp/a /tmp/b && cmp /v/a /v/b",
			testimage.HelperPath, count.operations))
	})
}

// TestVolumeLarge has a file of more than 4 GiB, and more files than a directory usually has.
func TestVolumeLarge(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		dir := openDir(t)
		// Sparse, with a word on each side of where numbers of 32 bits end.
		path := filepath.Join(dir, "large")
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
		require.NoError(t, err)
		defer f.Close()
		const size = 4<<30 + 4096
		offsets := []int64{0, 1<<31 - 4, 1 << 31, 1<<32 - 4, 1 << 32}
		require.NoError(t, f.Truncate(size))
		for i, at := range offsets {
			_, err := fmt.Fprintf(io.NewOffsetWriter(f, at), "%04d", i)
			require.NoError(t, err)
		}
		many := filepath.Join(dir, "many")
		require.NoError(t, os.Mkdir(many, 0o777))
		for i := range count.files {
			require.NoError(t, os.WriteFile(filepath.Join(many, "a-name-of-usual-length-"+strconv.Itoa(i)), nil, 0o644))
		}

		c := newPod(t, h).start(withMounts(idleConfig("c"), &runtimeapi.Mount{ContainerPath: "/v", HostPath: dir}))
		require.Equal(t, fmt.Sprintln(size), c.sh("stat -c %s /v/large"))
		for i, at := range offsets {
			at := strconv.FormatInt(at/4, 10)
			require.Equal(t, fmt.Sprintf("%04d", i), c.sh("dd if=/v/large bs=4 count=1 2>/dev/null skip="+at))
			c.sh(fmt.Sprintf("printf in%02d | dd of=/v/large bs=4 count=1 conv=notrunc,fsync 2>/dev/null seek=%s", i, at))
		}
		for i, at := range offsets {
			got := make([]byte, 4)
			_, err := f.ReadAt(got, at)
			require.NoError(t, err)
			require.Equal(t, fmt.Sprintf("in%02d", i), string(got), "at %d", at)
		}
		c.sh("truncate -s 3221225473 /v/large")
		info, err := f.Stat()
		require.NoError(t, err)
		require.Equal(t, int64(3221225473), info.Size())

		began := time.Now()
		require.Equal(t, fmt.Sprintln(count.files), c.exec(testimage.HelperPath, "names", "/v/many"))
		t.Logf("%d names were listed in %s", count.files, time.Since(began))
		last := "/v/many/a-name-of-usual-length-" + strconv.Itoa(count.files-1)
		require.Equal(t, "in\n", c.sh("echo in > "+last+" && cat "+last))
		c.sh("rm " + last)
		require.NoFileExists(t, filepath.Join(dir, "many", filepath.Base(last)))
	})
}

// TestQuotasHold checks that the process which writes to volumes may not write beyond quotas,
// nor into what a file system reserves for root, as root may.
func TestQuotasHold(t *testing.T) {
	requireCloudHV(t)
	p := newPod(t, testnode.CloudHV)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.shimPid()))
	require.NoError(t, err)
	for _, set := range []string{"CapPrm", "CapEff", "CapBnd"} {
		_, rest, ok := strings.Cut(string(status), set+":\t")
		require.True(t, ok)
		caps, err := strconv.ParseUint(rest[:16], 16, 64)
		require.NoError(t, err)
		require.Zero(t, caps&(1<<unix.CAP_SYS_RESOURCE), "%s of the shim", set)
	}
}

// TestVolumeQuota checks that a quota of the host's is an error inside, and that what was
// written before is there.
func TestVolumeQuota(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		dir := quotaDir(t, 1<<10)
		c := newPod(t, h).start(withMounts(idleConfig("c"), &runtimeapi.Mount{ContainerPath: "/v", HostPath: dir}))
		want := "uota exceeded"
		if h == testnode.CloudHV {
			want = "No space left on device" // see docs/volumes.md
		}
		require.Contains(t, c.sh("dd if=/dev/zero of=/v/x bs=64k count=100 2>&1 || true"), want)
		require.Contains(t, c.sh("dd if=/dev/zero of=/v/y bs=64k count=1 2>&1 || true"), want, "what comes next")
		c.sh("rm -f /v/y")
		// The directory's own block is of the quota too.
		written, err := os.Stat(filepath.Join(dir, "x"))
		require.NoError(t, err)
		require.InDelta(t, 1<<20, written.Size(), 16<<10)
		require.Equal(t, strconv.FormatInt(written.Size(), 10)+"\n", c.sh("stat -c %s /v/x"))
		c.sh("rm /v/x && echo small > /v/x && cat /v/x")
	})
}

// quotaDir is a directory in which no more than so many KiB may be: that of a project of an
// ext4 of its own.
func quotaDir(t *testing.T, kib int) string {
	t.Helper()
	top := openDir(t)
	disk := filepath.Join(t.TempDir(), "disk")
	run := func(args ...string) string {
		t.Helper()
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		require.NoError(t, err, "%v: %s", args, out)
		return strings.TrimSpace(string(out))
	}
	run("mkfs.ext4", "-q", "-m", "0", "-O", "quota,project", "-E", "quotatype=prjquota", disk, "16M")
	// The loop device goes with its mount.
	if out, err := exec.Command("mount", "-o", "loop,prjquota", disk, top).CombinedOutput(); err != nil {
		t.Skipf("ext4 has no quotas with this host's kernel (CONFIG_QFMT_V2): %s", out)
	}
	t.Cleanup(func() { run("umount", top) })
	dir := filepath.Join(top, "project")
	require.NoError(t, os.Mkdir(dir, 0o755))
	const project = 77
	run("chattr", "+P", "-p", strconv.Itoa(project), dir)
	limitProject(t, top, project, kib)
	return dir
}

// limitProject sets the limit of a project on a file system.
func limitProject(t *testing.T, top string, project, kib int) {
	t.Helper()
	f, err := os.Open(top)
	require.NoError(t, err)
	defer f.Close()
	// struct if_dqblk of linux/quota.h: the hard limit of blocks, in KiB, is the first number;
	// which of the numbers are meant is the last.
	var q [9]uint64
	q[0], q[8] = uint64(kib), 1
	const set = 0x800008<<8 | 2 // Q_SETQUOTA of PRJQUOTA
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, f.Fd(), set, uintptr(project), uintptr(unsafe.Pointer(&q)), 0, 0)
	require.Zero(t, errno, "quotactl")
}
