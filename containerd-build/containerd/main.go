// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Command containerd is upstream's containerd with the cloudhv sandbox
// controller compiled in.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/cmd/containerd/command"

	_ "github.com/containerd/containerd/v2/cmd/containerd/builtins"

	_ "github.com/cloudhv/containerd-cloudhv/plugin"
)

func main() {
	ctx := context.Background()
	if err := command.App().Run(ctx, os.Args); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "containerd:", err)
		os.Exit(1)
	}
}
