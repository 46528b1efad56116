// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// TestRestarts runs a container that fails three times, as kubelet starts it again: each
// attempt is one of its own, with its own exit code, reason, log and a clean root file
// system.
func TestRestarts(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		for attempt := range uint32(3) {
			cfg := shellConfig("crash", fmt.Sprintf("test ! -e /mark && touch /mark && echo attempt %d; exit %d", attempt, attempt))
			cfg.Metadata.Attempt = attempt
			cfg.LogPath = fmt.Sprintf("crash_%d.log", attempt)
			c := p.start(cfg)
			st := c.awaitExit()
			require.Equal(t, attempt, st.GetMetadata().GetAttempt())
			require.Equal(t, int32(attempt), st.GetExitCode())
			require.Equal(t, map[bool]string{true: "Completed", false: "Error"}[attempt == 0], st.GetReason())
			require.Equal(t, fmt.Sprintf("attempt %d\n", attempt), c.text("stdout"))
			require.LessOrEqual(t, st.GetCreatedAt(), st.GetStartedAt())
			// containerd takes the one time when it has heard of the start, and a VM the other when the process ends.
			require.LessOrEqual(t, st.GetStartedAt(), st.GetFinishedAt()+int64(testnode.Scale(time.Second)))
		}
		list, err := p.n.Runtime().ListContainers(testContext(t), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: p.id}})
		require.NoError(t, err)
		require.Len(t, list.GetContainers(), 3, "all attempts are there until they are removed")
		same := shellConfig("crash", "true")
		same.Metadata.Attempt = 2
		_, err = p.n.CreateContainer(testContext(t), p.id, p.cfg, same)
		require.ErrorContains(t, err, "reserved", "a name and an attempt are taken once")
	})
}

// TestKindsOfContainers runs an init container to its end, a sidecar beside the main
// container, and stops them in the order that kubelet does.
func TestKindsOfContainers(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		first := p.start(shellConfig("init", "echo from-init > /dev/shm/handover"))
		require.Equal(t, "Completed", first.awaitExit().GetReason())
		require.NoError(t, p.n.RemoveContainer(testContext(t), first.id))
		sidecar := p.start(helperConfig("sidecar", "serve", port))
		sidecar.awaitLine("listening")
		main := p.start(shellConfig("main", "cat /dev/shm/handover; wget -q -O /dev/null http://127.0.0.1:"+port+"/ && echo served"))
		require.Zero(t, main.awaitExit().GetExitCode())
		require.Equal(t, "from-init\nserved\n", main.text("stdout"))
		require.Equal(t, runtimeapi.ContainerState_CONTAINER_RUNNING, sidecar.status().GetState())
		require.NoError(t, p.n.StopContainer(testContext(t), sidecar.id, time.Second))
		require.Equal(t, runtimeapi.PodSandboxState_SANDBOX_READY, p.state(), "the pod lives without containers")
	})
}

// TestPreStop is the end that kubelet gives to a container with a preStop hook: an exec
// first, then SIGTERM, and SIGKILL after what is left of the grace period. A pod's stop
// ends what is still running.
func TestPreStop(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		c := p.start(shellConfig("c", `trap 'echo terminated; cat /hook; exit 0' TERM; echo ready; while :; do sleep 1 & wait; done`))
		c.awaitLine("ready")
		c.sh("echo said-by-hook > /hook")
		require.NoError(t, p.n.StopContainer(testContext(t), c.id, 30*time.Second))
		require.Zero(t, c.status().GetExitCode())
		require.Equal(t, "ready\nterminated\nsaid-by-hook\n", c.text("stdout"))

		deaf := p.start(helperConfig("deaf", "term", "ignore"))
		deaf.awaitLine("ready")
		require.NoError(t, p.n.StopPod(testContext(t), p.id))
		require.Equal(t, int32(137), deaf.awaitExit().GetExitCode())
	})
}

// TestCheckpointRefused checks that a checkpoint says why there is none, and that the
// container goes on.
func TestCheckpointRefused(t *testing.T) {
	requireCloudHV(t)
	p := newPod(t, testnode.CloudHV)
	c := p.idle("c")
	_, err := p.n.Runtime().CheckpointContainer(testContext(t), &runtimeapi.CheckpointContainerRequest{ContainerId: c.id, Location: t.TempDir() + "/checkpoint.tar"})
	require.Error(t, err)
	// CRI asks for its own criu before it asks the runtime.
	require.Regexp(t, "criu|cannot be checkpointed", err.Error())
	task, err := p.n.Containerd().LoadContainer(p.n.Context(testContext(t)), c.id)
	require.NoError(t, err)
	running, err := task.Task(p.n.Context(testContext(t)), nil)
	require.NoError(t, err)
	_, err = running.Checkpoint(p.n.Context(testContext(t)))
	require.ErrorContains(t, err, "runs in a VM and cannot be checkpointed")
	c.exec("true")
}

// TestContainerEvents checks that CRI tells of a container's start, end and removal.
func TestContainerEvents(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		ctx, cancel := context.WithCancel(testContext(t))
		defer cancel()
		stream, err := node(t).Runtime().GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
		require.NoError(t, err)
		p := newPod(t, h)
		c := p.start(shellConfig("c", "exit 4"))
		c.awaitExit()
		require.NoError(t, p.n.RemoveContainer(testContext(t), c.id))
		var seen []runtimeapi.ContainerEventType
		for len(seen) < 4 {
			e, err := stream.Recv()
			require.NoError(t, err, "%v", seen)
			if e.GetContainerId() == c.id {
				seen = append(seen, e.GetContainerEventType())
				require.Equal(t, p.id, e.GetPodSandboxStatus().GetId())
			}
		}
		require.Equal(t, []runtimeapi.ContainerEventType{
			runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT,
			runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT,
		}, seen)
	})
}
