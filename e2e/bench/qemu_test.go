// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestOpenedByPath(t *testing.T) {
	t.Parallel()
	got := openedByPath([]string{
		"-name", "x", "-add-fd", "fd=8,set=8,opaque=/a/rootfs", "-add-fd", "fd=9,set=9,opaque=/a/scratch",
		"-blockdev", "driver=raw,node-name=root,file.filename=/dev/fdset/8", "-blockdev", "node-name=scratch,file.filename=/dev/fdset/9,x=y",
	})
	require.Equal(t, []string{
		"-name", "x",
		"-blockdev", "driver=raw,node-name=root,file.filename=/a/rootfs", "-blockdev", "node-name=scratch,file.filename=/a/scratch,x=y",
	}, got)
}
