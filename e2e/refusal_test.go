// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"bytes"
	"context"
	"flag"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestUnfit configures our plugin wrongly, in several ways at once: a runc pod
// runs all the same, and a pod for us gets every reason.
func TestUnfit(t *testing.T) {
	requireCloudHV(t)
	opts := nodeOptions("e2eunfit")
	opts.CloudHV = map[string]any{
		"vmm":            "no-such-hypervisor",
		"kernel":         "/no/such/vmlinux",
		"default_memory": "1KiB",
		"max_vcpus":      1,
		"default_vcpus":  3,
		"cache_dir":      "a/relative/path",
		// Of wrong types, with which containerd itself must not fail.
		"cgroup":         "perhaps",
		"kernel_params":  "no-list",
		"image":          []string{"a-list"},
		"timeouts":       5678,
		"rootfs_builder": []map[string]any{{"parallel": "many"}},
	}
	n, err := testnode.New(opts)
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testnode.Scale(time.Minute))
		defer cancel()
		require.NoError(t, n.Close(ctx))
	})
	ctx := testContext(t)
	require.NoError(t, n.Start(ctx), n.LogTail(4000))

	_, err = n.RunPod(ctx, n.PodConfig("ours"), testnode.CloudHV)
	require.Error(t, err)
	log, readErr := os.ReadFile(n.LogPath())
	require.NoError(t, readErr)
	for _, part := range []string{
		"no-such-hypervisor", "/no/such/vmlinux", "default_memory", "1KiB", "default_vcpus", "a/relative/path",
		"perhaps", "no-list", "a-list", "5678", "many",
	} {
		require.ErrorContains(t, err, part)
		require.Contains(t, string(log), part)
	}
	cfg := n.PodConfig("theirs")
	id, err := n.RunPod(ctx, cfg, testnode.RunC)
	require.NoError(t, err)
	require.NoError(t, n.StopPod(ctx, id))
	require.NoError(t, n.RemovePod(ctx, id))
}

// TestHostNetwork checks that a pod in the host's network is refused by us, as
// no machine can have it, with the reason; and leaves nothing.
func TestHostNetwork(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		n := node(t)
		before, err := settled(testContext(t), n)
		require.NoError(t, err)
		cfg := podConfig(t, func(cfg *runtimeapi.PodSandboxConfig) {
			cfg.Hostname = ""
			cfg.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
		})
		id, err := n.RunPod(testContext(t), cfg, h)
		if h == testnode.RunC {
			require.NoError(t, err)
			require.NoError(t, n.RemovePod(testContext(t), id))
			return
		}
		require.ErrorContains(t, err, "hostNetwork")
		require.NoError(t, n.RemoveAllPods(testContext(t)))
		require.NoError(t, n.AwaitCensus(testContext(t), before))
	})
}

// TestMounts checks what may be bind mounted: for us files and directories, and nothing
// that would be dropped in silence.
func TestMounts(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		dir := t.TempDir()
		file := filepath.Join(dir, "small file")
		require.NoError(t, os.WriteFile(file, []byte("carried over\n"), 0o640))
		require.NoError(t, os.Chown(file, 12, 34))
		p := newPod(t, h)

		cfg := idleConfig("file")
		cfg.Mounts = []*runtimeapi.Mount{{ContainerPath: "/etc/carried", HostPath: file, Readonly: true}, {ContainerPath: "/new/dir/carried", HostPath: file}}
		c := p.start(cfg)
		require.Equal(t, "carried over\ncarried over\n", c.sh("cat /etc/carried /new/dir/carried"))
		require.Equal(t, "640 12 34\n", c.sh("stat -c '%a %u %g' /etc/carried"))
		require.Equal(t, "refused\n", c.sh("echo x 2>/dev/null > /etc/carried || echo refused"))

		fifo, socket := filepath.Join(dir, "fifo"), filepath.Join(dir, "socket")
		require.NoError(t, unix.Mkfifo(fifo, 0o600))
		l, err := net.Listen("unix", socket)
		require.NoError(t, err)
		defer l.Close()
		for name, host := range map[string]string{"device": "/dev/null", "fifo": fifo, "socket": socket} {
			cfg := idleConfig(name)
			cfg.Mounts = []*runtimeapi.Mount{{ContainerPath: "/mnt/" + name, HostPath: host}}
			id, err := p.n.CreateContainer(testContext(t), p.id, p.cfg, cfg)
			if err == nil {
				err = p.n.StartContainer(testContext(t), id)
			}
			if h == testnode.RunC {
				require.NoError(t, err, name)
				continue
			}
			require.ErrorContains(t, err, "/mnt/"+name)
			require.ErrorContains(t, err, host)
		}
		c.exec("true")
	})
}

// TestConfigDefault compares what `containerd config default` shows of our plugin
// with a golden file.
func TestConfigDefault(t *testing.T) {
	requireCloudHV(t)
	out, err := exec.Command(filepath.Join(node(t).BinDir(), "containerd"), "config", "default").Output()
	require.NoError(t, err)
	var cfg struct {
		Plugins map[string]map[string]any `toml:"plugins"`
	}
	require.NoError(t, toml.Unmarshal(out, &cfg))
	section := cfg.Plugins["io.containerd.sandbox.controller.v1.cloudhv"]
	require.NotEmpty(t, section)
	var got bytes.Buffer
	enc := toml.NewEncoder(&got)
	enc.SetIndentTables(true)
	require.NoError(t, enc.Encode(section))
	const golden = "testdata/config-default.toml"
	if *update {
		require.NoError(t, os.MkdirAll("testdata", 0o755))
		require.NoError(t, os.WriteFile(golden, got.Bytes(), 0o644))
	}
	want, err := os.ReadFile(golden)
	require.NoError(t, err)
	require.Equal(t, string(want), got.String(), "-update writes it anew")
}

// TestUnknownHandler checks that a handler nobody has is refused as ever.
func TestUnknownHandler(t *testing.T) {
	n := node(t)
	_, err := n.RunPod(testContext(t), podConfig(t), "no-such-handler")
	require.ErrorContains(t, err, "no-such-handler")
	require.NoError(t, n.RemoveAllPods(testContext(t)))
}
