// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package network

import (
	"bytes"
	"encoding/binary"
	"net"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The guest's end of the TAP and the outside see each other's frames, and the
// namespace's own stack answers nothing, though it has the same addresses.
func TestFramesPassBothWays(t *testing.T) {
	pod, outside := podNetwork(t)
	n, err := connect(t.Context(), t, pod.path)
	require.NoError(t, err)
	defer n.Close()
	tap := n.tap

	// In: an ARP request for the pod's address reaches the guest.
	packet := rawSocket(t, outside, "peer0")
	request := arpFrame(1, net.HardwareAddr{2, 9, 9, 9, 9, 9}, net.ParseIP("10.88.0.1"), net.ParseIP("10.88.0.5"))
	_, err = unix.Write(packet, request)
	require.NoError(t, err)
	require.Equal(t, request, readTAP(t, tap, func(f []byte) bool { return bytes.HasPrefix(f, request[:14]) })[:len(request)])

	// Out: what the guest answers reaches the outside; nobody else has answered.
	answer := arpFrame(2, net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.ParseIP("10.88.0.5"), net.ParseIP("10.88.0.1"))
	_, err = tap.Write(append(make([]byte, vnetHeader), answer...))
	require.NoError(t, err)
	got := readPacket(t, packet, func(f []byte) bool { return isARP(f) && f[21] == 2 })
	require.Equal(t, answer, got[:len(answer)], "the first answer is the guest's")
	require.NoError(t, unix.SetsockoptTimeval(packet, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200000}))
	buf := make([]byte, 2048)
	for {
		size, err := unix.Read(packet, buf)
		if err != nil {
			break
		}
		require.False(t, isARP(buf[:size]) && buf[21] == 2, "a second answer")
	}
}

// Frames with an odd payload and of full size pass unharmed.
func TestFramesOfFullSize(t *testing.T) {
	pod, outside := podNetwork(t)
	n, err := connect(t.Context(), t, pod.path)
	require.NoError(t, err)
	defer n.Close()
	packet := rawSocket(t, outside, "peer0")
	for _, size := range []int{46, 1001, 1450} {
		frame := append([]byte{2, 0, 0, 0, 0, 1, 2, 9, 9, 9, 9, 9, 0x88, 0xb5}, bytes.Repeat([]byte{byte(size)}, size)...)
		_, err = unix.Write(packet, frame)
		require.NoError(t, err)
		got := readTAP(t, n.tap, func(f []byte) bool { return bytes.HasPrefix(f, frame[:14]) })
		require.Equal(t, frame, got[:len(frame)])
	}
}
func htons(v uint16) uint16 { return v<<8 | v>>8 }

func rawSocket(t *testing.T, ns *netNS, name string) int {
	t.Helper()
	link, err := ns.LinkByName(name)
	require.NoError(t, err)
	var fd int
	require.NoError(t, inNetNS(ns.NsHandle, func() error {
		var err error
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		return err
	}))
	t.Cleanup(func() { _ = unix.Close(fd) })
	require.NoError(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: link.Attrs().Index}))
	require.NoError(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}))
	return fd
}

func readPacket(t *testing.T, fd int, want func([]byte) bool) []byte {
	t.Helper()
	for {
		buf := make([]byte, 4096)
		n, err := unix.Read(fd, buf)
		require.NoError(t, err)
		if want(buf[:n]) {
			return buf[:n]
		}
	}
}

// readTAP reads frames as a hypervisor does, without the header before them.
func readTAP(t *testing.T, tap *os.File, want func([]byte) bool) []byte {
	t.Helper()
	require.NoError(t, tap.SetReadDeadline(time.Now().Add(10*time.Second)))
	for {
		buf := make([]byte, 4096)
		n, err := tap.Read(buf)
		require.NoError(t, err)
		if f := buf[vnetHeader:n]; want(f) {
			return f
		}
	}
}

func isARP(f []byte) bool {
	return len(f) >= 42 && binary.BigEndian.Uint16(f[12:]) == unix.ETH_P_ARP
}

func arpFrame(op byte, mac net.HardwareAddr, from, to net.IP) []byte {
	f := append(bytes.Repeat([]byte{0xff}, 6), mac...)
	f = append(f, 0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, op)
	f = append(append(f, mac...), from.To4()...)
	return append(append(f, make([]byte, 6)...), to.To4()...)
}
