// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package machine

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/uevent"
)

const (
	// configureLimit and resizeLimit bound a wait for memory: a pod's start does not
	// wait long for what comes anyway.
	configureLimit = 5 * time.Second
	resizeLimit    = 25 * time.Second
	// memoryStart is how long a shrinking may take to begin: the VMM may not have
	// been asked yet.
	memoryStart = 200 * time.Millisecond
	// memoryAgain is how often to look. Whole blocks are announced, but a block of
	// virtio-mem fills up by parts, which nothing tells.
	memoryAgain = 20 * time.Millisecond
	// memoryReserve is what must be left available after a shrinking: without any the
	// kernel kills.
	memoryReserve = 32 << 20
	// memorySlack is how much of the RAM may be missing: what the VMM plugs comes
	// in blocks of a few MiB.
	memorySlack = 16 << 20
)

// Memory compares the RAM with what there was at boot: the kernel keeps an
// amount of its own, which differs from kernel to kernel, so that its total
// alone does not tell how much is plugged.
type Memory struct {
	// boot is the RAM that the machine had at boot, total what the kernel made of it.
	boot, total uint64
	// now is the kernel's total now, and available what could be had of it without
	// taking anything from a process.
	now, available func() uint64
}

// NewMemory must be called before memory can have been plugged.
func NewMemory() (*Memory, error) {
	f, err := os.Open("/proc/iomem")
	if err != nil {
		return nil, fmt.Errorf("read RAM at boot: %w", err)
	}
	defer f.Close()
	boot, err := parseIomem(f)
	if err != nil {
		return nil, err
	}
	return &Memory{boot: boot, total: totalRAM(), now: totalRAM, available: availableRAM}, nil
}

// totalRAM is the kernel's MemTotal in bytes.
func totalRAM() uint64 {
	var i unix.Sysinfo_t
	if err := unix.Sysinfo(&i); err != nil {
		return 0
	}
	return i.Totalram * uint64(i.Unit)
}

// availableRAM is the kernel's MemAvailable in bytes.
func availableRAM() uint64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	return parseAvailable(string(b))
}

func parseAvailable(meminfo string) uint64 {
	for line := range strings.Lines(meminfo) {
		rest, ok := strings.CutPrefix(line, "MemAvailable:")
		if !ok {
			continue
		}
		kib, err := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 44)
		if err != nil {
			return 0
		}
		return kib << 10
	}
	return 0
}

// parseIomem adds up the machine's RAM, rounded up to whole MiB, as small holes
// in it belong to firmware.
func parseIomem(r io.Reader) (uint64, error) {
	const mib = 1 << 20
	var sum uint64
	s := bufio.NewScanner(r)
	for s.Scan() {
		span, name, ok := strings.Cut(s.Text(), " : ")
		if !ok || name != "System RAM" || strings.HasPrefix(span, " ") {
			continue
		}
		a, b, _ := strings.Cut(span, "-")
		first, err1 := strconv.ParseUint(a, 16, 64)
		last, err2 := strconv.ParseUint(b, 16, 64)
		if err1 != nil || err2 != nil || last < first {
			return 0, fmt.Errorf("RAM at boot: %q: %w", clip(span), errdefs.ErrInternal)
		}
		sum += last - first + 1
	}
	return (sum + 2*mib - 1) / (2 * mib) * (2 * mib), s.Err()
}

// plugged is how much RAM the machine has, as well as the kernel tells.
func (m *Memory) plugged() uint64 {
	now := m.now()
	if now < m.total {
		return m.boot - min(m.boot, m.total-now)
	}
	return m.boot + now - m.total
}

// CheckShrink fails with ErrFailedPrecondition if the machine cannot do with so many
// bytes of RAM: what is plugged out would be missed.
func (m *Memory) CheckShrink(to uint64) error {
	have := m.plugged()
	if have <= to {
		return nil
	}
	if gone, available := have-to, m.available(); gone+memoryReserve > available {
		return fmt.Errorf("%d bytes of memory should go, and of all there is only %d are not in use: %w", gone, available, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// Wait returns when the kernel has want bytes of RAM, or no more than them if it
// had more. It fails with ErrDeadlineExceeded after the limit.
func (m *Memory) Wait(ctx context.Context, want uint64, limit time.Duration) error {
	wctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	began, start := time.Now(), m.plugged()
	err := uevent.Await(wctx, memoryAgain, func() (bool, error) {
		have := m.plugged()
		if have+memorySlack < want {
			return false, nil
		}
		if have <= want+memorySlack {
			return true, nil
		}
		// Too much: give a shrinking time to begin, and then to end.
		return have >= start && time.Since(began) > memoryStart, nil
	}, "memory")
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return fmt.Errorf("%d bytes of RAM wanted, %d there after %v: %w", want, m.plugged(), limit, context.DeadlineExceeded)
	}
	return err
}
