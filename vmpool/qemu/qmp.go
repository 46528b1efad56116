// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmproc"
)

// maxMessage bounds a message of QEMU's, in bytes.
const maxMessage = 4 << 20

// qmpError is QEMU's answer to a command that failed.
type qmpError struct {
	Command string `json:"-"`
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

// Error is QEMU's own text.
func (e *qmpError) Error() string {
	return fmt.Sprintf("qemu: %s: %s (%s)", e.Command, e.Desc, e.Class)
}

// Unwrap gives the class in containerd's terms.
func (e *qmpError) Unwrap() error {
	if e.Class == "DeviceNotFound" {
		return errdefs.ErrNotFound
	}
	return errdefs.ErrUnknown
}

// event is an asynchronous message of QEMU's.
type event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

// message is whatever QEMU sends.
type message struct {
	Return json.RawMessage `json:"return"`
	Error  *qmpError       `json:"error"`
	ID     string          `json:"id"`
	event
}

// monitor is a QMP connection. QEMU serves one at a time. Its methods may be
// called concurrently.
type monitor struct {
	conn *net.UnixConn
	done chan struct{} // closed when the connection has ended
	// writing is held, by the one who has put something into it, while a command
	// is written. mu is not, as answers must go on being read meanwhile.
	writing chan struct{}

	mu      sync.Mutex
	next    uint64
	calls   map[string]chan message
	waiters map[*waiter]struct{}
	onEvent func(event)
}

// waiter waits for one event.
type waiter struct {
	match func(event) bool
	found chan event
}

// dialMonitor connects to the QMP socket at path and negotiates. onEvent is
// called for each event, in order, and must not block.
func dialMonitor(ctx context.Context, path string, onEvent func(event)) (_ *monitor, retErr error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connect to qemu's monitor: %w", err)
	}
	m := &monitor{
		conn:    conn.(*net.UnixConn),
		done:    make(chan struct{}),
		writing: make(chan struct{}, 1),
		calls:   make(map[string]chan message),
		waiters: make(map[*waiter]struct{}),
		onEvent: onEvent,
	}
	go m.read()
	// The greeting needs no waiting for: QEMU takes commands in order.
	if err := m.call(ctx, "qmp_capabilities", nil, nil); err != nil {
		m.close()
		return nil, fmt.Errorf("negotiate with qemu's monitor: %w", err)
	}
	return m, nil
}

// read distributes what QEMU sends, until the connection ends.
func (m *monitor) read() {
	defer close(m.done)
	defer m.conn.Close() //nolint:errcheck // nothing is buffered
	lines := bufio.NewScanner(vmproc.Paced(m.conn))
	lines.Buffer(make([]byte, 4<<10), maxMessage)
	for lines.Scan() {
		var msg message
		if err := json.Unmarshal(lines.Bytes(), &msg); err != nil {
			return
		}
		if msg.Name != "" {
			m.deliver(msg.event)
			continue
		}
		m.mu.Lock()
		answer := m.calls[msg.ID]
		delete(m.calls, msg.ID)
		m.mu.Unlock()
		if answer != nil {
			answer <- msg
		}
	}
}

func (m *monitor) deliver(e event) {
	m.onEvent(e)
	m.mu.Lock()
	defer m.mu.Unlock()
	for w := range m.waiters {
		if w.match(e) {
			delete(m.waiters, w)
			w.found <- e
		}
	}
}

// call runs a command, with files passed along, and decodes its result into
// result unless that is nil. ErrUnavailable means that QEMU has gone. If ctx ends
// first, QEMU may run the command all the same.
func (m *monitor) call(ctx context.Context, command string, args, result any, files ...*os.File) error {
	id, answer := m.register()
	defer m.forget(id)
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        string `json:"id"`
	}{command, args, id})
	if err != nil {
		return fmt.Errorf("qemu: %s: %w", command, err)
	}
	if err := m.send(ctx, append(line, '\n'), files); err != nil {
		return fmt.Errorf("qemu: %s: %w", command, err)
	}
	select {
	case msg := <-answer:
		if msg.Error != nil {
			msg.Error.Command = command
			return msg.Error
		}
		if result == nil {
			return nil
		}
		if err := json.Unmarshal(msg.Return, result); err != nil {
			return fmt.Errorf("qemu: %s: unexpected result: %w", command, err)
		}
		return nil
	case <-m.done:
		return fmt.Errorf("qemu: %s: monitor connection lost: %w", command, errdefs.ErrUnavailable)
	case <-ctx.Done():
		return fmt.Errorf("qemu: %s: %w", command, context.Cause(ctx))
	}
}

// register begins a call: its answer arrives at the channel, until forget.
func (m *monitor) register() (id string, answer <-chan message) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.next++
	id = strconv.FormatUint(m.next, 10)
	c := make(chan message, 1)
	m.calls[id] = c
	return id, c
}

func (m *monitor) forget(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.calls, id)
}

// send writes one command. A QEMU that does not read is waited for until ctx
// ends. If a part of the command is then written, the connection is of no more
// use and ends.
func (m *monitor) send(ctx context.Context, line []byte, files []*os.File) error {
	select {
	case m.writing <- struct{}{}:
		defer func() { <-m.writing }()
	case <-m.done:
		return fmt.Errorf("monitor connection lost: %w", errdefs.ErrUnavailable)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	written, err := m.write(ctx, line, files)
	switch {
	case err == nil:
		return nil
	case !errors.Is(err, os.ErrDeadlineExceeded):
		return errors.Join(err, errdefs.ErrUnavailable)
	case written > 0:
		// Its reader ends too.
		_ = m.conn.Close()
	}
	return fmt.Errorf("not sent in time: %w", context.Cause(ctx))
}

// write writes until ctx ends, and tells how much it has written.
func (m *monitor) write(ctx context.Context, line []byte, files []*os.File) (written int, _ error) {
	if err := m.conn.SetWriteDeadline(time.Time{}); err != nil {
		return 0, err
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		_ = m.conn.SetWriteDeadline(time.Unix(1, 0))
	})
	defer func() {
		if !stop() {
			// Else it would hit the next one's write.
			<-ended
		}
	}()
	return vmproc.SendFiles(m.conn, line, files)
}

// expect begins to wait for an event that match knows, which arrives at the
// channel. The caller calls stop in the end.
func (m *monitor) expect(match func(event) bool) (found <-chan event, stop func()) {
	w := &waiter{match: match, found: make(chan event, 1)}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.waiters[w] = struct{}{}
	return w.found, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.waiters, w)
	}
}

// close ends the connection and waits for its reader.
func (m *monitor) close() {
	if err := m.conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.EOF) {
		return
	}
	<-m.done
}
