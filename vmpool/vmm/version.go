// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"
)

const (
	// versionLimit bounds how long a binary may take to tell its version.
	versionLimit = 5 * time.Second
	// versionBytes bounds what it may print, as somebody may have named the wrong one.
	versionBytes = 64 << 10
)

// Version is what a binary prints when it is run with one argument, at most 64 KiB within 5 s.
// The error names the binary and the argument.
func Version(ctx context.Context, binary, argument string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, versionLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, argument)
	cmd.WaitDelay = time.Second
	var out, errOut bounded
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	switch {
	case out.full || errOut.full:
		err = fmt.Errorf("it prints more than %d bytes", versionBytes)
	case ctx.Err() != nil:
		err = fmt.Errorf("no answer within %v: %w", versionLimit, ctx.Err())
	}
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", binary, argument, err)
	}
	return out.buf.String(), nil
}

// bounded refuses what is more than versionBytes, which ends whoever writes it.
type bounded struct {
	buf  bytes.Buffer // not embedded: its ReadFrom has no bound
	full bool
}

// Write implements io.Writer.
func (b *bounded) Write(p []byte) (int, error) {
	if b.buf.Len()+len(p) > versionBytes {
		b.full = true
		return 0, errors.New("too much")
	}
	return b.buf.Write(p)
}
