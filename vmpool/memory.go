// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// memoryLook is how often the pool looks what memory the host has left, while it
// has VMs ready or wants to: nothing tells.
const memoryLook = 5 * time.Second

// pressure is how short of memory the host is.
type pressure int

const (
	// plenty lets the pool be as large as it should.
	plenty pressure = iota
	// scarce lets it make no VM ready.
	scarce
	// short lets it keep none.
	short
)

// pressureOf tells how short of memory a host is that has so many bytes available
// and wants to keep reserve. Between scarce and short there is room for all that
// a pool gives back and takes again, so that it does not swing.
func pressureOf(available, reserve int64) pressure {
	switch {
	case available < reserve/2:
		return short
	case available < reserve:
		return scarce
	default:
		return plenty
	}
}

// HostMemory is what the host's kernel thinks can be used without swapping, in bytes.
func HostMemory() (int64, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("available memory: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read
	for s := bufio.NewScanner(f); s.Scan(); {
		rest, ok := strings.CutPrefix(s.Text(), "MemAvailable:")
		if !ok {
			continue
		}
		kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("available memory: %w", err)
		}
		return kib << 10, nil
	}
	return 0, fmt.Errorf("available memory: the kernel does not tell: %w", errdefs.ErrNotImplemented)
}

// lookAtMemory finds out how short of memory the host is. Where it cannot be found
// out there is plenty.
func (p *Pool) lookAtMemory(ctx context.Context) {
	if p.cfg.Available == nil || p.cfg.ReserveMemory <= 0 {
		return
	}
	now, available := plenty, int64(0)
	available, err := p.cfg.Available()
	if err == nil {
		now = pressureOf(available, p.cfg.ReserveMemory)
	}
	p.mu.Lock()
	before := p.pressure
	p.pressure, p.available = now, available
	p.mu.Unlock()
	if now == before {
		return
	}
	entry := log.G(ctx).WithField("available", available).WithField("reserve", p.cfg.ReserveMemory)
	switch now {
	case short:
		entry.Warn("the host is short of memory; ready VMs are ended, and none is made ready")
	case scarce:
		entry.Warn("the host's memory is scarce; no VM is made ready")
	default:
		entry.Info("the host has memory for the pool again")
	}
}

// memoryErr says why the pool is smaller than it should be, or nothing; under p.mu.
func (p *Pool) memoryErr() error {
	if p.pressure == plenty {
		return nil
	}
	return fmt.Errorf("the host has %d MiB of memory available, and the pool leaves it %d: %w",
		p.available>>20, p.cfg.ReserveMemory>>20, errdefs.ErrResourceExhausted)
}

// fitMemory bounds a number of ready VMs by what the host has left, under p.mu.
func (p *Pool) fitMemory(want int) int {
	switch p.pressure {
	case short:
		return 0
	case scarce:
		return min(want, len(p.ready))
	default:
		return want
	}
}
