// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxBuffer bounds what a limitedBuffer keeps.
const maxBuffer = 64 << 20

// limitedBuffer is a buffer that fails when it gets too much. It may be read
// while it is written.
type limitedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (l *limitedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.b.Len()+len(p) > maxBuffer {
		return 0, bytes.ErrTooLarge
	}
	return l.b.Write(p)
}

// String returns what has been written.
func (l *limitedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var podNumber atomic.Uint64

// PodConfig is the configuration of a pod with a new UID, its own log directory
// and cgroup, host name name, and one DNS server.
func (n *Node) PodConfig(name string) *runtimeapi.PodSandboxConfig {
	uid := strconv.FormatInt(time.Now().UnixNano(), 36) + "-" + strconv.FormatUint(podNumber.Add(1), 36)
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Uid: uid, Namespace: "default"},
		Hostname:     name,
		LogDirectory: n.Dir("logs", name+"-"+uid),
		DnsConfig:    &runtimeapi.DNSConfig{Servers: []string{n.HostIPs()[0].String()}, Searches: []string{"chv.test"}, Options: []string{"ndots:2"}},
		Labels:       map[string]string{"chv-node": n.opts.Name},
		Annotations:  map[string]string{},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: n.CgroupParent() + "/" + uid,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			},
		},
	}
}

// ContainerConfig is the configuration of a container with the given command,
// which replaces the image's own entry point when it is not empty. The log goes
// to name.log in the pod's log directory.
func ContainerConfig(name, image string, command ...string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: image},
		Command:  command,
		LogPath:  name + ".log",
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources: &runtimeapi.LinuxContainerResources{},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			},
		},
	}
}

// callLimit bounds each of the calls below.
const callLimit = 2 * time.Minute

func limited(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, Scale(callLimit))
}

// RunPod runs a pod by the handler and returns its ID. It waits twice as long as
// the other calls, as kubelet does.
func (n *Node) RunPod(ctx context.Context, pod *runtimeapi.PodSandboxConfig, handler string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, Scale(2*callLimit))
	defer cancel()
	if err := os.MkdirAll(pod.GetLogDirectory(), 0o755); err != nil {
		return "", err
	}
	r, err := n.Runtime().RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: pod, RuntimeHandler: handler})
	if err != nil {
		return "", fmt.Errorf("running pod %s by %s: %w", pod.GetMetadata().GetName(), handler, err)
	}
	return r.GetPodSandboxId(), nil
}

// StopPod stops a pod.
func (n *Node) StopPod(ctx context.Context, id string) error {
	ctx, cancel := limited(ctx)
	defer cancel()
	if _, err := n.Runtime().StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("stopping pod %.13s: %w", id, err)
	}
	return nil
}

// RemovePod removes a pod and its containers, running or not.
func (n *Node) RemovePod(ctx context.Context, id string) error {
	ctx, cancel := limited(ctx)
	defer cancel()
	if _, err := n.Runtime().RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("removing pod %.13s: %w", id, err)
	}
	return nil
}

// CreateContainer creates a container and returns its ID.
func (n *Node) CreateContainer(ctx context.Context, podID string, pod *runtimeapi.PodSandboxConfig, cfg *runtimeapi.ContainerConfig) (string, error) {
	ctx, cancel := limited(ctx)
	defer cancel()
	r, err := n.Runtime().CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: podID, Config: cfg, SandboxConfig: pod})
	if err != nil {
		return "", fmt.Errorf("creating container %s: %w", cfg.GetMetadata().GetName(), err)
	}
	return r.GetContainerId(), nil
}

// StartContainer starts a created container.
func (n *Node) StartContainer(ctx context.Context, id string) error {
	ctx, cancel := limited(ctx)
	defer cancel()
	if _, err := n.Runtime().StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		return fmt.Errorf("starting container %.13s: %w", id, err)
	}
	return nil
}

// StopContainer stops a container, by SIGKILL after the grace period.
func (n *Node) StopContainer(ctx context.Context, id string, grace time.Duration) error {
	ctx, cancel := limited(ctx)
	defer cancel()
	if _, err := n.Runtime().StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: int64(grace / time.Second)}); err != nil {
		return fmt.Errorf("stopping container %.13s: %w", id, err)
	}
	return nil
}

// RemoveContainer removes a container.
func (n *Node) RemoveContainer(ctx context.Context, id string) error {
	ctx, cancel := limited(ctx)
	defer cancel()
	if _, err := n.Runtime().RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
		return fmt.Errorf("removing container %.13s: %w", id, err)
	}
	return nil
}

// ExecSync runs a command in a container. A command that fails is no error:
// its exit code says so.
func (n *Node) ExecSync(ctx context.Context, id string, command ...string) (stdout, stderr string, code int, err error) {
	ctx, cancel := limited(ctx)
	defer cancel()
	r, err := n.Runtime().ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: command, Timeout: int64(Scale(callLimit) / time.Second)})
	if err != nil {
		return "", "", -1, fmt.Errorf("executing %q in container %.13s: %w", command, id, err)
	}
	return string(r.GetStdout()), string(r.GetStderr()), int(r.GetExitCode()), nil
}

// PodIPs are a pod's addresses by its status, the main one first.
func (n *Node) PodIPs(ctx context.Context, id string) ([]string, error) {
	ctx, cancel := limited(ctx)
	defer cancel()
	st, err := n.Runtime().PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		return nil, fmt.Errorf("asking for pod %.13s: %w", id, err)
	}
	ips := []string{st.GetStatus().GetNetwork().GetIp()}
	for _, a := range st.GetStatus().GetNetwork().GetAdditionalIps() {
		ips = append(ips, a.GetIp())
	}
	return ips, nil
}

// RemoveAllPods stops and removes every pod of the node.
func (n *Node) RemoveAllPods(ctx context.Context) error {
	ctx, cancel := limited(ctx)
	defer cancel()
	pods, err := n.Runtime().ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("listing pods: %w", err)
	}
	var errs []error
	for _, p := range pods.GetItems() {
		errs = append(errs, n.StopPod(ctx, p.GetId()), n.RemovePod(ctx, p.GetId()))
	}
	return errors.Join(errs...)
}
