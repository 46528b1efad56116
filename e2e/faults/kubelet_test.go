// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// callLimit bounds each call of the kubelet's.
const callLimit = 90 * time.Second

// uidLabel is the pods' label with their kubelet's uid.
const uidLabel = "chv-faults"

// level is how far a pod is brought up.
type level int

const (
	podReady level = iota
	containerCreated
	containerRuns
	execDone
	updated
)

// call is one of the CRI's that was made.
type call struct {
	verb string
	err  error
	took time.Duration
}

func (c call) String() string {
	return fmt.Sprintf("%s (%s): %v", c.verb, c.took.Round(time.Millisecond), c.err)
}

// kubelet brings one pod to a state, and to its end, as kubelet does: it looks what there
// is, and does the next that is missing. What has failed it does again, under another
// attempt's name.
type kubelet struct {
	n   *testnode.Node
	cfg *runtimeapi.PodSandboxConfig
	// volume is a directory of the host's for the container.
	volume string
	// disk is a block device of the host's for it, unless it is empty.
	disk string
	// names are those of the containers.
	names []string
	// attempts number pods and containers, so that each has a name of its own.
	attempts uint32
	// pod and container are those of the last pass; of several containers it is the last.
	pod, container string

	mu     sync.Mutex
	calls  []call
	giveUp context.CancelCauseFunc
}

func newKubelet(n *testnode.Node, name, volume string) *kubelet {
	cfg := n.PodConfig(name)
	cfg.Labels[uidLabel] = cfg.GetMetadata().GetUid()
	return &kubelet{n: n, cfg: cfg, volume: volume, names: []string{"c"}}
}

// errGaveUp is why a call ended that hung.
var errGaveUp = errors.New("the caller gave up")

// do makes one call.
func (k *kubelet) do(verb string, f func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), testnode.Scale(callLimit))
	defer cancel()
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	k.mu.Lock()
	k.giveUp = giveUp
	k.mu.Unlock()
	began := time.Now()
	err := f(ctx)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.giveUp = nil
	k.calls = append(k.calls, call{verb: verb, err: err, took: time.Since(began)})
	return err
}

// leave lets the call that is under way end by its caller. It returns false if there is none.
func (k *kubelet) leave() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.giveUp == nil {
		return false
	}
	k.giveUp(errGaveUp)
	return true
}

// failed are the calls that have failed.
func (k *kubelet) failed() []call {
	k.mu.Lock()
	defer k.mu.Unlock()
	var list []call
	for _, c := range k.calls {
		if c.err != nil {
			list = append(list, c)
		}
	}
	return list
}

// pods lists the kubelet's.
func (k *kubelet) pods() (list []*runtimeapi.PodSandbox, err error) {
	err = k.do("list", func(ctx context.Context) error {
		r, err := k.n.Runtime().ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{
			Filter: &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{uidLabel: k.cfg.GetLabels()[uidLabel]}},
		})
		list = r.GetItems()
		return err
	})
	return list, err
}

func (k *kubelet) containers(pod string) (list []*runtimeapi.Container, err error) {
	err = k.do("list containers", func(ctx context.Context) error {
		r, err := k.n.Runtime().ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: pod}})
		list = r.GetContainers()
		return err
	})
	return list, err
}

// up brings the pod to a level, and returns the first error.
func (k *kubelet) up(to level) error {
	if err := k.upPod(); err != nil || to == podReady {
		return err
	}
	for _, name := range k.names {
		if err := k.upContainer(name, to); err != nil {
			return err
		}
	}
	if to <= containerRuns {
		return nil
	}
	err := k.do("exec", func(ctx context.Context) error {
		out, errOut, code, err := k.n.ExecSync(ctx, k.container, "/bin/sh", "-c", "cat /volume/hello")
		if err == nil && (code != 0 || out != "hello\n") {
			err = fmt.Errorf("exit code %d, %q%q", code, out, errOut)
		}
		return err
	})
	if err != nil || to == execDone {
		return err
	}
	return k.resize()
}

// upAndResize resizes a pod without containers.
func (k *kubelet) upAndResize() error {
	if err := k.up(podReady); err != nil {
		return err
	}
	return k.resize()
}

// resize lets pod and container grow, and shrink again.
func (k *kubelet) resize() error {
	const mib = 1 << 20
	for _, memory := range []int64{320 * mib, 160 * mib} {
		err := k.do(fmt.Sprintf("update the pod to %d MiB", memory/mib), func(ctx context.Context) error {
			_, err := k.n.Runtime().UpdatePodSandboxResources(ctx, &runtimeapi.UpdatePodSandboxResourcesRequest{
				PodSandboxId: k.pod,
				Resources:    &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: memory, CpuQuota: 100000, CpuPeriod: 100000},
			})
			return err
		})
		if err != nil {
			return err
		}
	}
	if k.container == "" {
		return nil
	}
	return k.do("update the container", func(ctx context.Context) error {
		_, err := k.n.Runtime().UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{
			ContainerId: k.container, Linux: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 48 * mib},
		})
		return err
	})
}

func (k *kubelet) upPod() error {
	pods, err := k.pods()
	if err != nil {
		return err
	}
	k.pod = ""
	for _, p := range pods {
		if p.GetState() == runtimeapi.PodSandboxState_SANDBOX_READY && k.pod == "" {
			k.pod = p.GetId()
			continue
		}
		if err := k.do("stop", func(ctx context.Context) error { return k.n.StopPod(ctx, p.GetId()) }); err != nil {
			return err
		}
	}
	if k.pod != "" {
		return nil
	}
	k.attempts++
	k.cfg.Metadata.Attempt = k.attempts
	return k.do("run", func(ctx context.Context) error {
		k.pod, err = k.n.RunPod(ctx, k.cfg, testnode.CloudHV)
		return err
	})
}

func (k *kubelet) upContainer(name string, to level) error {
	list, err := k.containers(k.pod)
	if err != nil {
		return err
	}
	k.container = ""
	for _, c := range list {
		if c.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING && c.GetMetadata().GetName() == name {
			k.container = c.GetId()
			return nil
		}
	}
	k.attempts++
	cfg := testnode.ContainerConfig(name, testimage.HelperRef, testimage.HelperPath, "term", "0")
	cfg.Metadata.Attempt = k.attempts
	cfg.Mounts = []*runtimeapi.Mount{{HostPath: k.volume, ContainerPath: "/volume"}}
	if k.disk != "" {
		cfg.Devices = []*runtimeapi.Device{{HostPath: k.disk, ContainerPath: "/dev/disk", Permissions: "rwm"}}
	}
	cfg.Linux.Resources.MemoryLimitInBytes = 32 << 20
	err = k.do("create", func(ctx context.Context) error {
		k.container, err = k.n.CreateContainer(ctx, k.pod, k.cfg, cfg)
		return err
	})
	if err != nil || to == containerCreated {
		return err
	}
	return k.do("start", func(ctx context.Context) error { return k.n.StartContainer(ctx, k.container) })
}

// down ends all that there is, and returns the first error.
func (k *kubelet) down() error {
	pods, err := k.pods()
	if err != nil {
		return err
	}
	for _, p := range pods {
		if err := k.downPod(p.GetId()); err != nil {
			return err
		}
	}
	return os.RemoveAll(k.cfg.GetLogDirectory())
}

func (k *kubelet) downPod(id string) error {
	list, err := k.containers(id)
	if err != nil {
		return err
	}
	for _, c := range list {
		if c.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
			continue
		}
		err := k.do("stop the container", func(ctx context.Context) error { return k.n.StopContainer(ctx, c.GetId(), time.Second) })
		if err != nil {
			return err
		}
	}
	if err := k.do("stop", func(ctx context.Context) error { return k.n.StopPod(ctx, id) }); err != nil {
		return err
	}
	if err := k.awaitExits(id); err != nil {
		return err
	}
	for _, c := range list {
		if err := k.do("remove the container", func(ctx context.Context) error { return k.n.RemoveContainer(ctx, c.GetId()) }); err != nil {
			return err
		}
	}
	return k.do("remove", func(ctx context.Context) error { return k.n.RemovePod(ctx, id) })
}

// awaitExits waits until CRI tells of no container that runs, as kubelet removes none before. Of
// one whose shim has died CRI learns it by its second try, a second later.
func (k *kubelet) awaitExits(pod string) error {
	ctx, cancel := limit(comes)
	defer cancel()
	var listErr error
	err := testnode.Eventually(ctx, func(context.Context) error {
		var list []*runtimeapi.Container
		if list, listErr = k.containers(pod); listErr != nil {
			return nil
		}
		for _, c := range list {
			if c.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
				return fmt.Errorf("container %.13s runs: %w", c.GetId(), errdefs.ErrFailedPrecondition)
			}
		}
		return nil
	})
	return errors.Join(err, listErr)
}
