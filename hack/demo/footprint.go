// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// classes are the kinds of things that the demo makes on its host, in the order shown.
var classes = []string{"process", "mount", "network namespace", "bridge and its ports", "cgroup", "loop device", "CNI cache entry", "file", "directory elsewhere"}

// elsewhere are directories that a containerd, its CNI library or our plugin
// make where nobody tells them otherwise.
var elsewhere = []string{
	"/run/containerd", "/var/lib/containerd", "/opt/containerd", "/run/cloudhv", "/var/lib/cloudhv",
	"/run/nri", "/opt/nri", "/run/netns", "/run/cdi", "/etc/cdi", "/etc/cni", "/var/lib/cni",
}

// footprint is what a node has on its host, by class and by a name that no other
// thing gets later. It is looked for with no help of the node's, which removes
// by lists of its own.
type footprint map[string]map[string]struct{}

func (f footprint) add(class, name string) {
	if f[class] == nil {
		f[class] = map[string]struct{}{}
	}
	f[class][name] = struct{}{}
}

// names lists what there is of a class.
func (f footprint) names(class string) []string { return slices.Sorted(maps.Keys(f[class])) }

// site is where a node leaves its traces.
type site struct {
	// dir is the node's directory; tag names its bridge and its cgroups.
	dir, tag string
	// procfs, cgroups, cni and loops are directories of the host's.
	procfs, cgroups, cni, loops string
}

func newSite(name string) site {
	return site{
		dir: filepath.Join(testnode.BaseDir, name), tag: "chv-" + name,
		procfs: "/proc", cgroups: "/sys/fs/cgroup", cni: "/var/lib/cni/results", loops: "/sys/block",
	}
}

// look finds all that the node has at the moment, and what it once had (known)
// and still exists, under whatever name.
func (s site) look(known footprint) (footprint, error) {
	f := footprint{}
	err := errors.Join(s.processes(f, known), s.mounts(f), s.links(f, known), s.controlGroups(f), s.loopDevices(f), s.cniCache(f), s.files(f))
	for _, dir := range elsewhere {
		if _, statErr := os.Lstat(dir); statErr == nil {
			f.add("directory elsewhere", dir)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("looking at what is there: %w", err)
	}
	return f, nil
}

// programs are those that a node's directory in the command line makes the
// node's: an editor with a log open is not.
var programs = []string{"containerd", "qemu-system", "cloud-hypervisor", "runc", "mkfs.", "crictl"}

// processes are named by program, pid and start time, which never comes again.
func (s site) processes(f, known footprint) error {
	dirs, err := filepath.Glob(filepath.Join(s.procfs, "[0-9]*"))
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue // it has ended
		}
		open, end := strings.IndexByte(string(stat), '('), strings.LastIndexByte(string(stat), ')')
		fields := strings.Fields(string(stat[max(end+1, 0):]))
		if open < 0 || end < open || len(fields) < 20 {
			return fmt.Errorf("%s/stat has another form: %q", dir, stat)
		}
		if fields[0] == "Z" {
			continue // ended, and init's to collect once containerd has ended too
		}
		program := string(stat[open+1 : end])
		name := fmt.Sprintf("%s, pid %s, begun at tick %s", program, filepath.Base(dir), fields[19])
		cgroup, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
		args, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		_, was := known["process"][name]
		of := slices.ContainsFunc(programs, func(p string) bool { return strings.HasPrefix(program, p) })
		if was || strings.Contains(string(cgroup), "/"+s.tag+"/") || of && strings.Contains(string(args), s.dir+"/") {
			f.add("process", name)
		}
	}
	return nil
}

// mounts are those below the directory; the ones that hold a network namespace
// are a class of their own.
func (s site) mounts(f footprint) error {
	ms, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(m.Mountpoint, s.dir+"/") && !strings.HasPrefix(m.Source, s.dir+"/"), false
	})
	if err != nil {
		return fmt.Errorf("listing mounts: %w", err)
	}
	for _, m := range ms {
		if m.FSType == "nsfs" {
			f.add("network namespace", m.Mountpoint)
		} else {
			f.add("mount", m.FSType+" on "+m.Mountpoint)
		}
	}
	return nil
}

// links are the node's bridge, what is or was plugged into it, and TAPs that are
// not in their pod.
func (s site) links(f, known footprint) error {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("listing links: %w", err)
	}
	bridge := 0
	for _, l := range links {
		if l.Attrs().Name == s.tag {
			bridge = l.Attrs().Index
		}
	}
	for _, l := range links {
		a := l.Attrs()
		name := fmt.Sprintf("%s %s, index %d", l.Type(), a.Name, a.Index)
		_, was := known["bridge and its ports"][name]
		if was || bridge != 0 && (a.Index == bridge || a.MasterIndex == bridge) {
			f.add("bridge and its ports", name)
		}
	}
	return nil
}

func (s site) controlGroups(f footprint) error {
	return filepath.WalkDir(s.cgroups, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENODEV):
			return nil // removed meanwhile
		case err != nil:
			return err
		case d.IsDir() && strings.Contains(path+"/", "/"+s.tag+"/"):
			f.add("cgroup", path)
		}
		return nil
	})
}

func (s site) loopDevices(f footprint) error {
	files, err := filepath.Glob(filepath.Join(s.loops, "loop*", "loop", "backing_file"))
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(b), s.dir+"/") {
			f.add("loop device", strings.TrimSpace(string(b)))
		}
	}
	return err
}

func (s site) cniCache(f footprint) error {
	files, err := filepath.Glob(filepath.Join(s.cni, s.tag+"-*"))
	for _, file := range files {
		f.add("CNI cache entry", file)
	}
	return err
}

// files are the directory and all in it, on its own file system.
func (s site) files(f footprint) error {
	var root unix.Stat_t
	if err := unix.Lstat(s.dir, &root); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("%s: %w", s.dir, err)
	}
	return filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // removed meanwhile
		case err != nil:
			return err
		case d.IsDir() && unix.Lstat(path, &st) == nil && st.Dev != root.Dev:
			return fs.SkipDir // a mount, which is counted
		}
		f.add("file", path)
		return nil
	})
}

// left lists what is there after and should not be: all of the node's, and
// directories elsewhere that were not there before.
func left(before, after footprint) []string {
	var lines []string
	for _, class := range classes {
		for _, name := range after.names(class) {
			_, was := before[class][name]
			if class != "directory elsewhere" || !was {
				lines = append(lines, class+" "+name)
			}
		}
	}
	return lines
}

// footprints shows how many of each class there were, by columns.
func footprints(before, during, after footprint) string {
	rows := []string{"\tBEFORE\tWITH THE POD\tNOW"}
	for _, class := range classes {
		b, d, a := len(before[class]), len(during[class]), len(after[class])
		if class == "directory elsewhere" {
			d, a = d-b, a-b
			b = 0
		}
		rows = append(rows, fmt.Sprintf("%s\t%d\t%d\t%d", class, b, d, a))
	}
	return table(rows)
}
