// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// plugArgs give a VM room for what is plugged later, and a socket to do it by.
func plugArgs(dir string) []string {
	return []string{
		"-qmp", "unix:" + filepath.Join(dir, "qmp") + ",server=on,wait=off",
		"-device", "pcie-root-port,id=rp0,chassis=1,slot=1",
		"-object", "memory-backend-ram,id=more,size=1G,reserve=off",
		"-device", "virtio-mem-pci,id=mem0,memdev=more,requested-size=0",
	}
}

// monitor runs QMP commands.
func (v *vm) monitor(commands ...string) {
	conn, err := net.Dial("unix", filepath.Join(v.dir, "qmp"))
	require.NoError(v.t, err)
	defer conn.Close()
	dec := json.NewDecoder(conn)
	var answer map[string]json.RawMessage
	require.NoError(v.t, dec.Decode(&answer))
	for _, c := range append([]string{`{"execute":"qmp_capabilities"}`}, commands...) {
		_, err := conn.Write([]byte(c + "\n"))
		require.NoError(v.t, err)
		for {
			answer = nil
			require.NoError(v.t, dec.Decode(&answer))
			require.NotContains(v.t, answer, "error", "%s: %s", c, answer["error"])
			if _, ok := answer["return"]; ok {
				break
			}
		}
	}
}

// hotPlug asks for a disk and for memory before the VMM has given them.
func (v *vm) hotPlug(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(v.dir, "busybox.erofs"))
	require.NoError(t, err)
	hot := filepath.Join(v.dir, "hot.erofs")
	require.NoError(t, os.WriteFile(hot, b, 0o600))
	began := time.Now()
	time.AfterFunc(300*time.Millisecond, func() {
		v.monitor(
			`{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"hot","read-only":true,"file":{"driver":"file","filename":"`+hot+`"}}}`,
			`{"execute":"device_add","arguments":{"driver":"virtio-blk-pci","id":"hot0","drive":"hot","serial":"hot-image","bus":"rp0"}}`)
	})
	out, st := v.run("hot", "echo here", func(r *guestv1.CreateRequest) { r.Rootfs.ImageSerial = "hot-image" })
	require.EqualValues(t, 0, st)
	require.Equal(t, "here\n", out)
	t.Logf("disk plugged after 300ms, container done after %v", time.Since(began).Round(time.Millisecond))

	for _, size := range []uint64{768 << 20, 256 << 20} {
		began := time.Now()
		more := size - 256<<20
		raw, err := json.Marshal(map[string]any{"execute": "qom-set", "arguments": map[string]any{
			"path": "/machine/peripheral/mem0", "property": "requested-size", "value": more,
		}})
		require.NoError(t, err)
		go v.monitor(string(raw))
		r, err := v.machine.Resize(v.ctx(), &guestv1.ResizeRequest{MemoryBytes: size})
		require.NoError(t, err)
		require.InDelta(t, size, r.GetMemoryTotalBytes(), 40<<20)
		t.Logf("%d MiB after %v", size>>20, time.Since(began).Round(time.Millisecond))
	}
}
