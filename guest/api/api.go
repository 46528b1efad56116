// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package api holds what the host and the guest agree on beside the protobufs
// of guest/api/v1: ports, limits and the header of a stream.
package api

// Version is the version of this API. Host and agent refuse each other when
// theirs differ: both come from the same build.
const Version = 6

// VolumeRoot is where the agent mounts what the shim serves: each of the pod's volumes is
// an entry of it.
const VolumeRoot = "/run/volumes"

// DiskRoot is where the agent mounts file systems of disks: each is an entry of it, by the
// disk's serial.
const DiskRoot = "/run/disks"

// DiskFileSystems are those of disks that an agent mounts, and DiskMountOptions the options
// that it knows, beside being read-only.
var (
	DiskFileSystems  = []string{"ext4", "xfs", "erofs"}
	DiskMountOptions = []string{"noatime", "nodiratime", "relatime", "strictatime", "nosuid", "noexec", "sync", "discard"}
)

// Guest ports. A port is what a stream of the transport is dialled to: a vsock
// port, or the number in the preamble of a stream over virtio-serial.
const (
	// PortRPC serves the ttrpc services of guest/api/v1.
	PortRPC uint32 = 1024
	// PortStream carries stdio. A connection starts with a stream header.
	PortStream uint32 = 1025
	// PortForward carries connections to services of the pod, from ForwardRequest on.
	PortForward uint32 = 1026
)

// Limits that the agent keeps and the host may rely on.
const (
	// MaxSpecBytes bounds a spec or process in JSON.
	MaxSpecBytes = 1 << 20
	// MaxPids bounds the list that Pids answers.
	MaxPids = 32768
	// MaxIDBytes bounds container, exec and stream IDs.
	MaxIDBytes = 128
	// MaxForwards is how many connections to PortForward the host has open at a time.
	MaxForwards = 512
)

// StreamIDBytes is the length of a stream ID: lower-case hexadecimal digits,
// drawn at random by the shim. A connection to PortStream begins with the ID
// and a newline; the agent answers one byte, StreamAccepted, and then the bytes
// of the stream follow. An ID is good for one connection.
const (
	StreamIDBytes  = 32
	StreamAccepted = 'A'
)

// ForwardRequestBytes is the length of what a connection to PortForward begins with:
// the TCP port of a service in the pod, in network order. The agent connects to it on
// 127.0.0.1, or else on ::1, and answers one byte, one of those below. After
// ForwardAccepted the bytes of the connection follow, both ways, each with its own end;
// after any other answer the agent closes the connection.
const (
	ForwardRequestBytes = 2
	// ForwardAccepted: the service is connected.
	ForwardAccepted = 'A'
	// ForwardRefused: nobody listens on the port.
	ForwardRefused = 'R'
	// ForwardBusy: the agent has too many connections.
	ForwardBusy = 'B'
	// ForwardFailed: the service cannot be reached for another reason, which the agent
	// logs.
	ForwardFailed = 'F'
)
