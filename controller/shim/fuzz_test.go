// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/genproto/googleapis/rpc/status"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// FuzzStats decodes any bytes as a guest's figures.
func FuzzStats(f *testing.F) {
	seed, err := proto.Marshal(&guestv1.StatsResponse{
		Memory: &guestv1.MemoryStats{Stat: map[string]uint64{"anon": 1, "": 2}},
		Io:     []*guestv1.IOStats{{}, {Major: 1}},
	})
	require.NoError(f, err)
	f.Add(seed)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		var in guestv1.StatsResponse
		if proto.Unmarshal(data, &in) != nil {
			return
		}
		m := metricsOf(&in)
		assert.LessOrEqual(t, len(m.Io.Usage), maxIODevices)
		out, err := proto.Marshal(m)
		require.NoError(t, err)
		assert.Less(t, len(out), 64<<10)
	})
}

// FuzzGuestError makes an error of any text and class harmless.
func FuzzGuestError(f *testing.F) {
	f.Add(int32(5), "not found")
	f.Add(int32(12), "\x1b[2J\xff\n"+strings.Repeat("ü", maxGuestText))
	f.Fuzz(func(t *testing.T, code int32, text string) {
		if code == 0 {
			return
		}
		err := guestError(grpcstatus.ErrorProto(&status.Status{Code: code, Message: text}))
		assert.False(t, errdefs.IsNotImplemented(err))
		got := err.Error()
		assert.LessOrEqual(t, len(got), maxGuestText*utf8.UTFMax)
		for _, r := range got {
			assert.True(t, unicode.IsPrint(r), "%q", r)
		}
	})
}

// FuzzExit tells any end of a process.
func FuzzExit(f *testing.F) {
	f.Add(uint32(0), int64(0), int64(0))
	f.Add(uint32(1<<31), int64(1<<62), int64(-1))
	f.Fuzz(func(t *testing.T, status uint32, sec, nsec int64) {
		p := &process{svc: &service{events: newPublisher(nil, "x"), calm: time.NewTimer(time.Hour)}, exited: make(chan struct{}), since: time.Now(), io: &processIO{}}
		p.task = &task{svc: p.svc, init: p}
		p.exit(status, time.Unix(sec, nsec), 0)
		info := p.info()
		assert.LessOrEqual(t, info.exitStatus, uint32(255))
		assert.False(t, info.exitedAt.Before(p.since) || info.exitedAt.After(time.Now()))
	})
}
