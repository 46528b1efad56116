// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// FreeAddress is a TCP address on loopback where nothing listens, for
// Options.Metrics.
func FreeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// Metrics are containerd's metrics, which Options.Metrics turns on: each series in
// the form name{label="value"}, histograms by their parts.
func (n *Node) Metrics(ctx context.Context) (map[string]float64, error) {
	ctx, cancel := limited(ctx)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+n.opts.Metrics+"/v1/metrics", nil)
	if err != nil {
		return nil, err
	}
	// A connection that stays open would be one more thing to find in a census.
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("asking for metrics: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("asking for metrics: %s: %w", resp.Status, errdefs.ErrUnavailable)
	}
	return parseMetrics(resp.Body)
}

// parseMetrics reads Prometheus's text format.
func parseMetrics(r io.Reader) (map[string]float64, error) {
	series := map[string]float64{}
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		line := s.Text()
		if line == "" || line[0] == '#' {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		if i < 0 {
			return nil, fmt.Errorf("metrics: a line %q: %w", line, errdefs.ErrUnknown)
		}
		v, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			return nil, fmt.Errorf("metrics: a line %q: %w", line, err)
		}
		series[line[:i]] = v
	}
	return series, s.Err()
}

// AwaitPool waits until the pool has as many VMs ready as it should, at least
// atLeast of them, and makes none. It needs Options.Metrics.
func (n *Node) AwaitPool(ctx context.Context, atLeast int) error {
	return Eventually(ctx, func(ctx context.Context) error {
		m, err := n.Metrics(ctx)
		if err != nil {
			return err
		}
		depth, target := m["containerd_cloudhv_pool_depth"], m["containerd_cloudhv_pool_target"]
		making := m[`containerd_cloudhv_vms{state="making"}`]
		if depth != target || int(depth) < atLeast || making != 0 {
			return fmt.Errorf("the pool has %v VMs ready of %v, and makes %v: %w", depth, target, making, errdefs.ErrUnavailable)
		}
		return nil
	})
}

// AwaitSnapshot waits until VMs can be restored. It needs Options.Metrics.
func (n *Node) AwaitSnapshot(ctx context.Context) error {
	return Eventually(ctx, func(ctx context.Context) error {
		m, err := n.Metrics(ctx)
		if err == nil && m["containerd_cloudhv_pool_snapshot_usable"] != 1 {
			err = fmt.Errorf("there is no snapshot yet: %w", errdefs.ErrUnavailable)
		}
		return err
	})
}

// debug asks containerd's debug socket. The caller closes the answer.
func (n *Node) debug(ctx context.Context, path string) (io.ReadCloser, error) {
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", n.Dir("debug.sock"))
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://containerd/debug/pprof/"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		return nil, fmt.Errorf("asking containerd's debug socket: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		_ = resp.Body.Close()
		return nil, fmt.Errorf("asking containerd's debug socket for %s: %s: %w", path, resp.Status, errdefs.ErrUnavailable)
	}
	return resp.Body, nil
}

// Usage is what containerd's own process uses, after a collection of its garbage.
type Usage struct {
	// Resident is its memory in bytes (RSS), Heap what is live in it.
	Resident, Heap int64
	Goroutines     int
	Files          int
}

// Usage measures containerd's process. What it has freed it may not have given
// back to the host yet, so Resident follows Heap with some delay.
func (n *Node) Usage(ctx context.Context) (Usage, error) {
	ctx, cancel := limited(ctx)
	defer cancel()
	var u Usage
	// gc=1 collects before it counts.
	heap, err := n.debug(ctx, "heap?gc=1&debug=1")
	if err != nil {
		return u, err
	}
	defer heap.Close()
	if u.Heap, err = heapAlloc(heap); err != nil {
		return u, err
	}
	own := map[string]int{}
	pid := n.Pid()
	resident, err1 := residentBytes(pid)
	fds, err2 := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err := errors.Join(err1, err2, n.countGoroutines(ctx, own)); err != nil {
		return u, err
	}
	u.Resident, u.Files = resident, len(fds)
	for _, count := range own {
		u.Goroutines += count
	}
	return u, nil
}

// heapAlloc finds the live heap's size in a heap profile in text form.
func heapAlloc(r io.Reader) (int64, error) {
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		if text, ok := strings.CutPrefix(s.Text(), "# HeapAlloc = "); ok {
			return strconv.ParseInt(text, 10, 64)
		}
	}
	return 0, errors.Join(s.Err(), fmt.Errorf("a heap profile without HeapAlloc: %w", errdefs.ErrUnknown))
}

func residentBytes(pid int) (int64, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "statm"))
	if err != nil {
		return 0, err
	}
	words := strings.Fields(string(data))
	if len(words) < 2 {
		return 0, fmt.Errorf("statm of process %d: %q: %w", pid, data, errdefs.ErrUnknown)
	}
	pages, err := strconv.ParseInt(words[1], 10, 64)
	return pages * int64(os.Getpagesize()), err
}
