// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"os/exec"
	"testing"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest/realvm"
)

// limit bounds a step of a test.
var limit = realvm.Limit

func TestMain(m *testing.M) {
	attacker()
	realvm.Main(m)
}

func testContext(t testing.TB) context.Context { return realvm.Context(t) }

func suite() *realvm.Suite {
	return &realvm.Suite{Driver: New(""), StateFile: stateName, ImageDisk: true, Missing: func() error {
		_, err := exec.LookPath(DefaultBinary)
		return err
	}}
}

func TestRealVMs(t *testing.T) { suite().Run(t) }
