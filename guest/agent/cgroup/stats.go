// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cgroup

import (
	"errors"
	"io/fs"
	"math"
	"strconv"
	"strings"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// maxStat bounds the keys of memory.stat that are passed on, and maxDisks the
// lines of io.stat.
const (
	maxStat  = 128
	maxDisks = 256
)

// Stats reads g's counters.
func (g Group) Stats() (*guestv1.StatsResponse, error) {
	out := &guestv1.StatsResponse{Cpu: &guestv1.CPUStats{}, Memory: &guestv1.MemoryStats{}, Pids: &guestv1.PidsStats{}}
	if err := errors.Join(g.cpu(out.Cpu), g.memory(out.Memory), g.pids(out.Pids), g.io(out)); err != nil {
		return nil, err
	}
	return out, nil
}

// OOMKills is how many processes of g the OOM killer ended.
func (g Group) OOMKills() (uint64, error) {
	v, err := g.flat("memory.events")
	return v["oom_kill"], err
}

func (g Group) cpu(s *guestv1.CPUStats) error {
	v, err := g.flat("cpu.stat")
	s.UsageUsec, s.UserUsec, s.SystemUsec = v["usage_usec"], v["user_usec"], v["system_usec"]
	s.NrPeriods, s.NrThrottled, s.ThrottledUsec = v["nr_periods"], v["nr_throttled"], v["throttled_usec"]
	return err
}

func (g Group) memory(s *guestv1.MemoryStats) error {
	var errs []error
	for _, f := range []struct {
		file string
		to   *uint64
	}{
		{"memory.current", &s.Usage},
		{"memory.max", &s.UsageLimit},
		{"memory.swap.current", &s.SwapUsage},
		{"memory.swap.max", &s.SwapLimit},
		{"memory.peak", &s.MaxUsage},
	} {
		var err error
		*f.to, err = g.number(f.file)
		errs = append(errs, err)
	}
	stat, err := g.flat("memory.stat")
	errs = append(errs, err)
	s.Stat = make(map[string]uint64, len(stat))
	for k, v := range stat {
		if len(s.Stat) < maxStat {
			s.Stat[k] = v
		}
	}
	ev, err := g.flat("memory.events")
	errs = append(errs, err)
	s.Oom, s.OomKill, s.Max, s.High, s.Low = ev["oom"], ev["oom_kill"], ev["max"], ev["high"], ev["low"]
	return errors.Join(errs...)
}

func (g Group) pids(s *guestv1.PidsStats) error {
	var err, err2 error
	s.Current, err = g.number("pids.current")
	s.Limit, err2 = g.number("pids.max")
	return errors.Join(err, err2)
}

func (g Group) io(out *guestv1.StatsResponse) error {
	b, err := g.read("io.stat")
	if errors.Is(err, fs.ErrNotExist) && g.exists() {
		return nil
	}
	if err != nil {
		return err
	}
	out.Io = parseIO(string(b))
	return nil
}

// parseFlat decodes lines of "key value"; others are skipped.
func parseFlat(b []byte) map[string]uint64 {
	out := make(map[string]uint64)
	for line := range strings.Lines(string(b)) {
		k, v, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok {
			continue
		}
		if n, err := strconv.ParseUint(v, 10, 64); err == nil {
			out[k] = n
		}
	}
	return out
}

func parseNumber(s string) uint64 {
	if s == "max" {
		return math.MaxUint64
	}
	n, _ := strconv.ParseUint(s, 10, 64)
	return n
}

// parseIO decodes io.stat: "major:minor rbytes=1 wbytes=2 rios=3 wios=4 …".
func parseIO(s string) []*guestv1.IOStats {
	var out []*guestv1.IOStats
	for line := range strings.Lines(s) {
		f := strings.Fields(line)
		if len(f) < 2 || len(out) >= maxDisks {
			continue
		}
		major, minor, ok := strings.Cut(f[0], ":")
		if !ok {
			continue
		}
		e := &guestv1.IOStats{Major: parseNumber(major), Minor: parseNumber(minor)}
		for _, kv := range f[1:] {
			k, v, _ := strings.Cut(kv, "=")
			switch k {
			case "rbytes":
				e.Rbytes = parseNumber(v)
			case "wbytes":
				e.Wbytes = parseNumber(v)
			case "rios":
				e.Rios = parseNumber(v)
			case "wios":
				e.Wios = parseNumber(v)
			}
		}
		out = append(out, e)
	}
	return out
}
