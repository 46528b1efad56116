// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
)

const (
	// namespaceHeader carries containerd's namespace in ttrpc metadata.
	namespaceHeader = "containerd-namespace-ttrpc"
	// daemonIdle is how long an unused connection to containerd is kept.
	daemonIdle = 10 * time.Second
	// Pauses between attempts to reach containerd. A request of containerd's ends
	// a pause, as it shows that it is back.
	firstDaemonPause = 50 * time.Millisecond
	maxDaemonPause   = 5 * time.Second
)

// errDaemonAway means that containerd could not be reached, or went away during
// a call: what was asked may or may not have been done.
var errDaemonAway = fmt.Errorf("containerd is away: %w", errdefs.ErrUnavailable)

// daemon is containerd's ttrpc socket: dialled on demand, closed when idle.
type daemon struct {
	path      string
	namespace string

	mu     sync.Mutex
	client *ttrpc.Client
	users  int
	idle   *time.Timer
	closed bool

	pokeMu sync.Mutex
	poked  chan struct{} // closed and replaced by poke
}

func newDaemon(address, namespace string) *daemon {
	return &daemon{
		path:      strings.TrimPrefix(address, "unix://"),
		namespace: namespace,
		poked:     make(chan struct{}),
	}
}

// poke ends the pauses between attempts.
func (d *daemon) poke() {
	d.pokeMu.Lock()
	defer d.pokeMu.Unlock()
	close(d.poked)
	d.poked = make(chan struct{})
}

// close ends calls under way and refuses later ones.
func (d *daemon) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	if d.idle != nil {
		d.idle.Stop()
	}
	if d.client != nil {
		_ = d.client.Close()
	}
}

// retry calls fn until it succeeds, fails by containerd's own answer, or ctx
// ends. fn has to be idempotent.
func (d *daemon) retry(ctx context.Context, fn func(context.Context, *ttrpc.Client) error) error {
	for pause := firstDaemonPause; ; pause = min(2*pause, maxDaemonPause) {
		poked := d.pause()
		err := d.call(ctx, fn)
		if err == nil || !errors.Is(err, errDaemonAway) {
			return err
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-poked:
			pause = firstDaemonPause
		case <-ctx.Done():
			timer.Stop()
			return errors.Join(err, ctx.Err())
		}
		timer.Stop()
	}
}

// pause is closed at the next poke.
func (d *daemon) pause() <-chan struct{} {
	d.pokeMu.Lock()
	defer d.pokeMu.Unlock()
	return d.poked
}

// call calls fn once. Its error is errDaemonAway or that of containerd's answer.
func (d *daemon) call(ctx context.Context, fn func(context.Context, *ttrpc.Client) error) error {
	client, err := d.get(ctx)
	if err != nil {
		return err
	}
	md := ttrpc.MD{}
	md.Set(namespaceHeader, d.namespace)
	if asked, ok := ttrpc.GetMetadata(ctx); ok {
		// What is done for a request of containerd's is part of its trace.
		for _, key := range TraceHeaders {
			if v, ok := asked.Get(key); ok {
				md.Set(key, v...)
			}
		}
	}
	err = fn(ttrpc.WithMetadata(ctx, md), client)
	away := err != nil && isConnError(err)
	d.put(client, away)
	if away {
		return fmt.Errorf("%w: %w", err, errDaemonAway)
	}
	if err != nil {
		return errgrpc.ToNative(err)
	}
	return nil
}

// isConnError tells a connection's failure from an answer.
func isConnError(err error) bool {
	var ne net.Error
	return errors.Is(err, ttrpc.ErrClosed) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, net.ErrClosed) || errors.As(err, &ne) && !errors.Is(err, context.DeadlineExceeded)
}

func (d *daemon) get(ctx context.Context) (*ttrpc.Client, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, fmt.Errorf("the shim is ending: %w", errdefs.ErrUnavailable)
	}
	if d.client == nil {
		var dialer net.Dialer
		conn, err := dialer.DialContext(ctx, "unix", d.path)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, errDaemonAway)
		}
		d.client = ttrpc.NewClient(conn)
	}
	if d.idle != nil {
		d.idle.Stop()
	}
	d.users++
	return d.client, nil
}

func (d *daemon) put(client *ttrpc.Client, away bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.users--
	if away && d.client == client {
		_ = client.Close()
		d.client = nil
	}
	if d.users > 0 || d.client == nil || d.closed {
		return
	}
	d.idle = time.AfterFunc(daemonIdle, d.closeIdle)
}

func (d *daemon) closeIdle() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.users == 0 && d.client != nil {
		_ = d.client.Close()
		d.client = nil
	}
}
