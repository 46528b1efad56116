// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package pattern

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrTooLarge is what Probe returns for a packet that the way does not carry.
var ErrTooLarge = errors.New("too large for the way")

// headers are the bytes of a datagram that are not its own, with IPv4 and IPv6.
func headers(ip net.IP) int {
	if ip.To4() != nil {
		return 20 + 8
	}
	return 40 + 8
}

// whole keeps a socket from making fragments.
func whole(network, _ string, c syscall.RawConn) error {
	var err error
	controlErr := c.Control(func(fd uintptr) {
		if network == "udp6" {
			err = errors.Join(unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO),
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1))
		} else {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		}
	})
	return errors.Join(controlErr, err)
}

// Probe sends a server of Echo an unfragmented IP packet of so many bytes, and waits
// for the answer, of the same size. A lost one is sent again for a while.
func Probe(addr string, size int, limit time.Duration) error {
	to, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return err
	}
	network := "udp4"
	if to.IP.To4() == nil {
		network = "udp6"
	}
	conn, err := (&net.Dialer{Control: whole}).Dial(network, addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	payload := make([]byte, size-headers(to.IP))
	if _, err := io.ReadFull(New(1, int64(len(payload))), payload); err != nil {
		return err
	}
	answer := make([]byte, 1<<16)
	for end := time.Now().Add(limit); time.Now().Before(end); {
		if _, err := conn.Write(payload); errors.Is(err, unix.EMSGSIZE) {
			return ErrTooLarge
		} else if err != nil {
			return err
		}
		if err := conn.SetReadDeadline(time.Now().Add(limit / 5)); err != nil {
			return err
		}
		switch n, err := conn.Read(answer); {
		case err == nil && bytes.Equal(answer[:n], payload):
			return nil
		case err == nil:
			return fmt.Errorf("sent %d bytes, and got %d others", len(payload), n)
		case errors.Is(err, unix.EMSGSIZE):
			return ErrTooLarge
		}
	}
	return fmt.Errorf("no answer to %d bytes within %s", size, limit)
}

// Echo answers each datagram with itself, unfragmented.
func Echo(conn net.PacketConn) error {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return err
		}
		// One that does not go through gets no answer.
		_, _ = conn.WriteTo(buf[:n], from)
	}
}

// ListenEcho is a socket for Echo.
func ListenEcho(network, addr string) (net.PacketConn, error) {
	return (&net.ListenConfig{Control: whole}).ListenPacket(context.Background(), network, addr)
}
