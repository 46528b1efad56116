// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
)

// Census counts what a node uses on its host, by class and by name with IDs
// taken out.
type Census struct {
	// Items are processes, mounts, network namespaces, links, CNI's results, cgroups,
	// loop devices, files and containerd's own records.
	Items map[string]int
	// Own are containerd's open files and goroutines. Only those of one process
	// can be compared.
	Own map[string]int
	pid int
}

// Diff says what there is more (+) or less (-) of than in before, a line each.
func (c Census) Diff(before Census) []string {
	lines := diff(before.Items, c.Items)
	if c.pid == before.pid {
		lines = append(lines, diff(before.Own, c.Own)...)
	}
	slices.Sort(lines)
	return lines
}

// DiffAnyProcess is Diff, and compares containerd's own files and goroutines also with those
// of another process: both have to be at rest, and to have done much the same.
func (c Census) DiffAnyProcess(before Census) []string {
	lines := append(diff(before.Items, c.Items), diff(before.Own, c.Own)...)
	slices.Sort(lines)
	return lines
}

func diff(before, after map[string]int) []string {
	var lines []string
	for k, v := range after {
		if d := v - before[k]; d != 0 {
			lines = append(lines, fmt.Sprintf("%+d %s", d, k))
		}
	}
	for k, v := range before {
		if _, ok := after[k]; !ok {
			lines = append(lines, fmt.Sprintf("%+d %s", -v, k))
		}
	}
	return lines
}

// Count is the number of items of a class, such as "process".
func (c Census) Count(class string) int {
	sum := 0
	for k, v := range c.Items {
		if strings.HasPrefix(k, class+" ") {
			sum += v
		}
	}
	return sum
}

// settleLimit is how long things may take that are cleaned up after a call has
// returned.
const settleLimit = 30 * time.Second

// AwaitCensus waits until the census is as before, and says how it differs if
// that does not happen soon.
func (n *Node) AwaitCensus(ctx context.Context, before Census) error {
	return n.awaitCensus(ctx, func(now Census) []string { return now.Diff(before) })
}

// AwaitCensusOfAnyProcess is AwaitCensus by DiffAnyProcess.
func (n *Node) AwaitCensusOfAnyProcess(ctx context.Context, before Census) error {
	return n.awaitCensus(ctx, func(now Census) []string { return now.DiffAnyProcess(before) })
}

func (n *Node) awaitCensus(ctx context.Context, differs func(now Census) []string) error {
	ctx, cancel := context.WithTimeout(ctx, Scale(settleLimit))
	defer cancel()
	return Eventually(ctx, func(ctx context.Context) error {
		now, err := n.Census(ctx)
		if err != nil {
			return err
		}
		if d := differs(now); len(d) > 0 {
			return fmt.Errorf("the census differs:\n\t%s: %w", strings.Join(d, "\n\t"), errdefs.ErrFailedPrecondition)
		}
		return nil
	})
}

// Census counts. Where containerd does not run, its own things are left out.
func (n *Node) Census(ctx context.Context) (Census, error) {
	c := Census{Items: map[string]int{}, Own: map[string]int{}, pid: n.Pid()}
	if c.pid != 0 {
		if err := n.collectGarbage(ctx); err != nil {
			return Census{}, err
		}
	}
	errs := []error{n.countProcesses(c.Items), n.countMounts(c.Items), n.countNetwork(c.Items), n.countCgroups(c.Items), n.countLoops(c.Items), n.countFiles(c.Items)}
	if c.pid != 0 {
		errs = append(errs, n.countRecords(ctx, c.Items), n.countOpenFiles(c), n.countGoroutines(ctx, c.Own))
	}
	if err := errors.Join(errs...); err != nil {
		return Census{}, fmt.Errorf("taking a census of node %s: %w", n.opts.Name, err)
	}
	return c, nil
}

// collectGarbage makes containerd remove what nothing refers to, snapshots above
// all: it would do so some time later.
func (n *Node) collectGarbage(ctx context.Context) error {
	ctx, cancel := limited(n.Context(ctx))
	defer cancel()
	svc := n.Containerd().LeasesService()
	l, err := svc.Create(ctx, leases.WithRandomID())
	if err == nil {
		err = svc.Delete(ctx, l, leases.SynchronousDelete)
	}
	if err != nil {
		return fmt.Errorf("collecting garbage: %w", err)
	}
	return nil
}

var (
	// Of snapshots with the same key those made later have a number behind it.
	hexID   = regexp.MustCompile(`[0-9a-f]{12,}(-[0-9]+\b)?`)
	uuid    = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)
	numbers = regexp.MustCompile(`[0-9]+`)
)

// nameless takes IDs and numbers out of a name.
func nameless(s string) string {
	s = uuid.ReplaceAllString(s, "<uuid>")
	s = hexID.ReplaceAllString(s, "<id>")
	return numbers.ReplaceAllString(s, "<n>")
}

func (n *Node) countProcesses(items map[string]int) error {
	ps, err := n.processes()
	if err != nil {
		return err
	}
	for _, p := range ps {
		name := p.name
		if p.zombie {
			name += " (zombie)"
		}
		items["process "+name]++
	}
	return nil
}

func (n *Node) countMounts(items map[string]int) error {
	ms, err := n.mounts()
	if err != nil {
		return err
	}
	for _, m := range ms {
		items["mount "+m.FSType+" on "+nameless(strings.TrimPrefix(m.Mountpoint, n.dir+"/"))]++
	}
	return nil
}

func (n *Node) countCgroups(items map[string]int) error {
	dirs, err := n.cgroups()
	if err != nil {
		return err
	}
	for _, d := range dirs {
		rel := strings.TrimPrefix(d, cgroupRoot)
		// The parents that the pods' configuration names are the test's, as they
		// are kubelet's on a node.
		_, below, _ := strings.Cut(rel, "/chv-"+n.opts.Name)
		if strings.Count(below, "/") > 1 {
			items["cgroup "+nameless(rel)]++
		}
	}
	return nil
}

func (n *Node) countLoops(items map[string]int) error {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), n.dir) {
			items["loop device on "+nameless(strings.TrimSpace(strings.TrimPrefix(string(b), n.dir)))]++
		}
	}
	return nil
}

// uncounted are directories that grow with images or logs, by design.
//
// In s are the sockets of runc's shims alone, which leave one behind where a start is cut short; ours are in run.
var uncounted = []string{"s", "logs", "root/io.containerd.content.v1.content", "root/io.containerd.metadata.v1.bolt"}

// snapshotDepth is how far below its root a snapshotter's directory is looked at.
const snapshotDepth = 4

func (n *Node) countFiles(items map[string]int) error {
	return filepath.WalkDir(n.dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(n.dir, path)
		if err != nil {
			return err
		}
		if slices.Contains(uncounted, rel) {
			return fs.SkipDir
		}
		if d.Name() == "rootfs" && d.IsDir() {
			return fs.SkipDir // a mount, which is counted
		}
		items["file "+nameless(rel)]++
		countBlocks(items, rel, d)
		if d.IsDir() && strings.HasPrefix(rel, "root/io.containerd.snapshotter") && strings.Count(rel, "/") >= snapshotDepth-1 {
			return fs.SkipDir
		}
		return nil
	})
}

// blockUnit is how exactly what files take on disk is compared, in bytes: guests write to
// disks as they come to it.
const blockUnit = 16 << 20

// BlocksOf begins the lines of a census that count the disk blocks of a file.
const BlocksOf = "16 MiB of "

// countBlocks counts what a file of the cache takes on disk, begun units each.
func countBlocks(items map[string]int, rel string, d fs.DirEntry) {
	if !d.Type().IsRegular() || !strings.HasPrefix(rel, "cache/") {
		return
	}
	info, err := d.Info()
	if err != nil {
		return // it has gone
	}
	const sector = 512
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		items[BlocksOf+nameless(rel)] += int((st.Blocks*sector + blockUnit - 1) / blockUnit)
	}
}

// countRecords counts what containerd has on record beside images.
func (n *Node) countRecords(ctx context.Context, items map[string]int) error {
	ctx, cancel := limited(n.Context(ctx))
	defer cancel()
	c := n.Containerd()
	containers, err1 := c.Containers(ctx)
	leases, err2 := c.LeasesService().List(ctx)
	sandboxes, err3 := c.SandboxStore().List(ctx)
	items["record container"] += len(containers)
	for _, l := range leases {
		items["record lease "+nameless(l.ID)+" "+nameless(fmt.Sprint(slices.Sorted(maps.Keys(l.Labels))))]++
	}
	items["record sandbox"] += len(sandboxes)
	return errors.Join(err1, err2, err3)
}

func (n *Node) countOpenFiles(c Census) error {
	dir := fmt.Sprintf("/proc/%d/fd", c.pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, fd := range fds {
		target, err := os.Readlink(filepath.Join(dir, fd.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		c.Own["open file "+nameless(target)]++
	}
	return nil
}

// lingering is where a connection that was closed waits for its peer's end, which a VM
// that is paused, as ready ones are, cannot tell before it goes on. It ends with the VM, and
// there are never more than a few to one (guest/api/transport has tests of that).
const lingering = "guest/api/transport.(*Conn).end.func1"

// reading is where containerd's debug server watches the connection of the census's own
// request. It may be there, or be about to; any other connection has a goroutine that serves it.
const reading = "net/http.(*connReader).backgroundRead"

// countGoroutines counts containerd's goroutines by the function that they began with.
func (n *Node) countGoroutines(ctx context.Context, own map[string]int) error {
	answer, err := n.debug(ctx, "goroutine?debug=1")
	if err != nil {
		return err
	}
	defer answer.Close()
	count, last := 0, ""
	flush := func() {
		// Those without a name are the runtime's own, which it starts as it needs them.
		if count > 0 && last != "" && last != reading && !strings.HasSuffix(last, lingering) {
			own["goroutine "+last] += count
		}
		count, last = 0, ""
	}
	s := bufio.NewScanner(answer)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		words := strings.Fields(s.Text())
		switch {
		case len(words) > 2 && words[1] == "@":
			flush()
			if _, err := fmt.Sscanf(words[0], "%d", &count); err != nil {
				return err
			}
		case len(words) > 2 && words[0] == "#":
			last, _, _ = strings.Cut(words[2], "+0x")
		}
	}
	flush()
	return s.Err()
}
