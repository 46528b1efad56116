// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	wirev1 "github.com/cloudhv/containerd-cloudhv/controller/shim/wire/v1"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

const (
	// metricsType is the name of containerd's cgroup v2 metrics.
	metricsType = "io.containerd.cgroups.v2.Metrics"
	// sampleAge is how old an answer's figures may be. containerd asks every second,
	// and a guest that does nothing else would run for that alone: while a container
	// uses less than a hundredth of a processor (1/idleShare) they may become older,
	// twice as old each time, up to restAge. kubelet looks every ten seconds.
	sampleAge = time.Second
	restAge   = 5 * time.Second
	idleShare = 100
	// statsWait is how long an answer waits for the guest. containerd's collector
	// asks all containers of a node one after the other and sets no limit, so a
	// guest that once made it wait is not waited for again until it answers.
	statsWait = time.Second
	// statsLimit is how long a question to the guest is kept open.
	statsLimit = 30 * time.Second
	// maxIODevices bounds the disks in an answer.
	maxIODevices = 256
)

// Stats answers a container's figures, and fails when the guest has none to
// give. After the exit they remain until Delete.
func (s *service) Stats(ctx context.Context, r *wirev1.StatsRequest) (*wirev1.StatsResponse, error) {
	t, err := s.task(r.Id)
	if err != nil {
		return nil, err
	}
	m, err := t.metrics(ctx)
	if err != nil {
		return nil, fmt.Errorf("stats of container %q: %w", r.Id, err)
	}
	value, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("stats of container %q: %w", r.Id, err)
	}
	return &wirev1.StatsResponse{Stats: &anypb.Any{TypeUrl: metricsType, Value: value}}, nil
}

// sampler holds a container's last figures, and the question under way.
type sampler struct {
	mu     sync.Mutex
	at     time.Time
	sample *wirev1.Metrics
	// age is how old the sample may become while the container runs.
	age    time.Duration
	err    error
	asking chan struct{} // closed when the guest has answered; nil if it was not asked
}

// nextAge is how old a sample may become whose predecessor was to become age old:
// from and to are the processor time that the container had used by each, in
// microseconds, as the guest says.
func nextAge(age time.Duration, from, to uint64, between time.Duration) time.Duration {
	if to < from || to-from >= uint64(between/time.Microsecond)/idleShare {
		return sampleAge
	}
	return min(2*max(age, sampleAge), restAge)
}

// metrics returns figures that are recent enough. What is known of
// out-of-memory kills is told also by a guest that is silent.
func (t *task) metrics(ctx context.Context) (*wirev1.Metrics, error) {
	m, err := t.sample(ctx)
	t.mu.Lock()
	kills := t.oomKills
	t.mu.Unlock()
	if kills == 0 || t.svc.guest.lost() {
		return m, err
	}
	if err != nil {
		if t.init.info().state != stateStopped {
			return nil, err
		}
		return &wirev1.Metrics{MemoryEvents: &wirev1.MemoryEvents{Oom: kills, OomKill: kills}}, nil
	}
	if m.MemoryEvents.OomKill < kills {
		m = proto.Clone(m).(*wirev1.Metrics)
		m.MemoryEvents.OomKill = kills
	}
	return m, nil
}

func (t *task) sample(ctx context.Context) (*wirev1.Metrics, error) {
	if t.svc.guest.lost() {
		return nil, errVMLost
	}
	s := &t.stats
	s.mu.Lock()
	age := sampleAge
	if t.init.info().state == stateRunning {
		age = max(age, s.age)
	}
	if s.sample != nil && time.Since(s.at) < age {
		defer s.mu.Unlock()
		return s.sample, nil
	}
	if s.asking == nil {
		s.asking = make(chan struct{})
		go t.ask(s.asking)
	}
	asking := s.asking
	s.mu.Unlock()

	wait := statsWait
	if t.svc.silent.Load() {
		wait = 0
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-asking:
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.sample, s.err
	case <-t.svc.guest.gone:
		return nil, errVMLost
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-timer.C:
		t.svc.silent.Store(true)
		return nil, fmt.Errorf("the guest does not answer: %w", errdefs.ErrUnavailable)
	}
}

// ask asks the guest once.
func (t *task) ask(asking chan struct{}) {
	resp, err := callGuest(t.svc.ctx, t.svc.guest, statsLimit, func(ctx context.Context, c guestv1.TaskService) (*guestv1.StatsResponse, error) {
		return c.Stats(ctx, &guestv1.StatsRequest{Id: t.id})
	})
	s := &t.stats
	s.mu.Lock()
	defer s.mu.Unlock()
	before, last, age := s.sample, s.at, s.age
	s.sample, s.err, s.at, s.asking, s.age = nil, err, time.Now(), nil, 0
	if err == nil {
		s.sample = metricsOf(resp)
		if before != nil {
			s.age = nextAge(age, before.Cpu.UsageUsec, s.sample.Cpu.UsageUsec, s.at.Sub(last))
		}
		t.svc.silent.Store(false)
		t.tellUsage(resp)
		if t.init.info().state == stateRunning {
			t.noteOOM(s.sample.MemoryEvents.OomKill)
		}
	}
	close(asking)
}

// metricsOf puts the guest's figures where containerd looks for them. They are
// numbers only, and a name that is not known is left out.
func metricsOf(in *guestv1.StatsResponse) *wirev1.Metrics {
	cpu, mem := in.GetCpu(), in.GetMemory()
	m := &wirev1.Metrics{
		Pids: &wirev1.PidsStat{Current: in.GetPids().GetCurrent(), Limit: in.GetPids().GetLimit()},
		Cpu: &wirev1.CPUStat{
			UsageUsec: cpu.GetUsageUsec(), UserUsec: cpu.GetUserUsec(), SystemUsec: cpu.GetSystemUsec(),
			NrPeriods: cpu.GetNrPeriods(), NrThrottled: cpu.GetNrThrottled(), ThrottledUsec: cpu.GetThrottledUsec(),
		},
		Memory: memoryOf(mem),
		Io:     &wirev1.IOStat{},
		MemoryEvents: &wirev1.MemoryEvents{
			Low: mem.GetLow(), High: mem.GetHigh(), Max: mem.GetMax(), Oom: mem.GetOom(), OomKill: mem.GetOomKill(),
		},
	}
	for i, d := range in.GetIo() {
		if i == maxIODevices {
			break
		}
		m.Io.Usage = append(m.Io.Usage, &wirev1.IOEntry{
			Major: d.GetMajor(), Minor: d.GetMinor(),
			Rbytes: d.GetRbytes(), Wbytes: d.GetWbytes(), Rios: d.GetRios(), Wios: d.GetWios(),
		})
	}
	return m
}

func memoryOf(in *guestv1.MemoryStats) *wirev1.MemoryStat {
	stat := in.GetStat()
	return &wirev1.MemoryStat{
		Anon:                  stat["anon"],
		File:                  stat["file"],
		KernelStack:           stat["kernel_stack"],
		Slab:                  stat["slab"],
		Sock:                  stat["sock"],
		Shmem:                 stat["shmem"],
		FileMapped:            stat["file_mapped"],
		FileDirty:             stat["file_dirty"],
		FileWriteback:         stat["file_writeback"],
		AnonThp:               stat["anon_thp"],
		InactiveAnon:          stat["inactive_anon"],
		ActiveAnon:            stat["active_anon"],
		InactiveFile:          stat["inactive_file"],
		ActiveFile:            stat["active_file"],
		Unevictable:           stat["unevictable"],
		SlabReclaimable:       stat["slab_reclaimable"],
		SlabUnreclaimable:     stat["slab_unreclaimable"],
		Pgfault:               stat["pgfault"],
		Pgmajfault:            stat["pgmajfault"],
		WorkingsetRefault:     stat["workingset_refault"],
		WorkingsetActivate:    stat["workingset_activate"],
		WorkingsetNodereclaim: stat["workingset_nodereclaim"],
		Pgrefill:              stat["pgrefill"],
		Pgscan:                stat["pgscan"],
		Pgsteal:               stat["pgsteal"],
		Pgactivate:            stat["pgactivate"],
		Pgdeactivate:          stat["pgdeactivate"],
		Pglazyfree:            stat["pglazyfree"],
		Pglazyfreed:           stat["pglazyfreed"],
		ThpFaultAlloc:         stat["thp_fault_alloc"],
		ThpCollapseAlloc:      stat["thp_collapse_alloc"],
		Usage:                 in.GetUsage(),
		UsageLimit:            in.GetUsageLimit(),
		SwapUsage:             in.GetSwapUsage(),
		SwapLimit:             in.GetSwapLimit(),
		MaxUsage:              in.GetMaxUsage(),
	}
}
