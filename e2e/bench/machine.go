// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// bareMachine is a VM that was booted without anything of ours but the guest's kernel: a disk
// with the tests' helper as its first process, and a TAP on the pods' bridge.
type bareMachine struct {
	bareVM
	ip string
}

// bareMachineMiB is its memory, bareDiskMiB its disk.
const (
	bareMachineMiB = 512
	bareDiskMiB    = 256
)

// newBareMachine boots one by the node's hypervisor, and waits until it serves. What it returns
// is the caller's to remove, after an error too.
func newBareMachine(ctx context.Context, n *testnode.Node, helper []byte) (*bareMachine, error) {
	if err := awaitPool(ctx, n, 1); err != nil {
		return nil, err
	}
	pids, err := vmms(n)
	if err != nil {
		return nil, err
	}
	if len(pids) == 0 {
		return nil, fmt.Errorf("no VMM of ours runs: %w", errdefs.ErrNotFound)
	}
	dir, err := benchDir()
	if err != nil {
		return nil, err
	}
	m := &bareMachine{bareVM: bareVM{dir: dir}}
	if err := m.makeDisk(ctx, helper); err != nil {
		return m, err
	}
	gateway := n.HostIPs()[0].As4()
	gateway[3] = 254 // the pods' are given from below
	m.ip = netip.AddrFrom4(gateway).String()
	binary, args, err := m.commandLine(pids[0], filepath.Join(n.GuestDir(), "vmlinux"))
	if err != nil {
		return m, err
	}
	tap, err := plugInto(n.Bridge())
	if err != nil {
		return m, err
	}
	if err := m.launch(binary, args, tap); err != nil {
		return m, err
	}
	return m, awaitServer(ctx, net.JoinHostPort(m.ip, strconv.Itoa(servePort)))
}

// remove ends the VM. It may be nil.
func (m *bareMachine) remove() error {
	if m == nil {
		return nil
	}
	return m.end()
}

// diskFile is the VM's disk, in its directory.
const diskFile = "disk"

// makeDisk makes a file system with the helper, a large file and a directory for each place.
func (m *bareMachine) makeDisk(ctx context.Context, helper []byte) (retErr error) {
	root := filepath.Join(m.dir, "root")
	defer func() { retErr = errors.Join(retErr, os.RemoveAll(root)) }()
	for _, dir := range []string{"bin", "proc", "dev", "work"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	big, err := io.ReadAll(pattern.New(1, testimage.BigBytes))
	if err != nil {
		return err
	}
	for path, data := range map[string][]byte{testimage.HelperPath: helper, testimage.BigPath: big} {
		if err := os.WriteFile(filepath.Join(root, path), data, 0o755); err != nil {
			return err
		}
	}
	disk := filepath.Join(m.dir, diskFile)
	cmd := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-d", root, disk, strconv.Itoa(bareDiskMiB)+"M")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	return nil
}

// plugInto makes a TAP that is a port of a bridge.
func plugInto(bridge string) (_ *os.File, retErr error) {
	tap, name, err := makeTAP()
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, tap.Close())
		}
	}()
	port, err := netlink.LinkByName(name)
	if err != nil {
		return nil, err
	}
	master, err := netlink.LinkByName(bridge)
	if err != nil {
		return nil, err
	}
	return tap, errors.Join(netlink.LinkSetMaster(port, master), netlink.LinkSetUp(port))
}

// commandLine is that of a VMM such as the one with that pid, with the same processor and
// accelerator, and a TAP as its descriptor 3.
func (m *bareMachine) commandLine(pid int, kernel string) (binary string, args []string, _ error) {
	lines, err := commandLines()
	if err != nil {
		return "", nil, err
	}
	if binary, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err != nil {
		return "", nil, err
	}
	params := fmt.Sprintf("console=ttyS0 quiet panic=-1 root=/dev/vda rootfstype=ext4 rw random.trust_cpu=on init=%s -- machine %s/24 %d %d %d",
		testimage.HelperPath, m.ip, servePort, echoPort, benchPort)
	if isCloudHypervisor(binary) {
		return binary, []string{
			"--cpus", "boot=1", "--memory", fmt.Sprintf("size=%dM", bareMachineMiB), "--kernel", kernel, "--cmdline", params,
			"--serial", "file=console", "--console", "off", "--disk", "path=" + diskFile + ",image_type=raw", "--net", "fd=[3]",
		}, nil
	}
	args = []string{"-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-machine", "q35", "-smp", "1", "-m", strconv.Itoa(bareMachineMiB)}
	for i, arg := range lines[pid] {
		if (arg == "-accel" || arg == "-cpu") && i+1 < len(lines[pid]) {
			args = append(args, arg, lines[pid][i+1])
		}
	}
	return binary, append(args, "-kernel", kernel, "-append", params, "-serial", "file:console",
		"-drive", "if=none,id=disk,format=raw,file="+diskFile, "-device", "virtio-blk-pci,drive=disk",
		"-netdev", "tap,id=net,fd=3,vhost=off", "-device", "virtio-net-pci,netdev=net,romfile="), nil
}

// ioBare measures what ioPod measures, as far as there is such a thing without us.
func (r *report) ioBare(ctx context.Context, m *bareMachine) error {
	var errs []error
	for of, line := range map[string]string{
		"image":        testimage.BigPath,
		places[0].name: fmt.Sprintf("%s %d %d", places[0].dir, places[0].mib, places[0].many),
	} {
		out, err := m.ask(line)
		errs = append(errs, r.rates(of, sideBare, bareSuffix, out, err))
	}
	return errors.Join(append(errs, r.network(ctx, sideBare, bareSuffix, m.ip))...)
}

// ask has the VM measure its files.
func (m *bareMachine) ask(line string) (string, error) {
	limit := testnode.Scale(time.Minute)
	c, err := net.DialTimeout("tcp", net.JoinHostPort(m.ip, strconv.Itoa(benchPort)), limit)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(limit)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(c, line); err != nil {
		return "", err
	}
	out, err := io.ReadAll(c)
	return string(out), err
}
