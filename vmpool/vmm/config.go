// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"github.com/containerd/errdefs"
)

// Bounds that all drivers share.
const (
	// MinMemory is the least that a guest boots with, in bytes.
	MinMemory = 64 << 20
	// MemoryUnit is what all memory sizes are a multiple of, in bytes.
	MemoryUnit = 2 << 20
	// MaxVCPUs is what the guest kernel is built for.
	MaxVCPUs = 64
	// MinConsoleLimit is the least for Config.ConsoleLimit, in bytes.
	MinConsoleLimit = 4 << 10

	maxSocketPath = 107
)

// RoundMemory rounds a number of bytes up to what a VM can have.
func RoundMemory(n int64) int64 {
	return max(MinMemory, (n+MemoryUnit-1)/MemoryUnit*MemoryUnit)
}

var (
	validSerial = regexp.MustCompile(`^[a-z0-9-]{1,20}$`)
	validNIC    = regexp.MustCompile(`^[a-z0-9-]{1,12}$`)
)

// Validate checks a Config for what every driver needs. The error names all that
// is wrong and wraps ErrInvalidArgument.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.ID == "" {
		bad("ID is empty")
	}
	if !filepath.IsAbs(c.Dir) || len(c.Dir)+1+MaxDirName > maxSocketPath {
		bad("Dir %q: want an absolute path of at most %d bytes", c.Dir, maxSocketPath-1-MaxDirName)
	} else if info, err := os.Stat(c.Dir); err != nil || !info.IsDir() {
		bad("Dir %q is no directory", c.Dir)
	}
	for _, f := range [][2]string{{"Kernel", c.Kernel}, {"RootFS", c.RootFS}, {"Scratch", c.Scratch}} {
		if f[0] == "Scratch" && f[1] == "" {
			continue
		}
		if !filepath.IsAbs(f[1]) {
			bad("%s %q: want an absolute path", f[0], f[1])
		} else if _, err := os.Stat(f[1]); err != nil {
			bad("%s: %w", f[0], err)
		}
	}
	if c.ConsoleLimit < MinConsoleLimit {
		bad("ConsoleLimit %d: want at least %d bytes", c.ConsoleLimit, MinConsoleLimit)
	}
	errs = append(errs, c.Size.check("Size"), c.Max.check("Max"))
	if c.Max.VCPUs < c.Size.VCPUs || c.Max.MemoryBytes < c.Size.MemoryBytes {
		bad("Max %+v is less than Size %+v", c.Max, c.Size)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("VM configuration: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (s Size) check(what string) error {
	var errs []error
	if s.VCPUs < 1 || s.VCPUs > MaxVCPUs {
		errs = append(errs, fmt.Errorf("%s.VCPUs %d: want 1 to %d", what, s.VCPUs, MaxVCPUs))
	}
	if s.MemoryBytes < MinMemory || s.MemoryBytes%MemoryUnit != 0 {
		errs = append(errs, fmt.Errorf("%s.MemoryBytes %d: want at least %d and a multiple of %d", what, s.MemoryBytes, MinMemory, MemoryUnit))
	}
	return errors.Join(errs...)
}

// CheckResize says whether a VM with these bounds can have a size: from Config.Size's
// memory and one vCPU up to Config.Max. The error wraps ErrInvalidArgument.
func CheckResize(want, boot, limit Size) error {
	err := want.check("Size")
	if want.MemoryBytes < boot.MemoryBytes || want.MemoryBytes > limit.MemoryBytes {
		err = errors.Join(err, fmt.Errorf("memory of %d bytes: want %d to %d", want.MemoryBytes, boot.MemoryBytes, limit.MemoryBytes))
	}
	if want.VCPUs > limit.VCPUs {
		err = errors.Join(err, fmt.Errorf("%d vCPUs: want at most %d", want.VCPUs, limit.VCPUs))
	}
	if err != nil {
		return fmt.Errorf("resize: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// DisksDir is where a driver puts disks that it cannot hand its VMM otherwise: a
// directory beside Config.Scratch, which goes with that.
func DisksDir(scratch string) string { return scratch + ".d" }

// Validate checks serial and path. The error wraps ErrInvalidArgument.
func (d Disk) Validate() error {
	if !validSerial.MatchString(d.Serial) {
		return fmt.Errorf("disk serial %q: want 1 to 20 of [a-z0-9-]: %w", d.Serial, errdefs.ErrInvalidArgument)
	}
	if d.Serial == ScratchSerial || d.Serial == ImageSerial {
		return fmt.Errorf("disk serial %q is that of a disk which a machine has from its start: %w", d.Serial, errdefs.ErrInvalidArgument)
	}
	if !filepath.IsAbs(d.Path) {
		return fmt.Errorf("disk %s: path %q is not absolute: %w", d.Serial, d.Path, errdefs.ErrInvalidArgument)
	}
	info, err := os.Stat(d.Path)
	if err != nil {
		return fmt.Errorf("disk %s: %w: %w", d.Serial, err, errdefs.ErrInvalidArgument)
	}
	if kind := info.Mode().Type(); kind != 0 && kind != fs.ModeDevice {
		return fmt.Errorf("disk %s: %s is neither a file nor a block device: %w", d.Serial, d.Path, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Validate checks ID, address, MTU and queues. The error wraps ErrInvalidArgument.
func (n NIC) Validate() error {
	switch {
	case !validNIC.MatchString(n.ID):
		return fmt.Errorf("NIC ID %q: want 1 to 12 of [a-z0-9-]: %w", n.ID, errdefs.ErrInvalidArgument)
	case len(n.MAC) != 6 || n.MAC[0]&1 != 0:
		return fmt.Errorf("NIC %s: MAC %q: want a unicast Ethernet address: %w", n.ID, n.MAC, errdefs.ErrInvalidArgument)
	case n.MTU < 0 || n.MTU > 65535 || n.MTU > 0 && n.MTU < 68:
		return fmt.Errorf("NIC %s: MTU %d: want 68 to 65535, or 0: %w", n.ID, n.MTU, errdefs.ErrInvalidArgument)
	case len(n.Queues) == 0 || len(n.Queues) > MaxVCPUs:
		return fmt.Errorf("NIC %s: %d queues: want 1 to %d: %w", n.ID, len(n.Queues), MaxVCPUs, errdefs.ErrInvalidArgument)
	}
	return nil
}
