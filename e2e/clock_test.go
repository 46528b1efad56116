// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// standstill is how long a VM stands still.
const standstill = 4 * time.Second

// awaitClock waits until the guest's clock is right, and returns how far it was off
// when it was asked first.
func (p *pod) awaitClock(limit time.Duration) time.Duration {
	p.t.Helper()
	ip, began := p.ips()[0], time.Now()
	first, asked := time.Duration(0), false
	ctx, cancel := context.WithTimeout(testContext(p.t), testnode.Scale(limit))
	defer cancel()
	require.NoError(p.t, testnode.Eventually(ctx, func(ctx context.Context) error {
		off, _, err := guestTime(ctx, ip)
		if err != nil {
			return err
		}
		if !asked {
			first, asked = off, true
		}
		if off.Abs() > clockError {
			return fmt.Errorf("the guest's clock is off by %s", off)
		}
		return nil
	}))
	p.t.Logf("the clock was off by %s, and right after %s at the latest", first, time.Since(began).Round(time.Millisecond))
	return first
}

// clockNode runs a pod, whose container can set the clock and serves the time, on a
// node that looks at clocks each second.
func clockNode(t *testing.T) (p *pod, box *container, address string) {
	t.Helper()
	address = freeAddress(t)
	n := ownNode(t, map[string]any{"clock_sync": "1s", "pool": map[string]any{"min": 0, "max": 0}},
		func(o *testnode.Options) { o.Metrics = address })
	img, err := testimage.Helper(suite.helper)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.HelperRef, img))
	p = awaitOutcome(t, n, "miss")
	cfg := helperConfig("box", "who", fmt.Sprint(timePort))
	cfg.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"SYS_TIME"}}
	box = p.start(cfg)
	box.awaitLine("listening")
	return p, box, address
}

// TestClock lets a guest's clock go wrong in each way: it comes right by itself.
func TestClock(t *testing.T) {
	p, box, address := clockNode(t)
	p.awaitClock(3 * time.Second)
	stepped := func() float64 { return sample(t, scrape(t, address), "clock_syncs_total", "stepped") }
	// The guest's clock is right before the host counts it.
	awaitStep := func(t *testing.T, before float64) {
		require.NoError(t, testnode.Eventually(testContext(t), func(context.Context) error {
			if stepped() <= before {
				return fmt.Errorf("nobody has set it back")
			}
			return nil
		}))
	}

	t.Run("the VMM is stopped", func(t *testing.T) {
		pid := p.info().VMMPid
		require.NoError(t, unix.Kill(pid, unix.SIGSTOP))
		time.Sleep(standstill)
		require.NoError(t, unix.Kill(pid, unix.SIGCONT))
		p.awaitClock(5 * time.Second)
	})
	t.Run("the guest is stopped", func(t *testing.T) {
		before := stepped()
		p.hang()
		time.Sleep(standstill)
		p.cont()
		p.awaitClock(5 * time.Second)
		if !suite.kvm { // where the processor's own counter goes on meanwhile, and the guest's clock by it
			awaitStep(t, before)
		}
	})
	for _, by := range []string{"1h", "-36h", "300ms"} {
		t.Run("it is set by "+by, func(t *testing.T) {
			before := stepped()
			box.exec(testimage.HelperPath, "setclock", by)
			p.awaitClock(5 * time.Second)
			awaitStep(t, before)
		})
	}
	t.Run("containerd is away", func(t *testing.T) {
		vm := filepath.Dir(p.info().VMMLog)
		require.NoError(t, p.n.Kill(testContext(t)))
		control(t, vm, stop)
		time.Sleep(standstill)
		control(t, vm, cont)
		require.NoError(t, p.n.Start(testContext(t)))
		p.awaitClock(10 * time.Second)
	})
}

// control has the VMM do something over its monitor, which nobody else has.
func control(t *testing.T, vm, command string) {
	t.Helper()
	if socket := filepath.Join(vm, "api.sock"); exists(socket) {
		require.NoError(t, askCloudHypervisor(socket, command))
		return
	}
	conn, err := net.Dial("unix", filepath.Join(vm, "qmp.sock"))
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, conn.SetDeadline(time.Now().Add(testnode.Scale(10*time.Second))))
	lines := bufio.NewReader(conn)
	_, err = lines.ReadString('\n') // the greeting
	require.NoError(t, err)
	for _, c := range []string{"qmp_capabilities", command} {
		_, err := io.WriteString(conn, `{"execute":"`+c+`"}`+"\n")
		require.NoError(t, err)
		for answer := ""; ; {
			answer, err = lines.ReadString('\n')
			require.NoError(t, err)
			if len(answer) > 10 && answer[:10] == `{"return":` {
				break
			}
		}
	}
}
