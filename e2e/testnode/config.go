// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"

	"github.com/pelletier/go-toml/v2"
)

// PauseRef is the sandbox image of runc's pods; the node makes it itself.
const PauseRef = "localhost/chv/pause:latest"

// annotationPrefixes are passed from pods and containers to the handler.
var annotationPrefixes = []string{"io.cloudhv.*", "io.katacontainers.*"}

// table is a TOML table.
type table = map[string]any

// ConfigPath is the node's containerd configuration.
func (n *Node) ConfigPath() string { return n.Dir("config.toml") }

// writeConfig writes containerd's configuration. Everything that a second
// containerd would otherwise share with the first is set here.
func (n *Node) writeConfig() error {
	cfg := table{
		"version": 4,
		"root":    n.Dir("root"),
		"state":   n.Dir("state"),
		"temp":    n.Dir("tmp"),
		"imports": []string{},
		"plugins": n.pluginConfig(),
	}
	if n.opts.Debug {
		cfg["debug"] = table{"level": "debug"}
	}
	b, err := toml.Marshal(cfg)
	if err != nil {
		return fmt.Errorf("writing the configuration: %w", err)
	}
	if err := os.WriteFile(n.ConfigPath(), b, 0o644); err != nil {
		return err
	}
	// crictl insists on a configuration of its own, whatever its flags say.
	return os.WriteFile(n.crictlConfig(), []byte("runtime-endpoint: "+n.Endpoint()+"\n"), 0o644)
}

// writeMirrors writes the files by which containerd finds Options.Mirrors.
func (n *Node) writeMirrors() error {
	for host, url := range n.opts.Mirrors {
		b, err := toml.Marshal(table{"server": url, "host": table{url: table{"capabilities": []string{"pull", "resolve"}}}})
		if err != nil {
			return err
		}
		if err := os.MkdirAll(n.Dir("hosts", host), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(n.Dir("hosts", host, "hosts.toml"), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) crictlConfig() string { return n.Dir("crictl.yaml") }

func (n *Node) pluginConfig() table {
	return table{
		"io.containerd.cri.v1.images": n.imageConfig(),
		"io.containerd.cri.v1.runtime": table{
			"restrict_oom_score_adj":       true,
			"netns_mounts_under_state_dir": true,
			"cdi_spec_dirs":                []string{n.CDIDir()},
			"cni": table{
				"bin_dirs":              []string{n.opts.CNIBinDir, n.CNIBinDir()},
				"conf_dir":              n.Dir("cni", "conf"),
				"use_internal_loopback": true,
			},
			"containerd": table{
				"default_runtime_name": RunC,
				"runtimes":             n.runtimes(),
			},
		},
		"io.containerd.grpc.v1.cri":                      table{"stream_server_address": "127.0.0.1", "stream_server_port": "0"},
		"io.containerd.image-verifier.v1.bindir":         table{"bin_dir": n.Dir("opt", "verifier")},
		"io.containerd.internal.v1.opt":                  table{"path": n.Dir("opt")},
		"io.containerd.nri.v1.nri":                       table{"disable": !n.opts.NRI, "socket_path": n.NRISocket(), "plugin_path": n.Dir("nri"), "plugin_config_path": n.Dir("nri")},
		"io.containerd.server.v1.debug":                  table{"address": n.Dir("debug.sock")},
		"io.containerd.server.v1.metrics":                table{"address": n.opts.Metrics},
		"io.containerd.server.v1.grpc":                   table{"address": n.Dir("c.sock")},
		"io.containerd.server.v1.ttrpc":                  table{"address": n.Dir("c.sock.ttrpc")},
		"io.containerd.shim.v1.manager":                  table{"socket_dir": n.Dir("s")},
		"io.containerd.sandbox.controller.v1." + CloudHV: n.controllerConfig(),
	}
}

func (n *Node) imageConfig() table {
	c := table{
		"snapshotter":   "overlayfs",
		"pinned_images": table{"sandbox": PauseRef},
	}
	// Without mirrors of the node's own the host's count.
	if len(n.opts.Mirrors) > 0 {
		c["registry"] = table{"config_path": n.Dir("hosts")}
	}
	return c
}

// runtimes is the runtime table: both handlers, and both once more for each network.
func (n *Node) runtimes() table {
	all := table{RunC: n.runcConfig(), CloudHV: cloudhvRuntime()}
	for _, net := range n.opts.Networks {
		for _, h := range []string{RunC, CloudHV} {
			c := maps.Clone(all[h].(table))
			c["cni_conf_dir"], c["cni_max_conf_num"] = n.confDir(net), len(net.Chains)
			all[net.Handler(h)] = c
		}
	}
	return all
}

// runcConfig is runc's entry in the runtime table.
func (n *Node) runcConfig() table {
	return table{
		"runtime_type": "io.containerd.runc.v2",
		"sandboxer":    "podsandbox",
		"options":      table{"BinaryName": "runc", "Root": n.Dir("state", "runc")},
	}
}

// cloudhvRuntime is our handler's entry, as users write it.
func cloudhvRuntime() table {
	return table{
		"runtime_type":                    "io.containerd.cloudhv.v1",
		"sandboxer":                       CloudHV,
		"disable_pause_image_pull":        true,
		"privileged_without_host_devices": true,
		"privileged_without_host_devices_all_devices_allowed": true,
		"pod_annotations":       annotationPrefixes,
		"container_annotations": annotationPrefixes,
	}
}

// hypervisor is what the environment's E2E_VMM and CLOUD_HYPERVISOR choose for all
// nodes: the driver, and the program of one that is not in PATH.
func hypervisor() table {
	c := table{}
	if v := os.Getenv("E2E_VMM"); v != "" {
		c["vmm"] = v
	}
	if v := os.Getenv("CLOUD_HYPERVISOR"); v != "" && c["vmm"] == "cloudhypervisor" {
		c["cloud_hypervisor_binary"] = v
	}
	return c
}

// controllerConfig is the plugin's own section.
func (n *Node) controllerConfig() table {
	c := table{
		"kernel":    filepath.Join(n.opts.GuestDir, "vmlinux"),
		"image":     filepath.Join(n.opts.GuestDir, "rootfs.erofs"),
		"state_dir": n.StateDir(),
		"cache_dir": n.CacheDir(),
		// Where it is found and removed with the node.
		"cgroup_parent": n.CgroupParent(),
	}
	if n.opts.Debug {
		c["debug"] = true
	}
	maps.Copy(c, hypervisor())
	maps.Copy(c, n.opts.CloudHV)
	return c
}
