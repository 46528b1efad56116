// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Runtime handlers that every node has.
const (
	// RunC runs a pod's containers by runc on the host's kernel.
	RunC = "runc"
	// CloudHV runs a pod in a virtual machine.
	CloudHV = "cloudhv"
)

// BaseDir is where nodes have their directories unless Options.Dir says otherwise.
const BaseDir = "/var/tmp/chv"

// Namespace is the containerd namespace of the CRI.
const Namespace = "k8s.io"

var validName = regexp.MustCompile(`^[a-z][a-z0-9]{0,10}$`)

// Options say what a node is like. Only Name is needed.
type Options struct {
	// Name is part of the names of the bridge, the CNI network and the cgroups:
	// 1 to 11 of [a-z0-9], beginning with a letter. One node of a name at a time.
	Name string
	// Dir holds everything; BaseDir/Name if empty. It must be short, as unix
	// sockets lie in it, and is deleted by New and Close.
	Dir string
	// Repo is the root of the checkout, found from the working directory if empty.
	Repo string
	// BinDir holds containerd, containerd-shim-runc-v2, containerd-shim-cloudhv-v1,
	// cloudhvctl and crictl; Repo/build/bin if empty. It comes first in containerd's PATH.
	BinDir string
	// GuestDir holds vmlinux and rootfs.erofs; Repo/build/guest if empty.
	GuestDir string
	// CNIBinDir holds the CNI plugins bridge and host-local; if empty, the first
	// of Repo/build/host/usr/lib/cni, /usr/lib/cni and /opt/cni/bin that does.
	CNIBinDir string
	// CloudHV is added to the plugin's configuration, or replaces what the node
	// would set. Values are strings, numbers, booleans or lists of strings.
	CloudHV map[string]any
	// Debug makes containerd log at level debug, and the shims every request.
	Debug bool
	// Tmpfs puts directories of the node's on a tmpfs each, by their names, of a size as
	// mount has it (half of the memory if empty). "state" and "run" are containerd's and
	// the plugin's state, which /run is on most hosts.
	Tmpfs map[string]string
	// Metrics is the address at which containerd serves its metrics; empty for none.
	Metrics string
	// Mirrors are the URLs from which images are pulled instead, by the host of
	// their references, without a way back to that.
	Mirrors map[string]string
	// HostPorts lets pods have ports of the host, by the CNI plugin portmap. It has
	// chains of its own in the host's firewall, which Close removes unless they
	// were there before.
	HostPorts bool
	// Networks are further networks, with handlers of their own: see Network.
	Networks []Network
	// NRI lets plugins connect to NRISocket, which may change containers.
	NRI bool
	// Env is added to containerd's environment.
	Env []string
}

// Node is a private containerd. See the package's documentation.
type Node struct {
	opts   Options
	dir    string
	subnet subnets
	// lans are further bridges, there where Options.Networks are.
	lans []LAN
	lock *os.File
	// ownCNI says that the host had no directories of CNI's before.
	ownCNI bool

	// pid is proc's, also while Start waits for it; 0 if there is none.
	pid atomic.Int64

	mu   sync.Mutex
	proc *process
	conn *grpc.ClientConn
	ctrd *containerd.Client
}

// New prepares a node's directory, bridge and configuration, after removing
// what an earlier node of the same name left behind. It starts nothing. It
// returns ErrUnavailable if a node of that name exists in another process.
func New(opts Options) (_ *Node, retErr error) {
	if !validName.MatchString(opts.Name) {
		return nil, fmt.Errorf("node name %q does not match %s: %w", opts.Name, validName, errdefs.ErrInvalidArgument)
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("a node needs root: %w", errdefs.ErrPermissionDenied)
	}
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	n := &Node{opts: opts, dir: opts.Dir}
	if n.lock, err = lockDir(opts.Dir); err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			n.lock.Close()
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), Scale(time.Minute))
	defer cancel()
	if err := n.sweep(ctx); err != nil {
		return nil, fmt.Errorf("removing what an earlier node %s left: %w", opts.Name, err)
	}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, n.sweep(ctx), os.RemoveAll(n.dir))
		}
	}()
	for _, d := range []string{"root", "state", "run", "cache", "s", "opt", "cdi", "tmp", "logs", "cni/conf", "cni/ipam", "cni/bin", "nri"} {
		if err := os.MkdirAll(filepath.Join(n.dir, d), 0o711); err != nil {
			return nil, err
		}
	}
	if err := n.mountTmpfs(); err != nil {
		return nil, err
	}
	_, err = os.Lstat(cniDir)
	n.ownCNI = errors.Is(err, fs.ErrNotExist)
	if err := n.setUpNetwork(); err != nil {
		return nil, err
	}
	return n, errors.Join(n.writeConfig(), n.writeMirrors())
}

// mountTmpfs mounts what Options.Tmpfs asks for. Close unmounts it.
func (n *Node) mountTmpfs() error {
	for dir, size := range n.opts.Tmpfs {
		data := "mode=0711"
		if size != "" {
			data += ",size=" + size
		}
		if err := unix.Mount("tmpfs", n.Dir(dir), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, data); err != nil {
			return fmt.Errorf("mounting a tmpfs on %s: %w", n.Dir(dir), err)
		}
	}
	return nil
}

// withDefaults fills in what was left empty.
func (o Options) withDefaults() (Options, error) {
	if o.Repo == "" {
		root, err := FindRepo()
		if err != nil {
			return o, err
		}
		o.Repo = root
	}
	if o.Dir == "" {
		o.Dir = filepath.Join(BaseDir, o.Name)
	}
	if o.BinDir == "" {
		o.BinDir = filepath.Join(o.Repo, "build", "bin")
	}
	if o.GuestDir == "" {
		o.GuestDir = filepath.Join(o.Repo, "build", "guest")
	}
	if o.CNIBinDir == "" {
		for _, d := range []string{filepath.Join(o.Repo, "build", "host", "usr", "lib", "cni"), "/usr/lib/cni", "/opt/cni/bin"} {
			if _, err := os.Stat(filepath.Join(d, "bridge")); err == nil {
				o.CNIBinDir = d
				break
			}
		}
	}
	if o.CNIBinDir == "" {
		return o, fmt.Errorf("no CNI plugin bridge in build/host/usr/lib/cni, /usr/lib/cni or /opt/cni/bin: %w", errdefs.ErrFailedPrecondition)
	}
	return o, nil
}

// Missing lists the files that a node with these options needs and cannot find.
func Missing(opts Options) ([]string, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	var missing []string
	for _, f := range []string{
		filepath.Join(opts.BinDir, "containerd"),
		filepath.Join(opts.BinDir, "containerd-shim-runc-v2"),
		filepath.Join(opts.BinDir, "containerd-shim-cloudhv-v1"),
		filepath.Join(opts.BinDir, "cloudhvctl"),
		filepath.Join(opts.BinDir, "crictl"),
		filepath.Join(opts.GuestDir, "vmlinux"),
		filepath.Join(opts.GuestDir, "rootfs.erofs"),
	} {
		if _, err := os.Stat(f); err != nil {
			missing = append(missing, f)
		}
	}
	return missing, nil
}

// FindRepo returns the closest directory above that holds go.mod.
func FindRepo() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == "/" {
			return "", fmt.Errorf("no go.mod above the working directory: %w", errdefs.ErrNotFound)
		}
	}
}

// lockDir makes dir and takes the lock in it.
func lockDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another process has a node in %s: %w", dir, errdefs.ErrUnavailable)
	}
	return f, nil
}

const lockFile = "lock"

// Scale multiplies a time limit by the factor in the environment's
// E2E_TIME_FACTOR, for hosts that are slower than most.
func Scale(d time.Duration) time.Duration {
	f, err := strconv.ParseFloat(os.Getenv("E2E_TIME_FACTOR"), 64)
	if err != nil || f <= 0 {
		return d
	}
	return time.Duration(float64(d) * f)
}

// Name is Options.Name.
func (n *Node) Name() string { return n.opts.Name }

// Dir is the node's directory, and the joined names below it.
func (n *Node) Dir(elem ...string) string {
	return filepath.Join(append([]string{n.dir}, elem...)...)
}

// StateDir is the plugin's state directory and CacheDir its cache.
func (n *Node) StateDir() string { return n.Dir("run") }

// CacheDir is where the plugin keeps images and scratch disks.
func (n *Node) CacheDir() string { return n.Dir("cache") }

// Endpoint is the address of containerd's CRI, in crictl's form.
func (n *Node) Endpoint() string { return "unix://" + n.Dir("c.sock") }

// NRISocket is where plugins of NRI connect, if Options.NRI says so.
func (n *Node) NRISocket() string { return n.Dir("nri.sock") }

// CDIDir is where the node's CDI specifications are.
func (n *Node) CDIDir() string { return n.Dir("cdi") }

// Bridge is the name of the bridge that the pods' interfaces are on.
func (n *Node) Bridge() string { return "chv-" + n.opts.Name }

// CgroupParent is the parent of the pods' cgroups.
func (n *Node) CgroupParent() string { return "/chv-" + n.opts.Name }

// Runtime is the CRI's runtime service. It outlives restarts of containerd.
func (n *Node) Runtime() runtimeapi.RuntimeServiceClient {
	return runtimeapi.NewRuntimeServiceClient(n.client())
}

// ImageService is the CRI's image service.
func (n *Node) ImageService() runtimeapi.ImageServiceClient {
	return runtimeapi.NewImageServiceClient(n.client())
}

// Containerd is a client of containerd itself, in the CRI's namespace.
func (n *Node) Containerd() *containerd.Client {
	n.client()
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ctrd
}

// LogTail returns the last max bytes of containerd's log, from a line's start.
func (n *Node) LogTail(maxBytes int64) string {
	f, err := os.Open(n.LogPath())
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err.Error()
	}
	b := make([]byte, min(size, maxBytes))
	if _, err := f.ReadAt(b, size-int64(len(b))); err != nil && !errors.Is(err, io.EOF) {
		return err.Error()
	}
	return string(b)
}

// LogPath is the file of containerd's log, through all its restarts.
func (n *Node) LogPath() string { return n.Dir("containerd.log") }

// Repo is the root of the checkout.
func (n *Node) Repo() string { return n.opts.Repo }

// GuestDir is where the guest's kernel and image are.
func (n *Node) GuestDir() string { return n.opts.GuestDir }

// BinDir is Options.BinDir, or what stands for it.
func (n *Node) BinDir() string { return n.opts.BinDir }
