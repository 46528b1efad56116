// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
)

// message is one of ttrpc's, whose header says so many bytes.
func message(length int, stream uint32, kind byte, payload string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(length))
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(append(b, kind, 0), payload...)
}

// babbler is a guest whose agent answers the first call by raw bytes, again and again.
type babbler struct {
	t    *testing.T
	done chan struct{}
	raw  []byte
	// sent are the bytes that the host has taken.
	sent atomic.Int64
}

func (g *babbler) Done() <-chan struct{} { return g.done }
func (*babbler) Close() error            { return nil }

func (g *babbler) Dial(_ context.Context, port uint32) (net.Conn, error) {
	host, guest := connPair(g.t)
	if port != api.PortRPC {
		return nil, errors.Join(errdefs.ErrNotFound, host.Close(), guest.Close())
	}
	g.t.Cleanup(func() { _ = guest.Close() })
	go func() {
		defer guest.Close()
		var header [ttrpcHeader]byte
		if _, err := io.ReadFull(guest, header[:]); err != nil {
			return
		}
		for {
			n, err := guest.Write(g.raw)
			g.sent.Add(int64(n))
			if err != nil {
				return
			}
		}
	}()
	return host, nil
}

// TestAnswersWithoutEnd has guests answer a call wrongly, and without end: each is lost, with
// a reason, before it has cost anything.
func TestAnswersWithoutEnd(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		raw  []byte
		want string
	}{
		"a million times":  {bytes.Repeat(message(0, 1, ttrpcResponse, ""), 1000), "2 answers to 1 calls"},
		"to other streams": {bytes.Repeat(message(0, 99, ttrpcResponse, ""), 1000), "2 answers to 1 calls"},
		"too much":         {message(maxAnswer+1, 1, ttrpcResponse, strings.Repeat("x", maxAnswer+1)), "answer of 65537 bytes"},
		"another type":     {message(1, 1, 3, "x"), "message of type 3"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			guest := &babbler{t: t, done: make(chan struct{}), raw: tc.raw}
			dir := t.TempDir()
			svc := newService(testContext(t), Config{SandboxID: "pod", Namespace: "k8s.io", TTRPCAddress: "unix:///does/not/exist"}, dir, guest)
			defer svc.close(0)
			tk := &task{svc: svc, id: "c"}
			tk.init = newProcess(tk, "", stdioPaths{}, &processIO{})
			_, err := tk.sample(testContext(t))
			if name != "a million times" { // of which the first is one
				require.Error(t, err)
			}
			select {
			case <-svc.guest.gone:
			case <-time.After(20 * time.Second):
				require.Fail(t, "the guest is not lost")
			}
			svc.running.Go(func() {}) // the reason is written before gone is closed
			reason, err := os.ReadFile(filepath.Join(dir, VMLostFile))
			require.NoError(t, err)
			assert.Contains(t, string(reason), tc.want)
			assert.Less(t, guest.sent.Load(), int64(1<<20))
		})
	}
}

// TestAnswersAfterTheirTime: a call that was given up is answered late, which is no fault.
func TestAnswersAfterTheirTime(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	p.run("c", nil, "sleep")
	release := make(chan struct{})
	p.guest.holding(release, "Stats")
	for range 3 {
		_, err := p.client.Stats(ctx, &taskapi.StatsRequest{ID: "c"})
		require.Error(t, err)
	}
	close(release)
	p.guest.fine()
	eventually(t, "answers again", func() bool {
		_, err := p.client.Stats(ctx, &taskapi.StatsRequest{ID: "c"})
		return err == nil
	})
	assert.False(t, p.svc.guest.lost())
}

// FuzzAnswers cuts and garbles what a guest sends: what is let through are answers, no more
// than were asked for, of a bounded length.
func FuzzAnswers(f *testing.F) {
	f.Add(message(3, 1, ttrpcResponse, "abcd"), uint8(1), 2)
	f.Add(append(message(1, 1, ttrpcResponse, "a"), message(0, 3, ttrpcResponse, "")...), uint8(2), 100)
	f.Add(message(maxAnswer+1, 1, ttrpcResponse, "x"), uint8(9), 5)
	f.Fuzz(func(t *testing.T, data []byte, calls uint8, cut int) {
		var asked atomic.Int64
		asked.Store(int64(calls))
		broken := 0
		a := &answers{Conn: readConn{r: &cutReader{data: data, most: max(1, cut%4096)}}, asked: &asked, broken: func(error) { broken++ }}
		got, err := io.ReadAll(a)
		if !bytes.HasPrefix(data, got) || err != nil && broken != 1 || err == nil && broken != 0 {
			t.Fatalf("%d bytes of %d, %d times broken: %v", len(got), len(data), broken, err)
		}
		for n := 0; len(got) >= ttrpcHeader; n++ {
			length := int(binary.BigEndian.Uint32(got[:4]))
			if length > maxAnswer || got[8] != ttrpcResponse || n >= int(calls) {
				// The header that broke it off is not let through whole.
				t.Fatalf("let through: % x", got[:ttrpcHeader])
			}
			got = got[min(len(got), ttrpcHeader+length):]
		}
	})
}

// readConn is a connection of which only reads are of interest.
type readConn struct {
	net.Conn
	r io.Reader
}

func (c readConn) Read(p []byte) (int, error) { return c.r.Read(p) }

// cutReader gives at most so many bytes at a time.
type cutReader struct {
	data []byte
	most int
}

func (r *cutReader) Read(p []byte) (int, error) {
	if len(r.data) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.data[:min(r.most, len(r.data))])
	r.data = r.data[n:]
	return n, nil
}
