// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package faults

import (
	"strings"

	"github.com/stretchr/testify/assert"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

// shimTells is why nothing is told of what a shim does when its caller has gone.
const shimTells = "the shim's own log tells, and goes with the pod"

// untold are the points whose failure neither a call nor containerd's log tells of, with the
// reason.
var untold = map[failpoint.Point]string{
	failpoint.TaskLost:        shimTells,
	failpoint.TaskDeleteDisks: shimTells,
}

// judge compares what the calls answered with what they should have.
func (c *cell) judge(failed []call, pod string, from int64) {
	t := c.t
	if c.dies() {
		assert.Equal(t, 1, c.deaths(), "containerds ended")
	} else {
		assert.Zero(t, c.deaths(), "containerds ended")
	}
	said := "failpoint " + string(c.p)
	if c.action == failpoint.Fail {
		told := 0
		for _, f := range failed {
			if strings.Contains(f.err.Error(), said) {
				told++
			}
		}
		logged := strings.Contains(c.logSince(from), said)
		t.Logf("told %d of %d, logged %v", told, len(failed), logged)
		assert.True(t, told == 1 || logged || untold[c.p] != "", "nobody says what went wrong")
	}
	assert.LessOrEqual(t, len(failed), 1+len(c.s.with), "one failure is enough")
	if !c.s.ends && pod != "" && !c.endsPod() {
		assert.Equal(t, pod, c.k.pod, "the pod does not live on")
	}
}
