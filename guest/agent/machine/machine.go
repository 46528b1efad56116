// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package machine is the agent's Machine service: what concerns the VM as a
// whole, and not one container.
package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/boot"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/network"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/podns"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// Config is what the service is made with.
type Config struct {
	// Version is the agent's build version.
	Version string
	// AgentStart and Ready are the uptimes at which the agent's main began, and
	// at which it could be called.
	AgentStart, Ready time.Duration
	// PodDir holds what the pod's containers share: see Pod.
	PodDir string
	// Memory tells the RAM, Sys changes the VM.
	Memory *Memory
	System System
	// Namespaces makes those of a pod with a user namespace.
	Namespaces func(*guestv1.UserNamespace) (*podns.Namespaces, error)
}

// System are the changes to the VM that a test cannot allow.
type System interface {
	Now() time.Time
	SetClock(time.Time) error
	// StepClock adds to the clock at once, SlewClock little by little.
	StepClock(by time.Duration) error
	SlewClock(by time.Duration) error
	AddEntropy([]byte) error
	// Quiesce ends all other processes and writes back what outlives the machine.
	Quiesce() error
	// PowerOff does not return if it succeeds.
	PowerOff() error
}

// Service implements the Machine service.
type Service struct {
	cfg Config
	cpu cpus

	// mu is held for the whole of a Configure or Resize.
	mu sync.Mutex
	// request is the one that configured the VM, or that failed to.
	request *guestv1.ConfigureRequest
	steps   []*guestv1.Step

	state struct {
		sync.Mutex
		configured bool
		// failed is why the VM is unusable.
		failed     error
		namespaces *podns.Namespaces
	}
}

var _ guestv1.MachineService = (*Service)(nil)

// New makes the service.
func New(cfg Config) *Service {
	return &Service{cfg: cfg, cpu: cpus{dir: cpuDir}}
}

// Info implements the Machine service.
func (s *Service) Info(context.Context, *guestv1.InfoRequest) (*guestv1.InfoResponse, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	online, err := s.cpu.online()
	if err != nil {
		return nil, err
	}
	s.state.Lock()
	configured := s.state.configured
	s.state.Unlock()
	return &guestv1.InfoResponse{
		AgentVersion:     s.cfg.Version,
		KernelRelease:    unix.ByteSliceToString(u.Release[:]),
		ApiVersion:       api.Version,
		Configured:       configured,
		VcpusOnline:      uint32(len(online)),
		MemoryTotalBytes: totalRAM(),
		BootUsec:         uint64(s.cfg.Ready.Microseconds()),
		AgentStartUsec:   uint64(s.cfg.AgentStart.Microseconds()),
	}, nil
}

// Configured fails with ErrFailedPrecondition until Configure has succeeded.
func (s *Service) Configured() error {
	s.state.Lock()
	defer s.state.Unlock()
	switch {
	case s.state.configured:
		return nil
	case s.state.failed != nil:
		return fmt.Errorf("the VM is unusable since its configuration failed: %w: %w", errdefs.ErrFailedPrecondition, s.state.failed)
	default:
		return fmt.Errorf("the VM is not configured: %w", errdefs.ErrFailedPrecondition)
	}
}

// Namespaces are those of the pod's containers.
func (s *Service) Namespaces() *podns.Namespaces {
	s.state.Lock()
	defer s.state.Unlock()
	return s.state.namespaces
}

// makeNamespaces makes the pod's, if it has other ones than the VM.
func (s *Service) makeNamespaces(r *guestv1.ConfigureRequest) error {
	if r.GetUserNamespace() == nil {
		return nil
	}
	n, err := s.cfg.Namespaces(r.GetUserNamespace())
	if err != nil {
		return err
	}
	s.state.Lock()
	defer s.state.Unlock()
	s.state.namespaces = n
	return nil
}

// Configure implements the Machine service.
func (s *Service) Configure(ctx context.Context, r *guestv1.ConfigureRequest) (*guestv1.ConfigureResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.request != nil {
		if err := s.Configured(); err != nil {
			return nil, err
		}
		if !equal(s.request, r) {
			return nil, fmt.Errorf("the VM is configured for pod %s: %w", s.request.GetPodId(), errdefs.ErrAlreadyExists)
		}
		return &guestv1.ConfigureResponse{Steps: s.steps}, nil
	}
	s.request = proto.CloneOf(r)
	steps, err := s.configure(ctx, r)
	s.state.Lock()
	defer s.state.Unlock()
	if err != nil {
		s.state.failed = errors.New(err.Error()) // its class is this call's alone
		return nil, err
	}
	s.state.configured = true
	s.steps = steps
	log.G(ctx).WithField("sandbox", r.GetPodId()).WithField("machine_id", readMachineID()).Info("configured")
	return &guestv1.ConfigureResponse{Steps: steps}, nil
}

// Rehearse implements the Machine service.
func (s *Service) Rehearse(ctx context.Context, r *guestv1.ConfigureRequest) (_ *guestv1.ConfigureResponse, retErr error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.request != nil {
		return nil, fmt.Errorf("rehearse: the VM is a pod's: %w", errdefs.ErrFailedPrecondition)
	}
	if err := validate(r); err != nil {
		return nil, err
	}
	pod := Pod{Dir: s.cfg.PodDir}
	defer func() {
		retErr = errors.Join(retErr, pod.forget(), network.Forget(r))
	}()
	steps, err := take([]step{
		{"names", func() error { return pod.write(r, nil) }},
		{"shm", func() error { return pod.mountShm(r.GetShmBytes()) }},
		{"network", func() error { return network.Configure(ctx, r) }},
		// The VM keeps the size that it has.
		{"vcpus", func() error {
			online, err := s.cpu.online()
			if err != nil {
				return err
			}
			return s.cpu.set(ctx, len(online))
		}},
		{"memory", func() error { return s.memoryOfPod(ctx, s.cfg.Memory.plugged()) }},
	})
	return &guestv1.ConfigureResponse{Steps: steps}, err
}

// equal leaves out what can be right only once, the time and the entropy.
func equal(a, b *guestv1.ConfigureRequest) bool {
	a, b = proto.CloneOf(a), proto.CloneOf(b)
	for _, r := range []*guestv1.ConfigureRequest{a, b} {
		r.Clock, r.Entropy = nil, nil
	}
	return proto.Equal(a, b)
}

// configure takes the steps. The first ones make this VM differ from others of
// the same snapshot; no workload runs before.
func (s *Service) configure(ctx context.Context, r *guestv1.ConfigureRequest) ([]*guestv1.Step, error) {
	if err := validate(r); err != nil {
		return nil, err
	}
	pod := Pod{Dir: s.cfg.PodDir}
	return take([]step{
		{"clock", func() error { return s.cfg.System.SetClock(r.GetClock().AsTime()) }},
		{"entropy", func() error { return s.cfg.System.AddEntropy(r.GetEntropy()) }},
		{"namespaces", func() error { return s.makeNamespaces(r) }},
		{"names", func() error { return pod.write(r, s.Namespaces()) }},
		{"shm", func() error { return pod.mountShm(r.GetShmBytes()) }},
		{"network", func() error { return s.network(ctx, r) }},
		{"vcpus", func() error { return s.cpu.set(ctx, int(r.GetVcpus())) }},
		{"memory", func() error { return s.memoryOfPod(ctx, r.GetMemoryBytes()) }},
		{"sysctls", func() error { return setSysctls(sysctlDir, r.GetSysctls(), s.Namespaces()) }},
	})
}

// network gives the pod its network: in a namespace of its own, if it has one, once the
// devices have been moved there.
func (s *Service) network(ctx context.Context, r *guestv1.ConfigureRequest) error {
	n := s.Namespaces()
	if n == nil {
		return network.Configure(ctx, r)
	}
	if err := n.Do(boot.LoopbackUp); err != nil {
		return err
	}
	if len(r.GetInterfaces()) == 0 {
		// The device that goes then is the VM's.
		return network.Configure(ctx, r)
	}
	if err := network.Move(ctx, r, n.NetworkFD()); err != nil {
		return err
	}
	return n.Do(func() error {
		return network.Configure(ctx, r)
	})
}

// step is a part of Configure.
type step struct {
	name string
	do   func() error
}

// take takes the steps and tells how long each took.
func take(all []step) ([]*guestv1.Step, error) {
	var steps []*guestv1.Step
	for _, step := range all {
		// CLOCK_MONOTONIC: the first step moves the other one.
		began := time.Now()
		if err := step.do(); err != nil {
			return nil, fmt.Errorf("configure %s: %w", step.name, err)
		}
		steps = append(steps, &guestv1.Step{Name: step.name, Usec: uint64(time.Since(began).Microseconds())})
	}
	return steps, nil
}

// memoryOfPod is waitMemory for a pod that starts. Growth that has not come in time
// is no error: it comes later, and Info tells.
func (s *Service) memoryOfPod(ctx context.Context, want uint64) error {
	err := s.waitMemory(ctx, want, configureLimit)
	if errdefs.IsDeadlineExceeded(err) && ctx.Err() == nil {
		log.G(ctx).WithError(err).Warn("memory")
		return nil
	}
	return err
}

// waitMemory waits for the RAM and fits the kernel's limits to what there is.
func (s *Service) waitMemory(ctx context.Context, want uint64, limit time.Duration) error {
	if want == 0 {
		return nil
	}
	waitErr := s.cfg.Memory.Wait(ctx, want, limit)
	if err := boot.ScaleLimits(totalRAM()); err != nil {
		log.G(ctx).WithError(err).Warn("cannot scale limits to memory")
	}
	return waitErr
}

// Resize implements the Machine service.
func (s *Service) Resize(ctx context.Context, r *guestv1.ResizeRequest) (*guestv1.ResizeResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if to := r.GetShrinkToBytes(); to != 0 {
		if err := s.cfg.Memory.CheckShrink(to); err != nil {
			return nil, err
		}
	}
	if n := r.GetVcpus(); n != 0 {
		if n > maxVCPUs {
			return nil, fmt.Errorf("%d vCPUs: at most %d: %w", n, maxVCPUs, errdefs.ErrInvalidArgument)
		}
		if err := s.cpu.set(ctx, int(n)); err != nil {
			return nil, err
		}
	}
	if err := s.waitMemory(ctx, r.GetMemoryBytes(), resizeLimit); err != nil {
		return nil, err
	}
	online, err := s.cpu.online()
	if err != nil {
		return nil, err
	}
	return &guestv1.ResizeResponse{VcpusOnline: uint32(len(online)), MemoryTotalBytes: totalRAM()}, nil
}

// answerTime is left to the answer of PowerOff, and to whoever ends the VM then.
const answerTime = 500 * time.Millisecond

// PowerOff implements the Machine service.
func (s *Service) PowerOff(ctx context.Context, _ *guestv1.PowerOffRequest) (*emptypb.Empty, error) {
	log.G(ctx).Info("power off")
	if err := s.cfg.System.Quiesce(); err != nil {
		return nil, fmt.Errorf("power off: %w", err)
	}
	time.AfterFunc(answerTime, func() {
		if err := s.cfg.System.PowerOff(); err != nil {
			log.L.WithError(err).Error("cannot power off")
		}
	})
	return &emptypb.Empty{}, nil
}

const (
	maxVCPUs      = 1024
	maxSysctls    = 256
	maxTextFile   = 1 << 20
	minEntropy    = 32
	maxEntropy    = 512
	maxHostname   = 64
	machineIDSize = 32
)

// validate reports all that is wrong with a request but for its network, which
// is parsed as a whole before it is applied.
func validate(r *guestv1.ConfigureRequest) error {
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...))
		}
	}
	check(r.GetPodId() != "" && len(r.GetPodId()) <= api.MaxIDBytes, "pod_id: want 1 to %d bytes", api.MaxIDBytes)
	check(validHostname(r.GetHostname()), "hostname %q: want 1 to %d of [A-Za-z0-9.-]", clip(r.GetHostname()), maxHostname)
	check(len(r.GetHosts()) <= maxTextFile, "hosts: want at most %d bytes", maxTextFile)
	check(len(r.GetResolvConf()) <= maxTextFile, "resolv_conf: want at most %d bytes", maxTextFile)
	check(r.GetClock().IsValid() && r.GetClock().GetSeconds() > 0, "clock: want a time")
	check(len(r.GetEntropy()) >= minEntropy && len(r.GetEntropy()) <= maxEntropy, "entropy: want %d to %d bytes", minEntropy, maxEntropy)
	check(r.GetVcpus() >= 1 && r.GetVcpus() <= maxVCPUs, "vcpus %d: want 1 to %d", r.GetVcpus(), maxVCPUs)
	check(len(r.GetSysctls()) <= maxSysctls, "sysctls: want at most %d", maxSysctls)
	check(validMachineID(r.GetMachineId()), "machine_id %q: want %d lower-case hexadecimal digits", clip(r.GetMachineId()), machineIDSize)
	for name := range r.GetSysctls() {
		if _, err := api.SysctlPath(name); err != nil {
			errs = append(errs, err)
		}
	}
	if r.GetUserNamespace() != nil {
		errs = append(errs, podns.Validate(r.GetUserNamespace()))
	}
	return errors.Join(errs...)
}

func clip(s string) string { return s[:min(len(s), 128)] }

func validHostname(s string) bool {
	if s == "" || len(s) > maxHostname {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return false
		}
	}
	return true
}

func validMachineID(s string) bool {
	return len(s) == machineIDSize && strings.Trim(s, "0123456789abcdef") == ""
}

// writeFile replaces a small file that others may be reading.
func writeFile(path string, data []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
