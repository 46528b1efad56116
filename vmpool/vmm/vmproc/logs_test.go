// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmproc

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestWhyReset(t *testing.T) {
	t.Parallel()
	tests := map[string]string{
		"":            "guest rebooted",
		"bye\n":       "guest rebooted",
		"[    1.0] x": "guest rebooted",
		"[    1.0] Kernel panic - not syncing: VFS: no root\r\n[ 1.1] CPU: 0": `guest kernel panic: "VFS: no root"`,
		"Kernel panic - not syncing: ":                                        "guest kernel panic",
	}
	for console, want := range tests {
		assert.Equal(t, want, WhyReset(console))
	}
}
