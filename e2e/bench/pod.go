// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// execs is how many commands run in each container.
const execs = 3

// firstLine is what the container writes first.
const firstLine = "first"

// pod is one that runs.
type pod struct {
	node    *testnode.Node
	handler string
	cfg     *runtimeapi.PodSandboxConfig
	// id is the pod, ctr its container.
	id, ctr string
	// start is when RunPodSandbox was called; first is the time of the first line.
	start, first time.Time
	// calls are the parts of the start as we saw them.
	calls []phase
}

// ran is how long RunPodSandbox took.
func (p *pod) ran() time.Duration {
	return time.Duration(p.calls[0].TookUsec) * time.Microsecond
}

// startPod runs a pod whose container writes a line and then does nothing. After an
// error it is the caller's too, to be removed.
func startPod(ctx context.Context, n *testnode.Node, handler string) (*pod, error) {
	p := &pod{node: n, handler: handler, cfg: n.PodConfig("bench"), start: time.Now()}
	var err error
	if p.id, err = n.RunPod(ctx, p.cfg, handler); err != nil {
		return p, err
	}
	began := time.Now()
	p.ctr, err = n.CreateContainer(ctx, p.id, p.cfg, testnode.ContainerConfig("c", testimage.BusyboxRef, "/bin/sh", "-c", "echo "+firstLine+"; exec sleep 1000000"))
	created := time.Now()
	if err == nil {
		err = n.StartContainer(ctx, p.ctr)
	}
	started := time.Now()
	if err == nil {
		p.first, err = awaitFirst(ctx, filepath.Join(p.cfg.GetLogDirectory(), "c.log"))
	}
	p.calls = parts(p.start, []mark{
		{"RunPodSandbox", p.start, began}, {"CreateContainer", began, created}, {"StartContainer", created, started}, {"start to first line", created, p.first},
	})
	return p, err
}

// remove ends the pod, and tells how long that took.
func (p *pod) remove(ctx context.Context) (time.Duration, error) {
	var err error
	begin := time.Now()
	if p.id != "" {
		err = errors.Join(p.node.StopPod(ctx, p.id), p.node.RemovePod(ctx, p.id))
	}
	took := time.Since(begin)
	return took, errors.Join(err, os.RemoveAll(p.cfg.GetLogDirectory()))
}

// awaitFirst returns the time on the first line of a log.
func awaitFirst(ctx context.Context, path string) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, testnode.Scale(time.Minute))
	defer cancel()
	var at time.Time
	err := testnode.Eventually(ctx, func(context.Context) error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		line, err := bufio.NewReader(f).ReadString('\n')
		if err != nil {
			return fmt.Errorf("the container has written nothing: %w", err)
		}
		stamp, rest, _ := strings.Cut(line, " ")
		if strings.TrimSpace(rest) != "stdout F "+firstLine {
			return fmt.Errorf("the container's log begins with %q: %w", line, errdefs.ErrUnknown)
		}
		at, err = time.Parse(time.RFC3339Nano, stamp)
		return err
	})
	return at, err
}

// execute runs a program that does nothing.
func (p *pod) execute(ctx context.Context) (time.Duration, error) {
	begin := time.Now()
	_, _, code, err := p.node.ExecSync(ctx, p.ctr, "/bin/true")
	if err == nil && code != 0 {
		err = fmt.Errorf("true exited with %d: %w", code, errdefs.ErrUnknown)
	}
	return time.Since(begin), err
}

// podInfo is the part of our pods' verbose status that is used here.
type podInfo struct {
	Hypervisor        string  `json:"hypervisor"`
	HypervisorVersion string  `json:"hypervisor_version"`
	Accelerator       string  `json:"accelerator"`
	AcceleratorReason string  `json:"accelerator_reason"`
	Outcome           string  `json:"outcome"`
	VMMPid            int     `json:"vmm_pid"`
	ShimPid           int     `json:"shim_pid"`
	Phases            []phase `json:"phases"`
}

func (i *podInfo) machine() string {
	return fmt.Sprintf("%s %s, %s (%s)", i.Hypervisor, i.HypervisorVersion, i.Accelerator, i.AcceleratorReason)
}

// info is what the plugin tells of one of our pods.
func (p *pod) info(ctx context.Context) (*podInfo, error) {
	st, err := p.node.Runtime().PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		return nil, err
	}
	var info podInfo
	if err := json.Unmarshal([]byte(st.GetInfo()["cloudhv"]), &info); err != nil {
		return nil, fmt.Errorf("reading the pod's status: %w", err)
	}
	return &info, nil
}

// processes are the pod's: its shim; and what runs in it, as far as the host sees
// that: our VMM, runc's containers.
func (p *pod) processes(ctx context.Context) (shim int, rest []int, err error) {
	if p.handler == testnode.RunC {
		if shim, err = runcShim(p.id); err != nil {
			return 0, nil, err
		}
		rest, err = children(shim)
		return shim, rest, err
	}
	info, err := p.info(ctx)
	if err != nil {
		return 0, nil, err
	}
	return info.ShimPid, []int{info.VMMPid}, nil
}
