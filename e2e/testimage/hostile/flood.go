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
	device := findPort(name)
	var err error
	if device == "" {
		err = mux.ServeVsock(ctx, vsockPort)
	} else {
		err = mux.ServeDevice(ctx, name)
	}
	fmt.Println("hostile:", name, err)
	for frame != nil {
		sendRaw(device, vsockPort, frame)
		time.Sleep(100 * time.Millisecond)
	}
}

// sendRaw sends b again and again, by a port's device or to whoever connects.
func sendRaw(device string, vsockPort uint32, b []byte) {
	var w io.WriteCloser
	if device != "" {
		f, err := os.OpenFile(device, os.O_RDWR, 0)
		if err != nil {
			fmt.Println("hostile:", err)
			return
		}
		w = f
	} else {
		l, err := vsock.Listen(vsockPort, nil)
		if err != nil {
			fmt.Println("hostile:", err)
			return
		}
		defer l.Close()
		conn, err := l.Accept()
		if err != nil {
			return
		}
		w = conn
	}
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
