// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package api holds what the host and the guest agree on beside the protobufs
// of guest/api/v1: ports, limits and the header of a stream.
package api

// Version is the version of this API. Host and agent refuse each other when
// theirs differ: both come from the same build.
const Version = 2

// Guest ports. A port is what a stream of the transport is dialled to: a vsock
// port, or the number in the preamble of a stream over virtio-serial.
const (
	// PortRPC serves the ttrpc services of guest/api/v1.
	PortRPC uint32 = 1024
	// PortStream carries stdio. A connection starts with a stream header.
	PortStream uint32 = 1025
)

// Limits that the agent keeps and the host may rely on.
const (
	// MaxSpecBytes bounds a spec or process in JSON.
	MaxSpecBytes = 1 << 20
	// MaxFileBytes bounds one copied-in file.
	MaxFileBytes = 512 << 10
	// MaxFilesBytes bounds all copied-in files of one create.
	MaxFilesBytes = 2 << 20
	// MaxPids bounds the list that Pids answers.
	MaxPids = 32768
	// MaxIDBytes bounds container, exec and stream IDs.
	MaxIDBytes = 128
)

// StreamIDBytes is the length of a stream ID: lower-case hexadecimal digits,
// drawn at random by the shim. A connection to PortStream begins with the ID
// and a newline; the agent answers one byte, StreamAccepted, and then the bytes
// of the stream follow. An ID is good for one connection.
const (
	StreamIDBytes  = 32
	StreamAccepted = 'A'
)
