// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmproc

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// endless has bytes without end, so many at a time, and counts the reads.
type endless struct {
	most, reads int
}

func (e *endless) Read(p []byte) (int, error) {
	e.reads++
	return min(len(p), e.most), nil
}

// TestPaced reads what has no end, in large pieces and byte by byte, for a while: once the
// burst is over neither takes the reader much time.
func TestPaced(t *testing.T) {
	t.Parallel()
	for name, most := range map[string]int{"much": 16 << 10, "little": 1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			from := &endless{most: most}
			r, buf := Paced(from), make([]byte, 16<<10)
			var total int
			began := time.Now()
			for time.Since(began) < time.Second {
				n, err := r.Read(buf)
				require.NoError(t, err)
				total += n
			}
			// The scheduler may be late, and the clock goes on meanwhile.
			seconds := time.Since(began).Seconds() + 0.2
			assert.LessOrEqual(t, float64(from.reads), (paceBurst+seconds*pacePerSecond)/paceRead+1)
			assert.LessOrEqual(t, float64(total), paceBurst+seconds*pacePerSecond+float64(len(buf)))
			assert.GreaterOrEqual(t, from.reads, paceBurst/(16<<10)/2, "a burst goes through at once")
		})
	}
}

// What is usual is not held up, and nothing is lost.
func TestPacedPassesAll(t *testing.T) {
	t.Parallel()
	text := strings.Repeat("0123456789", 100_000)
	began := time.Now()
	got, err := io.ReadAll(Paced(bytes.NewReader([]byte(text))))
	require.NoError(t, err)
	require.Equal(t, text, string(got))
	assert.Less(t, time.Since(began), time.Second)
}
