// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package transport carries streams between host and guest over one
// virtio-serial port, or over one vsock connection: a handshake that finds its own start among stale bytes,
// then a yamux session whose streams each begin with the port they are for.
// Host and agent both import it, so it imports little.
//
// # Host
//
// Open makes a Client for an endpoint, Client.Dial a connection to a port of
// the guest. A virtio-serial port has one client at a time: a second one waits
// until the first has gone.
//
// # Guest
//
// A Mux hands out a net.Listener for each port. Mux.ServeDevice finds a
// virtio-serial port by its name, waits for a host, serves its session and
// waits for the next one, until its context ends. Mux.ServeVsock does the same on a
// vsock port.
//
// # Connections
//
// A connection behaves like TCP's: CloseWrite ends one direction, and what was
// written before it arrives whole however late the peer reads; Close ends both,
// and a peer that goes on writing gets ECONNRESET; Reset tells a peer that does not
// write either. When the session is lost,
// reads (after what had arrived) and writes fail with an error that is
// errdefs.ErrUnavailable; io.EOF is only ever the peer's own end of stream.
//
// A connection that the host has closed stays until the guest ends it too. The
// guest may do so late, but not without bounds, as each one costs the host memory:
// of more than maxLingering the host resets the oldest. A guest that then leaves a
// reset unanswered for half a minute, or that sends more than a window after one,
// is no agent of ours, and the host ends the session with it. Frames that bring nothing,
// such as window updates and data for no stream, the host reads slowly when there are too
// many of them; WithReader lets it read all that a guest sends no faster than it means to.
// The guest trusts its host and sets no such limits.
//
// # On the wire
//
// On vsock the host first connects by the VMM's unix socket: "CONNECT port", a newline,
// and the answer "OK", a number and a newline. A VMM that goes away closes that socket as
// a guest would that ends a connection, which is why streams have a session of their own
// there too: io.EOF keeps its meaning.
//
// The host begins with a preamble: padding of 0xFF longer than any frame, 8
// bytes of magic and a nonce of 16 bytes. A guest that is still in a session of
// a host that vanished finds at most one torn frame, which the padding completes
// wrongly, or a header that cannot be one, and ends that session. A guest without a
// session skips what is not magic. It answers with magic and nonce, and the
// host skips what comes before these. Without an answer the host connects anew
// with another nonce.
//
// After that both sides speak yamux, host as client, without keep-alive. Each
// side checks each frame before yamux sees it: a frame is there as a whole, with
// a zero byte after it, none is longer than maxFrame, the guest opens no streams
// and nobody pings. A stream begins with
// four bytes, the port in network order, and the guest answers one byte, 0 if
// somebody listens there. A side that closed a stream and still gets data for it
// sends one frame with the reset flag, which the other side answers with the same.
package transport
