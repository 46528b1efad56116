// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package boot

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/disk"
)

const (
	// ScratchSerial is the serial of the VM's writable disk.
	ScratchSerial = "scratch"
	// Scratch is where it is mounted.
	Scratch = "/run/scratch"
	// scratchLimit is how long the disk may take to appear. It is there at boot.
	scratchLimit = 10 * time.Second
)

// ScratchDisk mounts the VM's writable disk at target, and says whether it
// accounts by project: mkfs.ext4 -O quota,project -E quotatype=prjquota makes
// such a file system, and the kernel needs CONFIG_QFMT_V2 for it.
func ScratchDisk(ctx context.Context, target string) (quota bool, _ error) {
	node, err := disk.Finder{}.Wait(ctx, ScratchSerial, scratchLimit)
	if err != nil {
		return false, fmt.Errorf("scratch disk: %w", err)
	}
	if err := os.MkdirAll(target, 0o711); err != nil {
		return false, fmt.Errorf("scratch disk: %w", err)
	}
	if quota, err = hasProjectQuota(node); err != nil {
		return false, fmt.Errorf("scratch disk: %w", err)
	}
	// Nothing on it outlives the VM: no barriers, no access times.
	data := "nobarrier"
	if quota {
		data += ",prjquota"
	}
	if err := unix.Mount(node, target, "ext4", unix.MS_NOATIME, data); err != nil {
		return false, fmt.Errorf("mount scratch disk %s (%s): %w", node, data, err)
	}
	return quota, nil
}

// The parts of ext4's super block that tell of project quotas.
const (
	superBlock     = 1024
	superMagic     = superBlock + 0x38
	superROCompat  = superBlock + 0x64
	ext4Magic      = 0xef53
	featureQuota   = 0x0100
	featureProject = 0x2000
)

// hasProjectQuota looks before the mount, as one that fails costs as much time
// as one that succeeds.
func hasProjectQuota(node string) (bool, error) {
	f, err := os.Open(node)
	if err != nil {
		return false, err
	}
	defer f.Close()
	b := make([]byte, superROCompat+4)
	if _, err := f.ReadAt(b, 0); err != nil {
		return false, fmt.Errorf("read super block: %w", err)
	}
	const both = featureQuota | featureProject
	return binary.LittleEndian.Uint16(b[superMagic:]) == ext4Magic && binary.LittleEndian.Uint32(b[superROCompat:])&both == both, nil
}
