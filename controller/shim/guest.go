// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// Guest is the way into the pod's VM. It is what guest/api/transport.Client is.
type Guest interface {
	// Dial connects to a port of the guest, and waits while the guest starts.
	// errdefs.ErrUnavailable means that the VM is gone for good.
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	// Done is closed when the VM is gone.
	Done() <-chan struct{}
	Close() error
}

// errVMLost is what calls fail with after the VM has gone.
var errVMLost = fmt.Errorf("the pod's VM is gone: %w", errdefs.ErrUnavailable)

const (
	// guestWriteLimit is how long the guest may leave the RPC connection unread.
	guestWriteLimit = 30 * time.Second
	// maxGuestText bounds an error text of the guest, in bytes.
	maxGuestText = 1024
	// maxGuestPid is the highest pid a Linux kernel gives.
	maxGuestPid = 1 << 22
)

// guestClient is the connection to the agent. It is made once, in the
// background; when it ends, the VM is lost.
type guestClient struct {
	transport Guest
	// onLost is called once, when the VM is lost, with the reason and before
	// anybody else gets to know.
	onLost func(error)

	ready chan struct{} // closed when task is set
	task  guestv1.TaskService
	rpc   *ttrpc.Client

	once sync.Once
	gone chan struct{} // closed when the VM is lost

	// heard is when the guest last answered, in Unix nanoseconds.
	heard atomic.Int64
	// asked is how many calls were made.
	asked atomic.Int64
}

func newGuestClient(transport Guest, onLost func(error)) *guestClient {
	return &guestClient{
		transport: transport,
		onLost:    onLost,
		ready:     make(chan struct{}),
		gone:      make(chan struct{}),
	}
}

// run connects to the agent and watches the VM until ctx ends.
func (g *guestClient) run(ctx context.Context) {
	go func() {
		select {
		case <-g.transport.Done():
			g.lose(errors.New("the connection to the VM has ended"))
		case <-g.gone:
		case <-ctx.Done():
		}
	}()
	const firstPause, maxPause = 20 * time.Millisecond, time.Second
	for pause := firstPause; ; pause = min(2*pause, maxPause) {
		conn, err := g.transport.Dial(ctx, api.PortRPC)
		if err == nil {
			g.connected(conn)
			return
		}
		if ctx.Err() != nil {
			return
		}
		if errdefs.IsUnavailable(err) {
			g.lose(err)
			return
		}
		log.G(ctx).WithError(err).Debug("guest agent not reached yet")
		if !sleep(ctx, pause) {
			return
		}
	}
}

func (g *guestClient) connected(conn net.Conn) {
	// ttrpc sends without a deadline and under a lock.
	if c, ok := conn.(interface{ SetWriteTimeout(time.Duration) }); ok {
		c.SetWriteTimeout(guestWriteLimit)
	}
	g.rpc = ttrpc.NewClient(&answers{Conn: conn, asked: &g.asked, broken: g.lose},
		ttrpc.WithOnClose(func() { g.lose(errors.New("the guest agent has closed its connection")) }),
		ttrpc.WithUnaryClientInterceptor(g.listen))
	g.task = guestv1.NewTaskClient(g.rpc)
	close(g.ready)
}

// listen counts the calls, and notes when the guest answers.
func (g *guestClient) listen(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	g.asked.Add(1)
	err := invoke(ctx, req, resp)
	if err == nil {
		g.heard.Store(time.Now().UnixNano())
	}
	return err
}

// lose declares the VM lost. Every call ends, and later ones fail.
func (g *guestClient) lose(reason error) {
	g.once.Do(func() {
		g.onLost(reason)
		close(g.gone)
		go g.close()
	})
}

func (g *guestClient) close() {
	select {
	case <-g.ready:
		_ = g.rpc.Close()
	default:
	}
	_ = g.transport.Close()
}

func (g *guestClient) lost() bool {
	select {
	case <-g.gone:
		return true
	default:
		return false
	}
}

// client returns the agent's service, when it is there.
func (g *guestClient) client(ctx context.Context) (guestv1.TaskService, error) {
	select {
	case <-g.gone:
		return nil, errVMLost
	default:
	}
	select {
	case <-g.ready:
		return g.task, nil
	case <-g.gone:
		return nil, errVMLost
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the guest agent: %w", ctx.Err())
	}
}

// callGuest calls the agent, for at most limit. It goes on when the caller's
// context ends, so that the shim knows what came of it.
func callGuest[Resp any](ctx context.Context, g *guestClient, limit time.Duration, call func(context.Context, guestv1.TaskService) (*Resp, error)) (*Resp, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	client, err := g.client(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := call(ctx, client)
	switch {
	case err == nil:
		return resp, nil
	case g.lost():
		return nil, errVMLost
	case isConnError(err):
		// After a failed write or read nothing more can be asked.
		g.lose(fmt.Errorf("the connection to the guest agent: %w", err))
		return nil, errVMLost
	case errors.Is(err, context.DeadlineExceeded):
		return nil, fmt.Errorf("the guest did not answer within %s: %w", limit, err)
	}
	return nil, guestError(err)
}

// guestError is an error of the agent's, of the same class and with its text
// made harmless. NotImplemented is kept from containerd: it would take it for a
// shim of the older API.
func guestError(err error) error {
	text := err.Error()
	if st, ok := status.FromError(err); ok {
		text = st.Message()
	}
	class := errdefs.Resolve(errgrpc.ToNative(err))
	if class == nil || errdefs.IsNotImplemented(class) {
		class = errdefs.ErrUnknown
	}
	return &agentError{text: cleanText(text, maxGuestText), class: class}
}

// agentError has the agent's words only, which mostly are crun's.
type agentError struct {
	text  string
	class error
}

func (e *agentError) Error() string { return "guest: " + e.text }
func (e *agentError) Unwrap() error { return e.class }

// cleanText bounds a text from the guest and takes out what could steer a
// terminal or forge lines of a log.
func cleanText(s string, most int) string {
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, " "))
}

// checkPid refuses a pid that no kernel gives.
func checkPid(pid uint32) error {
	if pid == 0 || pid > maxGuestPid {
		return fmt.Errorf("the guest answered pid %d: %w", pid, errdefs.ErrInternal)
	}
	return nil
}

// sleep waits, and reports false if ctx has ended.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
