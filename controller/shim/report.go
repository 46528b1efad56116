// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

const (
	// reportLimit is how long containerd may take over a report.
	reportLimit = 5 * time.Second
	// maxGuestSteps bounds the steps of a guest that are passed on.
	maxGuestSteps = 16
	// maxStepName bounds the name of one, in bytes.
	maxStepName = 64
)

// Parts of a container's creation: the image is made a disk, the guest's agent is
// connected to, streams are opened, the guest creates the container.
const (
	PartImage   = "image"
	PartConnect = "connect"
	PartStreams = "streams"
	PartGuest   = "guest"
)

// TraceHeaders are W3C's trace context in ttrpc metadata.
var TraceHeaders = []string{"traceparent", "tracestate"}

// report is what is told of a call of the Task API, for metrics and traces. There
// is nothing that exports either in a shim, which is paid for once a pod: it hands
// them to the plugin.
type report struct {
	svc   *service
	began time.Time

	mu  sync.Mutex
	req *hostv1.ReportRequest
}

// newReport begins the report of a call.
func (s *service) newReport(call, container string) *report {
	now := time.Now()
	return &report{svc: s, began: now, req: &hostv1.ReportRequest{
		SandboxId: s.cfg.SandboxID, ContainerId: container, Call: call, BeganUnixNano: now.UnixNano(),
	}}
}

// part begins a part of the call, which the returned function ends. Parts may overlap.
func (r *report) part(name string) (end func()) {
	began := time.Now()
	p := &hostv1.Part{Name: name, AtUsec: usec(began.Sub(r.began))}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.req.Parts = append(r.req.Parts, p)
	return func() { p.TookUsec = usec(time.Since(began)) }
}

// steps adds what the guest tells of the last part, whose words are made harmless.
func (r *report) steps(steps []*guestv1.Step) {
	at := r.req.Parts[len(r.req.Parts)-1].AtUsec
	for _, step := range steps[:min(len(steps), maxGuestSteps)] {
		took := min(step.Usec, usec(createLimit))
		r.req.Parts = append(r.req.Parts, &hostv1.Part{
			Name: cleanText(step.Name, maxStepName), AtUsec: at, TookUsec: took, Guest: true,
		})
		at += took
	}
}

// send tells the plugin, while the call is being answered. A containerd that is
// away is not waited for.
func (r *report) send(ctx context.Context, err error) {
	r.req.TookUsec, r.req.Failed = usec(time.Since(r.began)), err != nil
	r.svc.running.Go(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reportLimit)
		defer cancel()
		err := r.svc.daemon.call(ctx, func(ctx context.Context, client *ttrpc.Client) error {
			_, err := hostv1.NewHostClient(client).Report(ctx, r.req)
			return err
		})
		if err != nil {
			log.G(ctx).WithError(err).Debug("cannot tell how long a call took")
		}
	})
}

func usec(d time.Duration) uint64 { return uint64(max(d, 0) / time.Microsecond) }
