// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/controller/network"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	etcHosts      = "/etc/hosts"
	etcResolvConf = "/etc/resolv.conf"
	// maxHostFile bounds a file of the host that is copied into the guest, in bytes.
	maxHostFile = 256 << 10
	// entropyBytes go from the host's generator into the guest's.
	entropyBytes = 256
)

// checkPod refuses what a pod in a virtual machine cannot have.
func checkPod(pc *runtime.PodSandboxConfig) error {
	if pc.GetWindows() != nil {
		return fmt.Errorf("windows: this runtime runs linux pods: %w", errdefs.ErrInvalidArgument)
	}
	const where = "linux.security_context.namespace_options."
	o := pc.GetLinux().GetSecurityContext().GetNamespaceOptions()
	var errs []error
	refuse := func(field, why string) {
		errs = append(errs, fmt.Errorf("%s%s: %s: %w", where, field, why, errdefs.ErrInvalidArgument))
	}
	if o.GetNetwork() == runtime.NamespaceMode_NODE {
		refuse("network = NODE", "a pod in a virtual machine has a network of its own and cannot use the host's (hostNetwork)")
	}
	if o.GetPid() == runtime.NamespaceMode_NODE {
		refuse("pid = NODE", "a pod in a virtual machine cannot see the host's processes (hostPID)")
	}
	if o.GetIpc() == runtime.NamespaceMode_NODE {
		refuse("ipc = NODE", "a pod in a virtual machine cannot share the host's IPC (hostIPC)")
	}
	// The guest would refuse them too, when there is one.
	for _, name := range slices.Sorted(maps.Keys(pc.GetLinux().GetSysctls())) {
		if _, err := api.SysctlPath(name); err != nil {
			errs = append(errs, fmt.Errorf("linux.sysctls: %w", err))
		}
	}
	return errors.Join(errs...)
}

// podFiles makes what CRI makes for its own pods: user namespace, hostname, hosts,
// resolv.conf, sysctls.
func (c *Controller) podFiles(pc *runtime.PodSandboxConfig) (*startConfig, error) {
	s := &startConfig{hostname: pc.GetHostname(), sysctls: maps.Clone(pc.GetLinux().GetSysctls())}
	var err error
	if s.userns, err = userNamespace(pc); err != nil {
		return nil, err
	}
	if s.hostname == "" {
		if s.hostname, err = os.Hostname(); err != nil {
			return nil, fmt.Errorf("get hostname: %w: %w", err, errdefs.ErrInternal)
		}
	}
	if s.hosts, err = readHostFile(etcHosts); err != nil {
		return nil, err
	}
	if dns := pc.GetDnsConfig(); dns != nil {
		s.resolvConf = resolvConf(dns)
	} else if s.resolvConf, err = readHostFile(etcResolvConf); err != nil {
		return nil, err
	}
	if s.sysctls == nil {
		s.sysctls = map[string]string{}
	}
	if c.cfg.UnprivilegedPorts {
		setDefault(s.sysctls, "net.ipv4.ip_unprivileged_port_start", "0")
	}
	// Of the groups of a user namespace not so many are there. CRI leaves it out for them too.
	if c.cfg.UnprivilegedICMP && s.userns == nil {
		setDefault(s.sysctls, "net.ipv4.ping_group_range", "0 2147483647")
	}
	return s, nil
}

func setDefault(m map[string]string, key, value string) {
	if _, ok := m[key]; !ok {
		m[key] = value
	}
}

// resolvConf writes a pod's DNS configuration as CRI does.
func resolvConf(dns *runtime.DNSConfig) []byte {
	var b strings.Builder
	if len(dns.GetSearches()) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(dns.GetSearches(), " "))
	}
	if len(dns.GetServers()) > 0 {
		fmt.Fprintf(&b, "nameserver %s\n", strings.Join(dns.GetServers(), "\nnameserver "))
	}
	if len(dns.GetOptions()) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(dns.GetOptions(), " "))
	}
	return []byte(b.String())
}

// readHostFile reads a small file of the host; one that is missing is empty.
func readHostFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the host's %s: %w: %w", name, err, errdefs.ErrInternal)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxHostFile+1))
	if err != nil {
		return nil, fmt.Errorf("read the host's %s: %w: %w", name, err, errdefs.ErrInternal)
	}
	if len(data) > maxHostFile {
		return nil, fmt.Errorf("the host's %s is larger than %d bytes: %w", name, maxHostFile, errdefs.ErrFailedPrecondition)
	}
	return data, nil
}

// configureRequest says to the agent what makes its VM this pod's.
func configureRequest(rec *record, s *startConfig, n *network.Network) (*guestv1.ConfigureRequest, error) {
	entropy := make([]byte, entropyBytes)
	if _, err := rand.Read(entropy); err != nil {
		return nil, fmt.Errorf("read random bytes: %w", err)
	}
	return &guestv1.ConfigureRequest{
		PodId:       rec.ID,
		Hostname:    s.hostname,
		Hosts:       s.hosts,
		ResolvConf:  s.resolvConf,
		Clock:       timestamppb.Now(),
		Entropy:     entropy,
		BuiltInMac:  vmm.BuiltInMAC,
		Interfaces:  n.Interfaces,
		Routes:      n.Routes,
		Rules:       n.Rules,
		Sysctls:     s.sysctls,
		Vcpus:       uint32(rec.Size.VCPUs),
		MemoryBytes: uint64(rec.Size.MemoryBytes),
		MachineId:   machineID(rec.ID),

		UserNamespace: s.userns,
	}, nil
}

// machineID is the pod's: 32 hexadecimal digits, the same at every asking.
func machineID(id string) string {
	sum := sha256.Sum256([]byte("cloudhv machine-id " + id))
	return hex.EncodeToString(sum[:16])
}

// leafName is what a VMM's cgroup is called.
func leafName(id string) string { return "cloudhv-" + id }

// cgroupPath is a VMM's cgroup: below the pod's own, which kubelet made and
// limited, or else below ours. A systemd slice's name says its parents.
func cgroupPath(ours, parent, id string) string {
	leaf := leafName(id)
	if parent == "" {
		return path.Join("/", ours, leaf)
	}
	base := path.Base(parent)
	name, isSlice := strings.CutSuffix(base, ".slice")
	if !isSlice || path.Dir(parent) != "." && path.Dir(parent) != "/" {
		return path.Join("/", parent, leaf)
	}
	full := "/"
	for i, r := range name {
		if r == '-' && i > 0 {
			full = path.Join(full, name[:i]+".slice")
		}
	}
	return path.Join(full, base, leaf)
}
