// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
)

// Hypervisor is what a node's pods run on.
type Hypervisor struct {
	// Name, Version and Accelerator are as in vmm.Host.
	Name, Version, Accelerator string
}

func (h Hypervisor) String() string {
	return fmt.Sprintf("%s %s, accelerator %s", h.Name, h.Version, h.Accelerator)
}

// Hypervisor asks for it, and says it. It fails if the accelerator is not the environment's
// E2E_ACCELERATOR.
func (n *Node) Hypervisor(ctx context.Context) (Hypervisor, error) {
	out, errOut, err := n.Ctl(ctx, "-o", "json", "status")
	if err != nil {
		return Hypervisor{}, fmt.Errorf("asking for the hypervisor: %w: %s", err, errOut)
	}
	var status struct {
		Hypervisor Hypervisor `json:"hypervisor"`
	}
	if err := json.Unmarshal([]byte(out), &status); err != nil {
		return Hypervisor{}, fmt.Errorf("asking for the hypervisor: %w", err)
	}
	h := status.Hypervisor
	fmt.Fprintf(os.Stderr, "hypervisor: %s\n", h)
	if want := os.Getenv("E2E_ACCELERATOR"); want != "" && want != h.Accelerator {
		return h, fmt.Errorf("the hypervisor runs with %s, want %s: %w", h.Accelerator, want, errdefs.ErrFailedPrecondition)
	}
	return h, nil
}
