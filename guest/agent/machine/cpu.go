// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/uevent"
)

const (
	cpuDir = "/sys/devices/system/cpu"
	// cpuLimit is how long hot-plugged processors may take to appear.
	cpuLimit = 10 * time.Second
)

// cpus brings processors on line and off by the files in dir.
type cpus struct{ dir string }

func (c cpus) online() ([]int, error)  { return c.list("online") }
func (c cpus) present() ([]int, error) { return c.list("present") }

func (c cpus) list(file string) ([]int, error) {
	b, err := os.ReadFile(filepath.Join(c.dir, file))
	if err != nil {
		return nil, fmt.Errorf("list processors: %w", err)
	}
	return parseList(strings.TrimSpace(string(b)))
}

// parseList decodes the kernel's lists, such as "0-2,5".
func parseList(s string) ([]int, error) {
	var out []int
	if s == "" {
		return nil, nil
	}
	for f := range strings.SplitSeq(s, ",") {
		a, b, ranged := strings.Cut(f, "-")
		first, err := strconv.Atoi(a)
		last := first
		if err == nil && ranged {
			last, err = strconv.Atoi(b)
		}
		if err != nil || first < 0 || last < first || last-first >= maxVCPUs || len(out) > maxVCPUs {
			return nil, fmt.Errorf("list of processors %q: %w", clip(s), errdefs.ErrInternal)
		}
		for i := first; i <= last; i++ {
			out = append(out, i)
		}
	}
	return out, nil
}

// set brings processors on line, lowest first, or takes them off, highest first,
// until n are. It waits for those that the VMM has just plugged.
func (c cpus) set(ctx context.Context, n int) error {
	wctx, cancel := context.WithTimeout(ctx, cpuLimit)
	defer cancel()
	err := uevent.Await(wctx, 0, func() (bool, error) {
		present, err := c.present()
		return len(present) >= n, err
	}, "cpu")
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return fmt.Errorf("%d vCPUs: fewer are plugged: %w", n, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return err
	}
	online, err := c.online()
	if err != nil {
		return err
	}
	present, err := c.present()
	if err != nil {
		return err
	}
	count := len(online)
	for _, i := range present {
		if count >= n {
			break
		}
		if !slices.Contains(online, i) {
			if err := c.write(i, "1"); err != nil {
				return err
			}
			count++
		}
	}
	for _, i := range slices.Backward(online) {
		if count <= n {
			break
		}
		if err := c.write(i, "0"); err != nil {
			return err
		}
		count--
	}
	return nil
}

func (c cpus) write(cpu int, value string) error {
	path := filepath.Join(c.dir, "cpu"+strconv.Itoa(cpu), "online")
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("processor %d: %w", cpu, err)
	}
	_, err = f.WriteString(value)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("processor %d: write %s: %w", cpu, value, err)
	}
	return nil
}
