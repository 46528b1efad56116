// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	wirev1 "github.com/cloudhv/containerd-cloudhv/controller/shim/wire/v1"
)

const (
	eventsService = "containerd.services.events.ttrpc.v1.Events"
	// maxQueuedEvents bounds what waits for containerd. Beyond it the oldest goes:
	// who comes back late asks for the state that is.
	maxQueuedEvents = 1024
	// forwardLimit is how long containerd may take over one event.
	forwardLimit = 10 * time.Second
)

// taskEvent is one of the events of wirev1, with its topic and the name that
// containerd's API has for its type.
type taskEvent struct {
	topic   string
	name    string
	message proto.Message
}

// eventOf gives an event its topic.
func eventOf(m proto.Message) taskEvent {
	switch m.(type) {
	case *wirev1.TaskCreate:
		return taskEvent{"/tasks/create", "containerd.events.TaskCreate", m}
	case *wirev1.TaskStart:
		return taskEvent{"/tasks/start", "containerd.events.TaskStart", m}
	case *wirev1.TaskOOM:
		return taskEvent{"/tasks/oom", "containerd.events.TaskOOM", m}
	case *wirev1.TaskExit:
		return taskEvent{"/tasks/exit", "containerd.events.TaskExit", m}
	case *wirev1.TaskDelete:
		return taskEvent{"/tasks/delete", "containerd.events.TaskDelete", m}
	case *wirev1.TaskExecAdded:
		return taskEvent{"/tasks/exec-added", "containerd.events.TaskExecAdded", m}
	case *wirev1.TaskExecStarted:
		return taskEvent{"/tasks/exec-started", "containerd.events.TaskExecStarted", m}
	case *wirev1.TaskPaused:
		return taskEvent{"/tasks/paused", "containerd.events.TaskPaused", m}
	case *wirev1.TaskResumed:
		return taskEvent{"/tasks/resumed", "containerd.events.TaskResumed", m}
	}
	return taskEvent{}
}

// publisher sends events to containerd, one after the other in the order of
// publish. While containerd is away they wait, and are sent when it is back. An
// event may be told twice if containerd goes away before it has answered.
type publisher struct {
	daemon    *daemon
	namespace string

	mu      sync.Mutex
	queue   []*wirev1.Envelope
	dropped int
	wake    chan struct{} // has a token when the queue is not empty
	idle    *sync.Cond    // told when the queue is empty
}

func newPublisher(d *daemon, namespace string) *publisher {
	p := &publisher{daemon: d, namespace: namespace, wake: make(chan struct{}, 1)}
	p.idle = sync.NewCond(&p.mu)
	return p
}

// publish queues an event and never blocks.
func (p *publisher) publish(m proto.Message) {
	ev := eventOf(m)
	value, err := proto.Marshal(m)
	if err != nil {
		log.L.WithError(err).WithField("topic", ev.topic).Error("event lost")
		return
	}
	env := &wirev1.Envelope{
		Timestamp: timestamppb.Now(),
		Namespace: p.namespace,
		Topic:     ev.topic,
		Event:     &anypb.Any{TypeUrl: ev.name, Value: value},
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) >= maxQueuedEvents {
		p.queue = append(p.queue[:0], p.queue[1:]...)
		p.dropped++
	}
	p.queue = append(p.queue, env)
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// run sends events until ctx ends.
func (p *publisher) run(ctx context.Context) {
	for {
		select {
		case <-p.wake:
		case <-ctx.Done():
			return
		}
		for env := p.head(); env != nil; env = p.head() {
			if err := p.forward(ctx, env); err != nil {
				if ctx.Err() != nil {
					return
				}
				log.G(ctx).WithError(err).WithField("topic", env.Topic).Error("containerd refuses an event")
			}
			p.pop(env)
		}
	}
}

func (p *publisher) head() *wirev1.Envelope {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dropped > 0 {
		log.L.WithField("events", p.dropped).Warn("the oldest events were dropped while containerd was away")
		p.dropped = 0
	}
	if len(p.queue) == 0 {
		p.queue = nil
		p.idle.Broadcast()
		return nil
	}
	return p.queue[0]
}

// pop takes env from the queue, unless publish has dropped it meanwhile.
func (p *publisher) pop(env *wirev1.Envelope) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) > 0 && p.queue[0] == env {
		p.queue[0] = nil
		p.queue = p.queue[1:]
	}
}

// forward retries for as long as containerd is away or too slow.
func (p *publisher) forward(ctx context.Context, env *wirev1.Envelope) error {
	return p.daemon.retry(ctx, func(ctx context.Context, client *ttrpc.Client) error {
		limited, cancel := context.WithTimeout(ctx, forwardLimit)
		defer cancel()
		err := client.Call(limited, eventsService, "Forward", &wirev1.ForwardRequest{Envelope: env}, &emptypb.Empty{})
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			return ttrpc.ErrClosed
		}
		return err
	})
}

// flush waits until all events are sent, or ctx ends.
func (p *publisher) flush(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.idle.Broadcast()
	})
	defer stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.queue) > 0 && ctx.Err() == nil {
		p.idle.Wait()
	}
}
