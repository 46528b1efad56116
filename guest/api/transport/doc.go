// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package transport carries streams between host and guest over one
// virtio-serial port: a handshake that finds its own start among stale bytes,
// then a yamux session whose streams each begin with the port they are for.
// Host and agent both import it, so it imports little.
package transport
