// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// A guest that does not even let itself be dialled is killed when its time is up.
func TestAGuestThatCannotBeAskedIsKilledInTime(t *testing.T) {
	n := newNode(t)
	n.run("a")
	n.cfg.PowerOffTimeout = 50 * time.Millisecond
	n.driver.vm.stuckDial = true
	begin := time.Now()
	require.NoError(t, n.Stop(n.ctx(), "a"))
	require.Less(t, time.Since(begin), 5*time.Second)
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}

// dialOnly is a VM that can be dialled.
type dialOnly struct {
	vmm.VM
	conn net.Conn
}

func (d dialOnly) Dial(context.Context, uint32) (net.Conn, error) { return d.conn, nil }

func askInfo(ctx context.Context, m guestv1.MachineService) (*guestv1.InfoResponse, error) {
	return m.Info(ctx, &guestv1.InfoRequest{})
}

// A pipe holds nothing: a guest that does not read blocks the request.
func TestAGuestThatDoesNotReadCostsTheLimit(t *testing.T) {
	host, guest := net.Pipe()
	defer guest.Close()
	begin := time.Now()
	_, err := callGuest(t.Context(), dialOnly{conn: host}, 50*time.Millisecond, askInfo)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Less(t, time.Since(begin), 5*time.Second)
}

func message(length, stream uint32, kind byte, body string) []byte {
	b := binary.BigEndian.AppendUint32(nil, length)
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(append(b, kind, 0), body...)
}

// countLogs counts the lines of containerd's log.
type countLogs struct{ n atomic.Int64 }

func (c *countLogs) Levels() []logrus.Level { return logrus.AllLevels }

func (c *countLogs) Fire(*logrus.Entry) error {
	c.n.Add(1)
	return nil
}

func TestAGuestThatBabbles(t *testing.T) {
	for name, tc := range map[string]struct {
		raw  []byte
		want string
	}{
		"on another stream": {message(0, 3, ttrpcResponse, ""), "on stream 3"},
		"not an answer":     {message(1, firstStream, 3, "x"), "type 3"},
		"too much":          {message(maxGuestAnswer+1, firstStream, ttrpcResponse, "x"), "65537 bytes"},
		"no end":            {message(4<<20, firstStream, ttrpcResponse, strings.Repeat("x", 4<<10)), "4194304 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.driver.agent.raw = tc.raw
			require.NoError(t, n.create("a"))
			lines := &countLogs{}
			hooks := log.L.Logger.ReplaceHooks(logrus.LevelHooks{})
			defer log.L.Logger.ReplaceHooks(hooks)
			log.L.Logger.AddHook(lines)
			_, err := n.Start(n.ctx(), "a")
			require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
			require.ErrorContains(t, err, tc.want)
			require.Less(t, lines.n.Load(), int64(20))
			n.requireNothing()
		})
	}
}

func TestAGuestsErrorIsBoundedAndQuoted(t *testing.T) {
	n := newNode(t)
	n.driver.agent.info = fmt.Errorf("no\x1b[31m\nlevel=fatal \"%s: %w", strings.Repeat("x", maxGuestAnswer/2), errdefs.ErrResourceExhausted)
	require.NoError(t, n.create("a"))
	_, err := n.Start(n.ctx(), "a")
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	require.Less(t, len(err.Error()), maxGuestError+200)
	require.ErrorContains(t, err, `the guest's agent: "no?[31m?level=fatal \"xxx`)
	n.requireNothing()
}

// What comes through is one response of a bounded length, whatever arrives and
// however it is cut.
func FuzzAnswer(f *testing.F) {
	f.Add(message(3, firstStream, ttrpcResponse, "abcd"), 2)
	f.Add(message(0, 3, 3, ""), 100)
	f.Fuzz(func(t *testing.T, data []byte, cut int) {
		host, guest := net.Pipe()
		go func() {
			defer guest.Close()
			for chunk := min(max(cut, 1), 1<<10); len(data) > 0; data = data[min(chunk, len(data)):] {
				if _, err := guest.Write(data[:min(chunk, len(data))]); err != nil {
					return
				}
			}
		}()
		sent := bytes.Clone(data)
		got, err := io.ReadAll(&answerConn{Conn: host})
		_ = host.Close()
		if !bytes.HasPrefix(sent, got) || len(got) > ttrpcHeader+maxGuestAnswer {
			t.Fatalf("%d bytes of %d", len(got), len(sent))
		}
		if err != nil && !errors.Is(err, errAnswer) {
			t.Fatal(err)
		}
		if len(got) >= ttrpcHeader {
			length := binary.BigEndian.Uint32(got[:4])
			if length > maxGuestAnswer || binary.BigEndian.Uint32(got[4:8]) != firstStream || got[8] != ttrpcResponse ||
				len(got) > ttrpcHeader+int(length) {
				t.Fatalf("%d bytes let through for %q", len(got), got[:ttrpcHeader])
			}
		}
	})
}
