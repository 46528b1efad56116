// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
)

// shortID is how much of an ID is shown; it is enough to name a VM by.
const shortID = 13

// printer writes columns, and keeps the first error.
type printer struct {
	tabs *tabwriter.Writer
	err  error
}

func newPrinter(w io.Writer) *printer {
	return &printer{tabs: tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)}
}

// row writes a line of cells, which can have come from anywhere.
func (p *printer) row(cells ...string) {
	for i, c := range cells {
		cells[i] = oneLine(c)
	}
	// The last cell is no column, so that nothing trails it.
	_, err := fmt.Fprintln(p.tabs, strings.TrimRight(strings.Join(cells, "\t"), "\t"))
	p.err = errors.Join(p.err, err)
}

func (p *printer) flush() error { return errors.Join(p.err, p.tabs.Flush()) }

func (s *statusView) print(w io.Writer) error {
	p := newPrinter(w)
	if s.Fit {
		p.row("node", "can serve")
	} else {
		p.row("node", "CANNOT SERVE, because")
		for _, reason := range s.Reasons {
			p.row("", reason)
		}
	}
	p.row("containerd", s.Version)
	h := s.Hypervisor
	if h.Name == "" {
		p.row("hypervisor", "none")
	} else {
		p.row("hypervisor", fmt.Sprintf("%s %s, %s", h.Name, h.Version, h.Binary))
		p.row("", "because "+h.Reason)
		p.row("accelerator", h.Accelerator)
		p.row("", "because "+h.AcceleratorReason)
		p.row("confinement", h.Confinement)
		p.row("overhead", fmt.Sprintf("%d MiB a pod, for the RuntimeClass", h.OverheadBytes>>20))
	}
	s.Pool.print(p)
	if err := p.flush(); err != nil || len(s.Snapshots) == 0 {
		return err
	}
	p = newPrinter(w)
	p.row("")
	p.row("SNAPSHOT", "SIZE", "AGE", "USERS", "STATE")
	for _, snap := range s.Snapshots {
		p.row(snap.ID, size(snap.Bytes), age(snap.Created), fmt.Sprint(snap.Users), snap.state())
	}
	return p.flush()
}

func (s *snapshotView) state() string {
	switch {
	case s.Current:
		return "current"
	case s.Damaged:
		return "damaged"
	case s.Users > 0:
		return "old, in use"
	default:
		return "old"
	}
}

func (p *poolView) print(out *printer) {
	switch {
	case !p.On:
		out.row("pool", "off: "+p.OffReason)
		return
	case p.Drained:
		out.row("pool", "DRAINED: none is kept ready until `cloudhvctl fill`")
	case !p.Usable:
		out.row("pool", "no snapshot yet: pods boot their virtual machines")
	default:
		out.row("pool", "on")
	}
	ready := fmt.Sprintf("%d of %d wanted, %d at most", p.Ready, p.Target, p.Max)
	if p.Making > 0 {
		ready += fmt.Sprintf("; %d being made", p.Making)
	}
	out.row("ready", ready)
	out.row("memory", fmt.Sprintf("%s of %s", size(p.MemoryBytes), size(p.MaxMemoryBytes)))
	out.row("pods", fmt.Sprintf("hit %d, miss %d, cold %d, failed %d since containerd started", p.Hits, p.Misses, p.Cold, p.Failed))
	if p.LastError != "" {
		out.row("last error", p.LastError)
	}
	if p.Failures > 0 {
		out.row("", fmt.Sprintf("failures in a row: %d; next attempt in %v", p.Failures, seconds(p.PauseSeconds).Round(100*time.Millisecond)))
	}
}

func (l vmList) print(w io.Writer, phases bool) error {
	p := newPrinter(w)
	p.row("VM", "POD", "NAME", "STATE", "CAME BY", "VCPUS", "MEMORY", "PSS", "SHIM", "AGE", "START", "PID")
	for i := range l {
		vm := &l[i]
		pod, name := "-", "-"
		if vm.Pod != nil {
			pod = short(vm.Pod.ID)
			name = cmp.Or(strings.Trim(vm.Pod.Namespace+"/"+vm.Pod.Name, "/"), "-")
		}
		p.row(cmp.Or(short(vm.ID), "-"), pod, name, vm.State, cmp.Or(vm.Outcome, "-"), fmt.Sprint(vm.VCPUs), size(vm.MemoryBytes),
			sizeOr(vm.VMMPSSBytes), sizeOr(vm.ShimPSSBytes), age(vm.Created), vm.start(), number(vm.VMMPid))
	}
	if err := p.flush(); err != nil || !phases {
		return err
	}
	for i := range l {
		if len(l[i].Phases) > 0 {
			if err := l[i].printPhases(w); err != nil {
				return err
			}
		}
	}
	return nil
}

func (v *vmView) printPhases(w io.Writer) error {
	p := newPrinter(w)
	p.row("")
	p.row("VM "+short(v.ID), "AT", "TOOK")
	for _, ph := range v.Phases {
		p.row(ph.Name, millis(ph.AtSeconds), millis(ph.TookSeconds))
	}
	return p.flush()
}

// start is how long the start took, by its phases.
func (v *vmView) start() string {
	var end float64
	for _, ph := range v.Phases {
		end = max(end, ph.AtSeconds+ph.TookSeconds)
	}
	if end == 0 {
		return "-"
	}
	return millis(end)
}

func millis(s float64) string { return fmt.Sprintf("%.1f ms", s*1000) }

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func short(id string) string { return id[:min(len(id), shortID)] }

func size(n int64) string {
	return units.CustomSize("%.4g %s", float64(n), 1024, []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"})
}

func sizeOr(n int64) string {
	if n == 0 {
		return "-"
	}
	return size(n)
}

func number(n uint32) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprint(n)
}

// age tells how long ago something was, in the unit that suits.
func age(at *time.Time) string {
	if at == nil {
		return "-"
	}
	d := max(0, time.Since(*at))
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	default:
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	}
}
