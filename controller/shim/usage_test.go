// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
)

func (d *fakeDaemon) toldUsages() []*hostv1.UsageRequest {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]*hostv1.UsageRequest(nil), d.usages...)
}

// A layer's usage is told once, told again when the plugin did not hear of it, and its
// end is told too.
func TestUsageIsTold(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.run("c", nil, "sleep")
	p.stats("c")
	eventually(t, "a first usage", func() bool { return len(p.daemon.toldUsages()) == 1 })
	u := p.daemon.toldUsages()[0]
	assert.Equal(t, "c", u.ContainerId)
	assert.NotEmpty(t, u.SandboxId)
	assert.EqualValues(t, 123<<10, u.Bytes)
	assert.EqualValues(t, 45, u.Inodes)

	task, err := p.svc.task("c")
	require.NoError(t, err)
	answer, err := p.guest.Stats(t.Context(), nil)
	require.NoError(t, err)
	task.tellUsage(answer)
	answer.WritableBytes++
	task.tellUsage(answer)
	eventually(t, "a second usage", func() bool { return len(p.daemon.toldUsages()) == 2 })
	p.daemon.stop()
	answer.WritableBytes++
	task.tellUsage(answer)
	eventually(t, "a usage that is not told", func() bool {
		task.mu.Lock()
		defer task.mu.Unlock()
		return task.usage.at.IsZero()
	})
	p.daemon.start()
	task.tellUsage(answer)
	eventually(t, "a third usage", func() bool { return len(p.daemon.toldUsages()) == 3 })
	task.mu.Lock()
	task.usage.at = time.Now().Add(-usageAge)
	task.mu.Unlock()
	task.tellUsage(answer)
	eventually(t, "the same again, after a while", func() bool { return len(p.daemon.toldUsages()) == 4 })

	_, err = p.client.Kill(t.Context(), &taskapi.KillRequest{ID: "c", Signal: 9})
	require.NoError(t, err)
	_, err = p.client.Wait(t.Context(), &taskapi.WaitRequest{ID: "c"})
	require.NoError(t, err)
	_, err = p.client.Delete(t.Context(), &taskapi.DeleteRequest{ID: "c"})
	require.NoError(t, err)
	eventually(t, "the end", func() bool { return len(p.daemon.toldUsages()) == 5 && p.daemon.toldUsages()[4].Gone })
	task.tellUsage(answer)
	assert.Len(t, p.daemon.toldUsages(), 5)
}
