// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bytes"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestAbsentAgentIsNamed(t *testing.T) {
	dir := t.TempDir()
	var stdout, stderr bytes.Buffer
	agent := filepath.Join(dir, "agent")
	err := run([]string{"-agent", agent, "-o", filepath.Join(dir, "image")}, &stdout, &stderr)
	require.ErrorContains(t, err, "there is no guest agent at "+agent)
	assert.Empty(t, stdout.String())
}

func TestUnexpectedArgument(t *testing.T) {
	var stdout, stderr bytes.Buffer
	require.ErrorContains(t, run([]string{"extra"}, &stdout, &stderr), `"extra"`)
}
