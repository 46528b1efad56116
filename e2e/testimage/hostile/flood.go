// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/mdlayher/vsock"

	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
)

// spin burns a processor.
func spin() {
	var sum [sha256.Size]byte
	for {
		sum = sha256.Sum256(sum[:])
	}
}

// console prints without end.
func console() {
	f, err := os.OpenFile("/dev/console", os.O_WRONLY, 0)
	if err != nil {
		return
	}
	flood(f)
}

// flood writes lines without end.
func flood(w io.Writer) {
	lines := bytes.Repeat([]byte(strings.Repeat("flood ", 20)+"\n"), 500)
	for {
		if _, err := w.Write(lines); err != nil {
			return
		}
	}
}

// listener hands on connections whose answers are repeated without end, in the mode that
// answers a million times.
type listener struct {
	net.Listener
	g *guest
}

func (l listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil || l.g.mode != "many" {
		return conn, err
	}
	return repeater{conn, l.g}, nil
}

type repeater struct {
	net.Conn
	g *guest
}

func (r repeater) Write(p []byte) (int, error) {
	n, err := r.Conn.Write(p)
	for err == nil && r.g.active() {
		_, err = r.Conn.Write(p)
	}
	return n, err
}

// port serves a way to the host until the guest misbehaves, if its mode is about that way,
// and then sends what the mode says instead. In other modes it is served for ever.
func (g *guest) port(ctx context.Context, mux *transport.Mux, name string, vsockPort uint32, which string) {
	frame := map[string][]byte{
		"noise-" + which: noise(),
		// A window update of the first stream.
		"idle-" + which: bytes.Repeat([]byte{0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0}, 1000),
		// Data for a stream that is not there.
		"stray-" + which: bytes.Repeat([]byte{0, 0, 0, 0, 0, 0, 0, 99, 0, 0, 0, 1, 'x', 0}, 1000),
	}[g.mode]
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if frame != nil {
		go func() {
			<-g.on
			cancel()
		}()
	}
	if device := findPort(name); device != "" {
		fmt.Println("hostile:", name, mux.ServeDevice(ctx, name))
		for frame != nil {
			if w, err := os.OpenFile(device, os.O_RDWR, 0); err == nil {
				sendRaw(w, frame)
			}
			time.Sleep(100 * time.Millisecond)
		}
		return
	}
	if frame == nil {
		fmt.Println("hostile:", name, mux.ServeVsock(ctx, vsockPort))
		return
	}
	l, err := vsock.ListenContextID(anyCID, vsockPort, nil)
	if err != nil {
		fmt.Println("hostile:", err)
		return
	}
	k := &keeper{Listener: l, g: g}
	fmt.Println("hostile:", name, mux.ServeListener(ctx, k))
	if conn := k.last.Load(); conn != nil {
		_ = conn.SetDeadline(time.Time{})
		sendRaw(conn, frame)
	}
}

// anyCID is VMADDR_CID_ANY.
const anyCID = 0xffffffff

// keeper keeps the connection that it has accepted last, once the guest misbehaves: what is
// sent instead comes by the host's own connection, as it does by a port's device.
type keeper struct {
	net.Listener
	g    *guest
	last atomic.Pointer[kept]
}

func (k *keeper) Accept() (net.Conn, error) {
	conn, err := k.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &kept{conn, k.g}
	k.last.Store(c)
	return c, nil
}

type kept struct {
	net.Conn
	g *guest
}

// Close ends the calls that are under way, and not the connection if the guest misbehaves.
func (c *kept) Close() error {
	if c.g.active() {
		return c.SetDeadline(time.Unix(1, 0))
	}
	return c.Conn.Close()
}

// sendRaw sends b again and again.
func sendRaw(w io.WriteCloser, b []byte) {
	defer w.Close()
	for {
		if _, err := w.Write(b); err != nil {
			return
		}
	}
}

// findPort is the device of a virtio-serial port; empty if there is none.
func findPort(name string) string {
	ports, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
	for _, p := range ports {
		if b, err := os.ReadFile(p); err == nil && strings.TrimSpace(string(b)) == name {
			return filepath.Join("/dev", filepath.Base(filepath.Dir(p)))
		}
	}
	return ""
}

func noise() []byte {
	b := make([]byte, 64<<10)
	for i := range b {
		b[i] = byte(rand.N(256))
	}
	return b
}
