// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package snapshot

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// Format is the version of what this package writes and of how the pool makes a
// template. Another one is another snapshot.
const Format = 2

// Inputs are all that shape a base snapshot. Two snapshots of equal Inputs serve
// the same pods; restoring one where any of them differs may not work, or work
// wrongly.
type Inputs struct {
	Format int `json:"format"`
	// Driver, Version, Accelerator and Binary tell the hypervisor; Binary is the
	// hash of its program (sparse.Hash, as all hashes here).
	Driver      string `json:"driver"`
	Version     string `json:"version"`
	Accelerator string `json:"accelerator"`
	Binary      string `json:"binary"`
	// Layout is vmm.Host.SnapshotLayout.
	Layout string `json:"layout,omitempty"`
	// Kernel and RootFS are hashes of the guest's.
	Kernel       string   `json:"kernel"`
	RootFS       string   `json:"rootfs"`
	KernelParams []string `json:"kernel_params,omitempty"`
	Size         vmm.Size `json:"size"`
	Max          vmm.Size `json:"max"`
	BuiltInNIC   bool     `json:"built_in_nic"`
	// ScratchBytes is the size of the writable disk, which is mounted in the template.
	ScratchBytes int64 `json:"scratch_bytes"`
	// CPU is the host's processor: model and features, as the guest may use them.
	CPU string `json:"cpu"`
}

// Key names the snapshot of these inputs: 32 hexadecimal digits.
func (in Inputs) Key() string {
	in.Format = Format
	data, err := json.Marshal(in)
	if err != nil {
		panic(err) // strings and numbers only
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:16])
}

// HostCPU tells processors apart that a guest of one may not go on on: the model
// and the features of the first one in /proc/cpuinfo.
func HostCPU() (string, error) {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "", fmt.Errorf("read the host's processor: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read
	return parseCPU(f)
}

func parseCPU(r io.Reader) (string, error) {
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	var model, features string
	for s.Scan() {
		name, value, ok := strings.Cut(s.Text(), ":")
		if !ok && model+features != "" {
			break // the next processor
		}
		switch strings.TrimSpace(name) {
		case "model name", "CPU implementer", "CPU part", "CPU variant":
			model += strings.TrimSpace(value) + " "
		case "flags", "Features":
			list := strings.Fields(value)
			slices.Sort(list)
			features = strings.Join(list, " ")
		}
	}
	if err := s.Err(); err != nil {
		return "", fmt.Errorf("read the host's processor: %w", err)
	}
	if model+features == "" {
		return "", errors.New("/proc/cpuinfo names no processor")
	}
	sum := sha256.Sum256([]byte(features))
	return model + hex.EncodeToString(sum[:8]), nil
}
