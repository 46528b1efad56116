// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package stdio

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var id = strings.Repeat("0123456789abcdef", 2)

// host serves a table of streams and dials it.
type host struct {
	t       *testing.T
	streams *Streams
	addr    string
}

func newHost(t *testing.T, change ...func(*Streams)) *host {
	t.Helper()
	h := &host{t: t, streams: NewStreams(), addr: filepath.Join(t.TempDir(), "s")}
	for _, c := range change {
		c(h.streams)
	}
	l, err := net.Listen("unix", h.addr)
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() { _ = h.streams.Serve(t.Context(), l) })
	t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
	return h
}

func (h *host) dial(header string) *net.UnixConn {
	h.t.Helper()
	c, err := net.Dial("unix", h.addr)
	require.NoError(h.t, err)
	h.t.Cleanup(func() { _ = c.Close() })
	_, err = c.Write([]byte(header))
	require.NoError(h.t, err)
	return c.(*net.UnixConn)
}

// open opens a stream that is accepted.
func (h *host) open(id string) *net.UnixConn {
	h.t.Helper()
	c := h.dial(id + "\n")
	var a [1]byte
	_, err := io.ReadFull(c, a[:])
	require.NoError(h.t, err)
	require.EqualValues(h.t, api.StreamAccepted, a[0])
	return c
}

func refused(t *testing.T, c net.Conn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	n, err := c.Read(make([]byte, 1))
	require.Zero(t, n)
	require.Error(t, err)
	require.NotErrorIs(t, err, errors.ErrUnsupported)
	var ne net.Error
	require.False(t, errors.As(err, &ne) && ne.Timeout(), "%v", err)
}

func TestParseHeader(t *testing.T) {
	t.Parallel()
	got, err := parseHeader([]byte(id + "\n"))
	require.NoError(t, err)
	require.Equal(t, id, got)
	for _, h := range []string{"", id, id + "x", strings.ToUpper(id) + "\n", "../" + id[3:] + "\n", id + "\n\n"} {
		_, err := parseHeader([]byte(h))
		require.True(t, errdefs.IsInvalidArgument(err), "%q", h)
	}
}

func FuzzParseHeader(f *testing.F) {
	f.Add([]byte(id + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if got, err := parseHeader(b); err == nil && !ValidID(got) {
			t.Fatalf("%q is no ID", got)
		}
	})
}

func TestStreams(t *testing.T) {
	h := newHost(t)
	c := h.open(id)
	refused(t, h.dial(id+"\n")) // in use
	refused(t, h.dial("nonsense\n"+id))
	_, err := h.streams.take(strings.Repeat("0", 32))
	require.True(t, errdefs.IsNotFound(err))
	_, err = h.streams.take("x")
	require.True(t, errdefs.IsInvalidArgument(err))
	s, err := h.streams.take(id)
	require.NoError(t, err)
	_, err = h.streams.take(id)
	require.True(t, errdefs.IsAlreadyExists(err))
	require.NoError(t, s.Close())
	refused(t, c)
	require.Empty(t, h.streams.byID)
	require.Zero(t, h.streams.pending)
}

func TestStreamsExpire(t *testing.T) {
	h := newHost(t, func(s *Streams) { s.claim, s.header = 50*time.Millisecond, 50*time.Millisecond })
	refused(t, h.open(id))
	refused(t, h.dial("")) // says nothing
	require.Eventually(t, func() bool {
		h.streams.mu.Lock()
		defer h.streams.mu.Unlock()
		return h.streams.pending == 0 && len(h.streams.byID) == 0
	}, 10*time.Second, time.Millisecond)
}

func TestStreamsBounded(t *testing.T) {
	t.Parallel()
	s := NewStreams()
	for range maxUnclaimed {
		require.True(t, s.reserve())
	}
	require.False(t, s.reserve())
	s.release()
	require.True(t, s.reserve())
}

// process runs a shell script with p's ends, as crun would.
func process(t *testing.T, p *IO, script string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sh", "-c", script)
	p.Runc().Set(cmd)
	require.NoError(t, cmd.Start())
	require.NoError(t, runcIO{p}.CloseAfterStart())
	p.Copy(t.Context(), nil)
	return cmd
}

func ids(n byte) string { return strings.Repeat("0", 31) + string('0'+n) }

func TestCopy(t *testing.T) {
	h := newHost(t)
	in, out, errs := h.open(ids(0)), h.open(ids(1)), h.open(ids(2))
	p, err := Open(h.streams, Config{Stdin: ids(0), Stdout: ids(1), Stderr: ids(2)})
	require.NoError(t, err)
	defer p.Close()
	cmd := process(t, p, "cat; echo done >&2")
	data := bytes.Repeat([]byte("0123456789"), 300_000)
	go func() {
		_, _ = in.Write(data)
		_ = in.CloseWrite()
	}()
	got, err := io.ReadAll(out)
	require.NoError(t, err)
	require.True(t, bytes.Equal(data, got))
	got, err = io.ReadAll(errs)
	require.NoError(t, err)
	require.Equal(t, "done\n", string(got))
	require.NoError(t, cmd.Wait())
	<-p.Drained()
}

// Output that a child holds open goes on after the process's exit.
func TestOutputOutlivesProcess(t *testing.T) {
	h := newHost(t)
	out := h.open(ids(1))
	p, err := Open(h.streams, Config{Stdout: ids(1)})
	require.NoError(t, err)
	defer p.Close()
	cmd := process(t, p, "(read x < /dev/null; sleep 0.2; echo late) & exit 3")
	require.Error(t, cmd.Wait())
	p.Exited()
	got, err := io.ReadAll(out)
	require.NoError(t, err)
	require.Equal(t, "late\n", string(got))
}

// A lost host ends nothing: the process blocks until Close.
func TestLostHost(t *testing.T) {
	h := newHost(t)
	out := h.open(ids(1))
	p, err := Open(h.streams, Config{Stdout: ids(1)})
	require.NoError(t, err)
	cmd := process(t, p, "while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done")
	require.NoError(t, out.Close())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		t.Fatalf("the process ended: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	p.Close()
	require.Error(t, <-ended) // SIGPIPE
	<-p.Drained()
}

func TestWithoutStreams(t *testing.T) {
	h := newHost(t)
	p, err := Open(h.streams, Config{})
	require.NoError(t, err)
	defer p.Close()
	cmd := process(t, p, "cat; echo out; echo err >&2")
	require.NoError(t, cmd.Wait())
	<-p.Drained()
	require.True(t, errdefs.IsFailedPrecondition(p.Resize(1, 1)))
}

func TestOpenFails(t *testing.T) {
	h := newHost(t)
	out := h.open(ids(1))
	_, err := Open(h.streams, Config{Stdout: ids(1), Stderr: ids(2)})
	require.True(t, errdefs.IsNotFound(err))
	refused(t, out) // the stream that was there has ended
	_, err = Open(h.streams, Config{Terminal: true, Stderr: ids(2)})
	require.True(t, errdefs.IsInvalidArgument(err))
}
