// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package machine

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/podns"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// Pod is what the containers of a pod share beside namespaces.
type Pod struct {
	// Dir is a directory on a tmpfs.
	Dir string
}

// Hostname is the path of what containers get at /etc/hostname.
func (p Pod) Hostname() string { return filepath.Join(p.Dir, "hostname") }

// Hosts is the path of what containers get at /etc/hosts.
func (p Pod) Hosts() string { return filepath.Join(p.Dir, "hosts") }

// ResolvConf is the path of what containers get at /etc/resolv.conf.
func (p Pod) ResolvConf() string { return filepath.Join(p.Dir, "resolv.conf") }

// Shm is the directory that containers get at /dev/shm.
func (p Pod) Shm() string { return filepath.Join(p.Dir, "shm") }

// defaultShm is the size that CRI gives to a pod's /dev/shm.
const defaultShm = 64 << 20

// write sets the VM's names, and those of the pod's own namespaces n, and writes the
// files, with the content and the owner that CRI gives to pods of runc.
func (p Pod) write(r *guestv1.ConfigureRequest, n *podns.Namespaces) error {
	if err := os.MkdirAll(p.Dir, 0o755); err != nil {
		return err
	}
	setName := func() error { return unix.Sethostname([]byte(r.GetHostname())) }
	err := setName()
	if n != nil {
		err = errors.Join(err, n.Do(setName))
	}
	if err != nil {
		return fmt.Errorf("set hostname: %w", err)
	}
	hosts := r.GetHosts()
	if len(hosts) == 0 {
		hosts = makeHosts(r)
	}
	return errors.Join(
		writeFile(p.Hostname(), []byte(r.GetHostname()+"\n")),
		writeFile(p.Hosts(), hosts),
		writeFile(p.ResolvConf(), r.GetResolvConf()),
		p.giveTo(n),
		p.machineID(r.GetMachineId()),
	)
}

// giveTo gives the files to the root of the pod's user namespace, who may write them.
func (p Pod) giveTo(n *podns.Namespaces) error {
	if n == nil {
		return nil
	}
	uid, gid := n.Root()
	var errs []error
	for _, path := range []string{p.Hostname(), p.Hosts(), p.ResolvConf()} {
		errs = append(errs, os.Chown(path, uid, gid))
	}
	return errors.Join(errs...)
}

// Placeholder makes empty files in the places of a pod's, for a container that
// runs before there is a pod, and returns the function that removes them.
func (p Pod) Placeholder() (remove func() error, _ error) {
	err := os.MkdirAll(p.Shm(), 0o755)
	for _, path := range []string{p.Hostname(), p.Hosts(), p.ResolvConf()} {
		err = errors.Join(err, writeFile(path, nil))
	}
	return func() error { return os.RemoveAll(p.Dir) }, err
}

// forget undoes write and mountShm, as far as they went.
func (p Pod) forget() error {
	var errs []error
	for _, mount := range []string{p.Shm(), machineIDPath} {
		err := unix.Unmount(mount, unix.MNT_DETACH)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", mount, err))
		}
	}
	return errors.Join(append(errs, unix.Sethostname([]byte("(none)")), os.RemoveAll(p.Dir))...)
}

// machineID makes the VM's identity. Containers have their image's, as with runc.
func (p Pod) machineID(id string) error {
	path := filepath.Join(p.Dir, "machine-id")
	if err := writeFile(path, []byte(id+"\n")); err != nil {
		return err
	}
	// The root file system is read-only.
	if err := unix.Mount(path, machineIDPath, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind machine-id: %w", err)
	}
	return nil
}

// machineIDPath is where programs look for the machine's identity.
const machineIDPath = "/etc/machine-id"

// readMachineID is what they find.
func readMachineID() string {
	id, err := os.ReadFile(machineIDPath)
	if err != nil {
		return err.Error()
	}
	return string(bytes.TrimSpace(id))
}

// makeHosts writes the lines that Kubernetes writes.
func makeHosts(r *guestv1.ConfigureRequest) []byte {
	var b bytes.Buffer
	b.WriteString("127.0.0.1\tlocalhost\n" +
		"::1\tlocalhost ip6-localhost ip6-loopback\n" +
		"fe00::0\tip6-localnet\n" +
		"fe00::0\tip6-mcastprefix\n" +
		"fe00::1\tip6-allnodes\n" +
		"fe00::2\tip6-allrouters\n")
	for _, i := range r.GetInterfaces() {
		for _, a := range i.GetAddresses() {
			ip, _, err := net.ParseCIDR(a)
			if err != nil || ip.IsLinkLocalUnicast() {
				continue
			}
			fmt.Fprintf(&b, "%s\t%s\n", ip, r.GetHostname())
		}
	}
	return b.Bytes()
}

// mountShm mounts the pod's /dev/shm with the options that CRI uses.
func (p Pod) mountShm(size uint64) error {
	if size == 0 {
		size = defaultShm
	}
	if err := os.MkdirAll(p.Shm(), 0o755); err != nil {
		return err
	}
	return unix.Mount("shm", p.Shm(), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=1777,size="+strconv.FormatUint(size, 10))
}
