// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"bufio"
	"encoding/json"
	"io"
	"sync"
)

// maxEvent bounds an event, in bytes.
const maxEvent = 16 << 10

// event is what the hypervisor tells by itself.
type event struct {
	Source     string            `json:"source"`
	Name       string            `json:"event"`
	Properties map[string]string `json:"properties"`
}

// Events, and properties of theirs, that are waited for.
const (
	sourceDevice   = "virtio-device"
	eventActivated = "activated"

	sourceVM       = "vm"
	eventBooted    = "booted"
	eventResumed   = "resumed"
	eventRebooting = "rebooting"
	eventShutdown  = "shutdown"
	eventRemoved   = "device-removed"
	propertyID     = "id"
)

// events distributes what the hypervisor tells. Its methods may be called
// concurrently.
type events struct {
	mu      sync.Mutex
	waiters map[*waiter]struct{}
	// rebooted and shutdown tell whether the guest reset, or the machine was turned off.
	rebooted, shutdown bool
}

// waiter waits for one event.
type waiter struct {
	match func(event) bool
	found chan event
}

// read distributes events until there are no more. They are JSON over several
// lines; what comes first may be the rest of one of which an earlier reader has had
// the beginning.
func (e *events) read(from io.Reader) {
	lines := bufio.NewReaderSize(from, maxEvent)
	var text []byte
	for {
		line, err := lines.ReadSlice('\n')
		if err != nil {
			return // also a line that is none of an event
		}
		if string(line) == "{\n" {
			text = text[:0]
		}
		if len(text)+len(line) > maxEvent {
			text = text[:0]
			continue
		}
		text = append(text, line...)
		if string(line) != "}\n" {
			continue
		}
		var got event
		if json.Unmarshal(text, &got) == nil {
			e.deliver(got)
		}
		text = text[:0]
	}
}

func (e *events) deliver(got event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if got.Source == sourceVM {
		e.rebooted = e.rebooted || got.Name == eventRebooting
		e.shutdown = e.shutdown || got.Name == eventShutdown
	}
	for w := range e.waiters {
		if w.match(got) {
			delete(e.waiters, w)
			w.found <- got
		}
	}
}

// expect begins to wait for an event that match knows, which arrives at the
// channel. The caller calls stop in the end.
func (e *events) expect(match func(event) bool) (found <-chan event, stop func()) {
	w := &waiter{match: match, found: make(chan event, 1)}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.waiters == nil {
		e.waiters = make(map[*waiter]struct{})
	}
	e.waiters[w] = struct{}{}
	return w.found, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.waiters, w)
	}
}

// said tells whether the guest has reset, and whether the machine was turned off.
func (e *events) said() (rebooted, shutdown bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.rebooted, e.shutdown
}
