// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

// How long the guest may take over a call. They are generous, as a VM in
// software emulation on a busy host is slow; only a guest that has stopped
// answering meets them.
const (
	createLimit = 2 * time.Minute
	startLimit  = time.Minute
	deleteLimit = time.Minute
	quickLimit  = 20 * time.Second
	// defaultDrainLimit is how long a delete waits for output that goes on after
	// its process has ended, as another process holds the other end. It is runc's.
	defaultDrainLimit = 2 * time.Second
	// defaultEndLimit is how long a container may take to end that is killed.
	defaultEndLimit = time.Minute
	// cutLimit is how long it then waits for what is on its way.
	cutLimit = time.Second
	// quietDelay is how long after the last change freed memory goes back to the
	// host, and stirDelay how long after a request at most.
	quietDelay = 2 * time.Second
	stirDelay  = 30 * time.Second
)

// taskService is the name that containerd calls the Task API by.
const taskService = "containerd.task.v3.Task"

// VMLostFile in the sandbox's directory tells why the VM was lost, from before
// the first exit that came of it. The "delete" action of the shim goes by it.
const VMLostFile = "vm.lost"

// service is the Task API of one pod. It knows the state of every process by
// itself; the guest is asked to change something, and for figures.
type service struct {
	cfg    Config
	dir    string
	guest  *guestClient
	daemon *daemon
	sizer  *sizer
	events *publisher
	// forwards are the pod's port-forwards.
	forwards *forwarder
	// volumes are what containers mount of the host, and disks its disks that they have.
	volumes podVolumes
	disks   podDisks

	// ctx ends with the service. It carries the logger.
	ctx        context.Context
	cancel     context.CancelFunc
	running    sync.WaitGroup
	drainLimit time.Duration
	killLimit  time.Duration
	tailLimit  time.Duration
	endLimit   time.Duration
	streamAge  time.Duration
	// silent is set while the guest owes an answer about figures.
	silent atomic.Bool
	calm   *time.Timer // gives memory back
	stir   *time.Timer // does so in the end, however often requests come
	stirs  atomic.Bool // stir runs

	mu    sync.Mutex
	tasks map[string]*task // nil entries are being created
}

// newService makes the service of the pod that cfg describes and starts to
// connect to its VM. dir is the sandbox's directory.
func newService(ctx context.Context, cfg Config, dir string, transport Guest) *service {
	ctx, cancel := context.WithCancel(ctx)
	d := newDaemon(cfg.TTRPCAddress, cfg.Namespace)
	s := &service{
		cfg: cfg, dir: dir, ctx: ctx, cancel: cancel,
		daemon: d, sizer: newSizer(), events: newPublisher(d, cfg.Namespace),
		drainLimit: defaultDrainLimit, killLimit: quickLimit,
		tailLimit: defaultTailLimit, endLimit: defaultEndLimit, streamAge: defaultStreamAge,
		tasks: make(map[string]*task),
	}
	s.guest = newGuestClient(transport, s.vmLost)
	s.forwards = newForwarder(s)
	s.calm = time.AfterFunc(time.Hour, freeMemory)
	s.calm.Stop()
	s.stir = time.AfterFunc(time.Hour, func() {
		s.stirs.Store(false)
		freeMemory()
	})
	s.stir.Stop()
	s.running.Go(func() { s.events.run(ctx) })
	s.running.Go(func() { s.guest.run(ctx) })
	return s
}

// close ends the service: the events that wait are sent if containerd takes
// them within limit, then all else stops. Nothing in the guest is touched.
func (s *service) close(limit time.Duration) {
	flush, cancel := context.WithTimeout(s.ctx, limit)
	s.events.flush(flush)
	cancel()
	s.cancel()
	s.calm.Stop()
	s.stir.Stop()
	s.daemon.close()
	s.forwards.close()
	s.guest.close()
	s.volumes.close()
	for _, t := range s.all() {
		for _, p := range t.processes() {
			p.io.cut()
		}
	}
	s.running.Wait()
}

// freeAbove is how much the heap must hold before a collection is worth what it
// costs: a first one takes some 0.3 MB for good.
const freeAbove = 1 << 20

// freeMemory collects garbage and gives memory back to the host.
func freeMemory() {
	heap := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/free:bytes"}}
	metrics.Read(heap)
	if heap[0].Value.Uint64()+heap[1].Value.Uint64() > freeAbove {
		debug.FreeOSMemory()
	}
}

// quiet gives memory back some time after the last change.
func (s *service) quiet() { s.calm.Reset(quietDelay) }

// stirred is quiet for requests that change nothing, such as the statistics of
// each second.
func (s *service) stirred() {
	if s.stirs.CompareAndSwap(false, true) {
		s.stir.Reset(stirDelay)
	}
}

// vmLost ends every process: there is nothing left that could run it.
func (s *service) vmLost(reason error) {
	// They keep the pod's network namespace.
	s.forwards.close()
	if s.ctx.Err() != nil {
		return
	}
	s.logLost(reason)
	text := cleanText(reason.Error(), maxGuestText) + "\n"
	err := failpoint.At(s.ctx, failpoint.TaskLost)
	if err == nil {
		err = os.WriteFile(filepath.Join(s.dir, VMLostFile), []byte(text), 0o600)
	}
	if err != nil {
		log.G(s.ctx).WithError(err).Warn("cannot note that the VM is lost")
	}
	// It may have to wait for a file system of the host's.
	s.running.Go(s.volumes.close)
	s.running.Go(s.tellLost)
	now := time.Now()
	for _, t := range s.all() {
		for _, p := range t.processes() {
			s.running.Go(func() {
				// Who watches the process has precedence: it may hold the guest's last answer.
				timer := time.NewTimer(lostGrace)
				defer timer.Stop()
				select {
				case <-p.exited:
				case <-timer.C:
				}
				p.exit(StatusVMLost, now, 0)
			})
		}
	}
}

// tellLost tells the plugin, which ends the sandbox: else it would stay ready, and no
// container could be made in it. A containerd that is away is waited for.
func (s *service) tellLost() {
	err := s.daemon.retry(s.ctx, func(ctx context.Context, client *ttrpc.Client) error {
		_, err := hostv1.NewHostClient(client).Lost(ctx, &hostv1.LostRequest{SandboxId: s.cfg.SandboxID})
		return err
	})
	if err != nil && s.ctx.Err() == nil {
		log.G(s.ctx).WithError(err).Debug("cannot tell that the VM is lost")
	}
}

// logLost tells an accident from the end of every pod, which comes when no
// container runs any more.
func (s *service) logLost(reason error) {
	running := 0
	for _, t := range s.all() {
		if t.init.info().state == stateRunning {
			running++
		}
	}
	if running == 0 {
		log.G(s.ctx).WithError(reason).Info("the pod's VM has ended")
		return
	}
	log.G(s.ctx).WithError(reason).WithField("running", running).Error("the pod's VM is lost while containers run")
}

// lostGrace is how long the watch of a process may take to see that the VM is lost.
const lostGrace = 100 * time.Millisecond

func (s *service) all() []*task {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*task, 0, len(s.tasks))
	for _, t := range s.tasks {
		if t != nil {
			out = append(out, t)
		}
	}
	return out
}

// task finds a container.
func (s *service) task(id string) (*task, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.tasks[id]; t != nil {
		return t, nil
	}
	return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
}

// process finds a process of a container.
func (s *service) process(id, execID string) (*process, error) {
	t, err := s.task(id)
	if err != nil {
		return nil, err
	}
	return t.process(execID)
}

// hasPid tells whether pid is that of a running container.
func (s *service) hasPid(pid uint32) bool {
	for _, t := range s.all() {
		if info := t.init.info(); info.pid == pid && info.state != stateStopped {
			return true
		}
	}
	return false
}

// checkID refuses what is no ID of a container or process.
func checkID(what, id string) error {
	bad := id == "" || len(id) > api.MaxIDBytes
	for _, r := range id {
		bad = bad || r <= ' ' || r >= 0x7f || r == '/'
	}
	if bad || id == "." || id == ".." {
		return fmt.Errorf("%s ID is %q: want 1 to %d printable characters without a slash: %w", what, id, api.MaxIDBytes, errdefs.ErrInvalidArgument)
	}
	return nil
}

// register makes the service known to a server.
func (s *service) register(server *ttrpc.Server) {
	server.RegisterService(taskService, &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"State":      method(s.State),
		"Create":     method(s.Create),
		"Start":      method(s.Start),
		"Delete":     method(s.Delete),
		"Pids":       method(s.Pids),
		"Pause":      method(s.Pause),
		"Resume":     method(s.Resume),
		"Checkpoint": method(s.Checkpoint),
		"Kill":       method(s.Kill),
		"Exec":       method(s.Exec),
		"ResizePty":  method(s.ResizePty),
		"CloseIO":    method(s.CloseIO),
		"Update":     method(s.Update),
		"Wait":       method(s.Wait),
		"Stats":      method(s.Stats),
		"Connect":    method(s.Connect),
		"Shutdown":   method(s.Shutdown),
	}})
}

// method makes a verb ttrpc's, and its error one of the wire.
func method[Req, Resp any](verb func(context.Context, *Req) (*Resp, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		req := new(Req)
		if err := unmarshal(req); err != nil {
			return nil, err
		}
		resp, err := verb(ctx, req)
		if errdefs.IsNotImplemented(err) {
			// containerd takes "unimplemented" for a shim of an older API, and would
			// speak that, in vain, for the rest of the pod's life.
			return nil, status.Error(codes.FailedPrecondition, err.Error())
		}
		if err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		return resp, nil
	}
}

// intercept sees every request: it shows that containerd is there.
func (s *service) intercept(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, call ttrpc.Method) (any, error) {
	s.daemon.poke()
	s.stirred()
	ctx = log.WithLogger(ctx, log.G(s.ctx))
	began := time.Now()
	resp, err := call(ctx, unmarshal)
	if s.cfg.Debug {
		log.G(ctx).WithField("method", info.FullMethod).WithField("took", time.Since(began)).WithError(err).Debug("request")
	}
	return resp, err
}
