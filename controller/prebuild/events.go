// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package prebuild

import (
	"fmt"

	eventstypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
)

// topics are the filters of the events that matter here.
func topics() []string {
	var filters []string
	for _, topic := range []string{"/images/create", "/images/update", "/snapshot/commit"} {
		filters = append(filters, fmt.Sprintf("topic==%q", topic))
	}
	return filters
}

// handle looks at one event. They come in the order in which things happened: an
// image whose snapshot was not there when its event was handled is told of later.
func (p *Prebuilder) handle(ev *events.Envelope) {
	v, err := typeurl.UnmarshalAny(ev.Event)
	if err != nil {
		log.G(p.ctx).WithError(err).WithField("topic", ev.Topic).Warn("an event cannot be read")
		return
	}
	switch e := v.(type) {
	case *eventstypes.ImageCreate:
		p.consider(image{Namespace: ev.Namespace, Name: e.GetName()})
	case *eventstypes.ImageUpdate:
		p.consider(image{Namespace: ev.Namespace, Name: e.GetName()})
	case *eventstypes.SnapshotCommit:
		p.unpacked(ev.Namespace, e.GetSnapshotter(), e.GetName())
	}
}
