// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"net/url"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// stream executes a command in the container as kubelet does, with streams that
// the caller serves, and returns when it has ended.
func (c *container) stream(opts remotecommand.StreamOptions, command ...string) error {
	c.t.Helper()
	return serve(testContext(c.t), c.execURL(opts, command...), opts)
}

// attach connects to the container's own process.
func (c *container) attach(opts remotecommand.StreamOptions) error {
	c.t.Helper()
	return serve(testContext(c.t), c.attachURL(opts), opts)
}

func (c *container) execURL(opts remotecommand.StreamOptions, command ...string) string {
	c.t.Helper()
	r, err := c.n.Runtime().Exec(testContext(c.t), &runtimeapi.ExecRequest{ContainerId: c.id, Cmd: command, Tty: opts.Tty,
		Stdin: opts.Stdin != nil, Stdout: opts.Stdout != nil, Stderr: opts.Stderr != nil})
	require.NoError(c.t, err)
	return r.GetUrl()
}

func (c *container) attachURL(opts remotecommand.StreamOptions) string {
	c.t.Helper()
	r, err := c.n.Runtime().Attach(testContext(c.t), &runtimeapi.AttachRequest{ContainerId: c.id, Tty: opts.Tty,
		Stdin: opts.Stdin != nil, Stdout: opts.Stdout != nil, Stderr: opts.Stderr != nil})
	require.NoError(c.t, err)
	return r.GetUrl()
}

// serve serves the streams of an exec or attach; it may be called from everywhere.
func serve(ctx context.Context, address string, opts remotecommand.StreamOptions) error {
	u, err := url.Parse(address)
	if err != nil {
		return err
	}
	e, err := remotecommand.NewSPDYExecutor(&rest.Config{}, "POST", u)
	if err != nil {
		return err
	}
	return e.StreamWithContext(ctx, opts)
}
