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
	"slices"
	"strconv"
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

// round is one pod's life. All that it was to measure and has not, because an
// earlier step failed, counts as failed.
func (b *bench) round(ctx context.Context, h string) error {
	before := b.tried(h)
	err := b.pod(ctx, h)
	b.settle(h, before)
	return err
}

// pod is one pod's life, with what can be measured of it.
func (b *bench) pod(ctx context.Context, h string) (retErr error) {
	cfg := b.node.PodConfig("bench")
	defer func() { retErr = errors.Join(retErr, os.RemoveAll(cfg.GetLogDirectory())) }()
	start := time.Now()
	id, err := b.node.RunPod(ctx, cfg, h)
	b.duration(runPodSandbox, h, time.Since(start), err)
	if err != nil {
		return err
	}
	defer func() {
		begin := time.Now()
		err := errors.Join(b.node.StopPod(ctx, id), b.node.RemovePod(ctx, id))
		b.duration(stopRemove, h, time.Since(begin), err)
		retErr = errors.Join(retErr, err)
	}()
	began := time.Now()
	ctr, err := b.container(ctx, id, cfg)
	created := time.Now()
	var first time.Time
	if err == nil {
		err = b.node.StartContainer(ctx, ctr)
	}
	started := time.Now()
	if err == nil {
		first, err = awaitFirst(ctx, filepath.Join(cfg.GetLogDirectory(), "c.log"))
	}
	b.duration(firstWrite, h, first.Sub(start), err)
	if err != nil {
		return err
	}
	if h == testnode.CloudHV {
		b.parts(start, []mark{{"RunPodSandbox", start, began}, {"CreateContainer", began, created}, {"StartContainer", created, started}, {"start to first line", created, first}})
	}
	for range execs {
		begin := time.Now()
		_, _, code, err := b.node.ExecSync(ctx, ctr, "/bin/true")
		if err == nil && code != 0 {
			err = fmt.Errorf("true exited with %d: %w", code, errdefs.ErrUnknown)
		}
		b.duration(execTrue, h, time.Since(begin), err)
		retErr = errors.Join(retErr, err)
	}
	return errors.Join(retErr, b.inspect(ctx, h, id))
}

func (b *bench) container(ctx context.Context, id string, cfg *runtimeapi.PodSandboxConfig) (string, error) {
	return b.node.CreateContainer(ctx, id, cfg, testnode.ContainerConfig("c", testimage.BusyboxRef, "/bin/sh", "-c", "echo "+firstLine+"; exec sleep 1000000"))
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

// inspect notes memory and, for ours, the parts of the start.
func (b *bench) inspect(ctx context.Context, h, id string) error {
	if h == testnode.RunC {
		pid, err := runcShim(id)
		return b.memory(shimPrivate, h, pid, err)
	}
	st, err := b.node.Runtime().PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	if err != nil {
		return err
	}
	var info podInfo
	if err := json.Unmarshal([]byte(st.GetInfo()["cloudhv"]), &info); err != nil {
		return fmt.Errorf("reading the pod's status: %w", err)
	}
	b.machine = fmt.Sprintf("%s %s, %s (%s)", info.Hypervisor, info.HypervisorVersion, info.Accelerator, info.AcceleratorReason)
	b.startPhases = append(b.startPhases, info.Phases)
	return errors.Join(b.memory(vmmPrivate, h, info.VMMPid, nil), b.memory(shimPrivate, h, info.ShimPid, nil))
}

// podInfo is the part of the verbose status that is used here.
type podInfo struct {
	Hypervisor        string  `json:"hypervisor"`
	HypervisorVersion string  `json:"hypervisor_version"`
	Accelerator       string  `json:"accelerator"`
	AcceleratorReason string  `json:"accelerator_reason"`
	VMMPid            int     `json:"vmm_pid"`
	ShimPid           int     `json:"shim_pid"`
	Phases            []phase `json:"phases"`
}

// phase is a part of the controller's Start.
type phase struct {
	Name     string `json:"name"`
	AtUsec   int64  `json:"at_usec"`
	TookUsec int64  `json:"took_usec"`
}

// memory notes a process's private memory.
func (b *bench) memory(name, h string, pid int, err error) error {
	var bytes float64
	if err == nil {
		bytes, err = privateBytes(pid)
	}
	b.add(name, h, bytes, err)
	return err
}

func privateBytes(pid int) (float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	var sum float64
	for line := range strings.Lines(string(data)) {
		words := strings.Fields(line)
		if len(words) == 3 && (words[0] == "Private_Clean:" || words[0] == "Private_Dirty:") {
			kb, err := strconv.ParseFloat(words[1], 64)
			if err != nil {
				return 0, err
			}
			sum += kb * 1024
		}
	}
	return sum, nil
}

// runcShim finds the shim of a runc pod by its command line.
func runcShim(id string) (int, error) {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	for _, f := range lines {
		data, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(string(data), "\x00")
		if filepath.Base(args[0]) == "containerd-shim-runc-v2" && slices.Contains(args, id) {
			return strconv.Atoi(filepath.Base(filepath.Dir(f)))
		}
	}
	return 0, fmt.Errorf("the shim of pod %s: %w", id, errdefs.ErrNotFound)
}
