// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

const (
	// clockError is by how much a guest's clock may be off.
	clockError = 50 * time.Millisecond
	timePort   = 7000
)

// draws are the sources of which no two clones may get the same.
var draws = []string{
	"c_getrandom", "c_urandom", "c_auxv", // of a C program
	"getrandom", "urandom", "crypto", "math", "maphash", // of a Go program
	"boot_id", "machine_id",
}

// clone is what one VM told.
type clone struct {
	// who are the words of the first programs of its container.
	who map[string]string
	// off is how far its clock was ahead of the host's, and rate how much more time
	// since boot had passed than of day between two looks.
	off, rate time.Duration
}

// guestTime asks the helper in a pod for the time, until the answer takes little, and
// returns how far the guest's clock is ahead, and what its CLOCK_BOOTTIME is ahead of
// its time of day.
func guestTime(ctx context.Context, ip string) (off, sinceBoot time.Duration, _ error) {
	ctx, cancel := context.WithTimeout(ctx, testnode.Scale(time.Minute))
	defer cancel()
	var conn net.Conn
	err := testnode.Eventually(ctx, func(ctx context.Context) (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(ip, strconv.Itoa(timePort)))
		return err
	})
	if err != nil {
		return 0, 0, err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	best := time.Hour
	for answer := make([]byte, 16); best > clockError/2 && ctx.Err() == nil; {
		began := time.Now()
		if _, err := conn.Write([]byte{1}); err != nil {
			return 0, 0, err
		}
		if _, err := io.ReadFull(conn, answer); err != nil {
			return 0, 0, err
		}
		took := time.Since(began)
		if took >= best {
			continue
		}
		best = took
		now := int64(binary.BigEndian.Uint64(answer))
		off = time.Unix(0, now).Sub(began.Add(took / 2).Round(0))
		sinceBoot = time.Duration(int64(binary.BigEndian.Uint64(answer[8:])) - now)
	}
	return off, sinceBoot, nil
}

// timeScript runs the clones' programs and then serves the time.
func timeScript(port int) string {
	return fmt.Sprintf("%s && exec %s who %d", testimage.CWhoPath, testimage.HelperPath, port)
}

var machineIDInLog = regexp.MustCompile(`machine_id=([0-9a-f]{32})\b`)

// lookAt runs a pod and returns what its first programs drew, and its time.
func lookAt(ctx context.Context, n *testnode.Node, i int) (c clone, retErr error) {
	cfg := n.PodConfig(fmt.Sprint("clone", i))
	id, err := n.RunPod(ctx, cfg, testnode.CloudHV)
	if err != nil {
		return c, err
	}
	defer func() {
		retErr = errors.Join(retErr, n.StopPod(ctx, id), n.RemovePod(ctx, id), os.RemoveAll(cfg.GetLogDirectory()))
	}()
	box := shellConfig("box", timeScript(timePort))
	box.Image.Image = testimage.ClonesRef
	cid, err := n.CreateContainer(ctx, id, cfg, box)
	if err == nil {
		err = n.StartContainer(ctx, cid)
	}
	if err != nil {
		return c, err
	}
	ips, err := n.PodIPs(ctx, id)
	if err != nil {
		return c, err
	}
	log := filepath.Join(cfg.GetLogDirectory(), box.GetLogPath())
	off, boot, err := guestTime(ctx, ips[0])
	if err != nil {
		text, _ := os.ReadFile(log)
		return c, fmt.Errorf("%w; pod %s has printed %q", err, id, text)
	}
	c.off = off
	// What was printed before may come later than an answer by the network.
	wait, cancel := context.WithTimeout(ctx, testnode.Scale(time.Minute))
	defer cancel()
	if err := testnode.Eventually(wait, func(context.Context) (err error) {
		c.who, err = drawn(n, id, log)
		return err
	}); err != nil {
		return c, err
	}
	_, again, err := guestTime(ctx, ips[0])
	c.rate = again - boot
	return c, err
}

// drawn is what a pod's programs drew. It is an error if some of it is not there yet.
func drawn(n *testnode.Node, pod, log string) (map[string]string, error) {
	lines, err := readLog(log)
	if err != nil {
		return nil, err
	}
	who := map[string]string{}
	for _, l := range lines {
		name, value, _ := strings.Cut(l.text, " ")
		who[name] = value
	}
	if m := machineIDInLog.FindStringSubmatch(consoles(n)[pod]); m != nil {
		who["machine_id"] = m[1]
	}
	for _, source := range draws {
		if who[source] == "" {
			return who, fmt.Errorf("it has drawn no %s: %v", source, who)
		}
	}
	return who, nil
}

// consoles are the logs of the VMs' consoles, by the pod that their agent names.
func consoles(n *testnode.Node) map[string]string {
	files, _ := filepath.Glob(filepath.Join(n.StateDir(), ".vms", "*", "console.log"))
	found := map[string]string{}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			if m := podInLog.FindStringSubmatch(line); m != nil {
				found[m[1]] = line
			}
		}
	}
	return found
}

var podInLog = regexp.MustCompile(`\bsandbox=([0-9a-f]{64})\b`)

// TestClones compares the first things that the workloads of clones draw: none may
// be another's, from the first byte on, and the time must be right.
func TestClones(t *testing.T) {
	n := poolNode(t, map[string]any{"min": 0, "max": 0})
	cwho, err := testimage.BuildCWho(n.Repo(), n.Dir("tmp"))
	require.NoError(t, err)
	img, err := testimage.Clones(suite.helper, cwho)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.ClonesRef, img))
	awaitOutcome(t, n, "miss").remove()
	began := time.Now()
	all, next := make([]clone, count.clones), make(chan int)
	var wg sync.WaitGroup
	for range count.clonesAtOnce {
		wg.Go(func() {
			for i := range next {
				c, err := lookAt(testContext(t), n, i)
				assert.NoError(t, err, "clone %d", i)
				all[i] = c
			}
		})
	}
	for i := range count.clones {
		next <- i
	}
	close(next)
	wg.Wait()
	require.False(t, t.Failed(), n.LogTail(4000))
	t.Logf("%d clones in %s", count.clones, time.Since(began).Round(time.Second))
	seen := map[string]string{}
	var worst time.Duration
	for i, c := range all {
		for _, source := range draws {
			require.NotEmpty(t, c.who[source], "%s of clone %d: %v", source, i, c.who)
			if other, ok := seen[c.who[source]]; ok {
				t.Errorf("clone %d drew %s from %s, as %s did", i, c.who[source], source, other)
			}
			seen[c.who[source]] = fmt.Sprint(source, " of clone ", i)
		}
		worst = max(worst, c.off.Abs())
		checkTimes(t, i, c)
	}
	t.Logf("the clock that was furthest off was so by %s", worst)
}

// checkTimes checks the clocks of a clone.
func checkTimes(t *testing.T, i int, c clone) {
	t.Helper()
	assert.Less(t, c.off.Abs(), clockError, "clone %d: its time", i)
	assert.Less(t, c.rate.Abs(), clockError, "clone %d: CLOCK_BOOTTIME does not go as the time of day", i)
	clock := map[string]time.Duration{}
	for _, name := range []string{"clock", "mtime", "monotonic", "boottime"} {
		nanos, err := strconv.ParseInt(c.who[name], 10, 64)
		require.NoError(t, err)
		clock[name] = time.Duration(nanos)
	}
	assert.Positive(t, clock["monotonic"], "clone %d", i)
	assert.GreaterOrEqual(t, clock["boottime"], clock["monotonic"], "clone %d: it never slept", i)
	assert.Less(t, clock["boottime"], testnode.Scale(10*time.Minute), "clone %d: its uptime", i)
	// A file's time is that of the last tick, of which there are a hundred a second.
	age := clock["clock"] - clock["mtime"]
	assert.True(t, age > -time.Millisecond && age < testnode.Scale(5*time.Second), "clone %d: a new file is %s old", i, age)
}
