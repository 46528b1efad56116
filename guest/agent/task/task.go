// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package task is the agent's Task service: containers by crun, one file a group
// of verbs.
package task

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/cgroup"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/crun"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/disk"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/diskfs"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/machine"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/pause"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/podns"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/reap"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/rootfs"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/stdio"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

const (
	// maxContainers bounds the containers of a pod, maxExecs the processes that
	// were added to one and not deleted.
	maxContainers = 1000
	maxExecs      = 1000
)

// Config is what the service works with.
type Config struct {
	// Bundles is a directory on a tmpfs, with a directory for each container.
	Bundles string
	// CgroupRoot is the mount point of cgroup v2, CgroupParent the path below it
	// that holds the containers' cgroups.
	CgroupRoot, CgroupParent string
	// Ready fails while the VM is not configured for a pod.
	Ready func() error
	Pod   machine.Pod
	// Namespaces are the pod's, once it is Ready.
	Namespaces func() *podns.Namespaces
	Runtime    crun.Runtime
	Reaper     *reap.Reaper
	Streams    *stdio.Streams
	RootFS     *rootfs.Manager
	// Disks finds the disks that containers have as devices, and Volumes has those with
	// file systems.
	Disks   disk.Finder
	Volumes *diskfs.Manager
	// Self is the path of this binary, for the pause process.
	Self string
}

// Service implements the Task service.
type Service struct {
	cfg Config

	mu         sync.Mutex
	containers map[string]*container

	// pauseMu guards pausePid, the process that holds the pod's PID namespace.
	pauseMu  sync.Mutex
	pausePid int

	// volumesMu guards volumes, which is true once they are mounted.
	volumesMu sync.Mutex
	volumes   bool
}

var _ guestv1.TaskService = (*Service)(nil)

// New makes the service and its directories.
func New(cfg Config) (*Service, error) {
	if err := os.MkdirAll(cfg.Bundles, 0o711); err != nil {
		return nil, fmt.Errorf("prepare bundles: %w", err)
	}
	return &Service{cfg: cfg, containers: make(map[string]*container)}, nil
}

// ValidID says whether s may name a container or a process of one. It is a file
// name too: it begins with a letter or digit and has no slash.
func ValidID(s string) bool {
	if s == "" || len(s) > api.MaxIDBytes {
		return false
	}
	for i, c := range []byte(s) {
		alnum := (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9')
		if !alnum && (i == 0 || (c != '.' && c != '_' && c != '-')) {
			return false
		}
	}
	return true
}

func checkID(what, id string) error {
	if !ValidID(id) {
		return fmt.Errorf("%s %q: want 1 to %d of [A-Za-z0-9._-]: %w", what, id[:min(len(id), api.MaxIDBytes)], api.MaxIDBytes, errdefs.ErrInvalidArgument)
	}
	return nil
}

// reserve enters a new container under its ID.
func (s *Service) reserve(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.containers[id] != nil {
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrAlreadyExists)
	}
	if len(s.containers) >= maxContainers {
		return nil, fmt.Errorf("container %s: the pod has %d: %w", id, maxContainers, errdefs.ErrResourceExhausted)
	}
	c := &container{
		s:      s,
		id:     id,
		bundle: filepath.Join(s.cfg.Bundles, id),
		group:  cgroup.Group(filepath.Join(s.cfg.CgroupRoot, s.cfg.CgroupParent, id)),
		init:   newProcess(""),
		execs:  make(map[string]*process),
	}
	s.containers[id] = c
	return c, nil
}

func (s *Service) forget(c *container) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.containers[c.id] == c {
		delete(s.containers, c.id)
	}
}

// container finds one that has been created.
func (s *Service) container(id string) (*container, error) {
	s.mu.Lock()
	c := s.containers[id]
	s.mu.Unlock()
	if c == nil || c.init.state() == stateNew {
		return nil, fmt.Errorf("container %q: %w", id[:min(len(id), api.MaxIDBytes)], errdefs.ErrNotFound)
	}
	return c, nil
}

// process finds a container and one of its processes.
func (s *Service) process(id, execID string) (*container, *process, error) {
	c, err := s.container(id)
	if err != nil {
		return nil, nil, err
	}
	p, err := c.process(execID)
	return c, p, err
}

// owner says whether pid is a live process that a container's create or exec
// made.
func (s *Service) owns(pid int) bool {
	s.mu.Lock()
	all := make([]*container, 0, len(s.containers))
	for _, c := range s.containers {
		all = append(all, c)
	}
	s.mu.Unlock()
	for _, c := range all {
		for _, p := range c.processes() {
			if p.alive() == pid {
				return true
			}
		}
	}
	return false
}

// podPidNamespace returns the path of the PID namespace that the pod's containers
// share. It is made when first wanted, and again if its process was killed, which
// ended all that was in it; that of a pod with a user namespace is there from the
// beginning, and is made once.
func (s *Service) podPidNamespace(_ context.Context) (string, error) {
	if n := s.cfg.Namespaces(); n != nil {
		pid, err := n.PausePid()
		return pidNamespace(pid), err
	}
	s.pauseMu.Lock()
	defer s.pauseMu.Unlock()
	if s.pausePid == 0 {
		birth := s.cfg.Reaper.Expect()
		defer birth.End()
		pid, err := pause.Start(s.cfg.Self, nil)
		if err != nil {
			return "", err
		}
		s.pausePid = pid
		birth.Watch(pid, func(reap.Exit) { go s.pauseEnded(pid) })
	}
	return pidNamespace(s.pausePid), nil
}

func (s *Service) pauseEnded(pid int) {
	s.pauseMu.Lock()
	defer s.pauseMu.Unlock()
	if s.pausePid == pid {
		s.pausePid = 0
	}
}

func pidNamespace(pid int) string { return fmt.Sprintf("/proc/%d/ns/pid", pid) }
