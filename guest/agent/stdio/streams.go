// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package stdio joins the input and output of processes in the VM to streams of
// the host, a stream each, with back-pressure from end to end.
package stdio

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/accept"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
)

const (
	// maxUnclaimed bounds the streams that no process has taken yet.
	maxUnclaimed = 1024
	// headerLimit is how long a connection may take to say which stream it is.
	headerLimit = 10 * time.Second
	// claimLimit is how long a stream may wait for its process.
	claimLimit = 2 * time.Minute
)

// Streams are the connections to api.PortStream that await their process.
type Streams struct {
	mu sync.Mutex
	// byID has the unclaimed streams and those in use, for an ID is good once.
	byID map[string]*stream
	// pending counts connections without a header yet, and unclaimed streams.
	pending int
	// header and claim are headerLimit and claimLimit; tests shorten them.
	header, claim time.Duration
}

// NewStreams returns an empty table.
func NewStreams() *Streams {
	return &Streams{byID: make(map[string]*stream), header: headerLimit, claim: claimLimit}
}

// stream is one connection with an ID.
type stream struct {
	net.Conn
	id      string
	owner   *Streams
	claimed bool
	expiry  *time.Timer
	once    sync.Once
}

// Close ends the connection and frees its ID.
func (s *stream) Close() error {
	s.once.Do(func() {
		s.owner.mu.Lock()
		defer s.owner.mu.Unlock()
		delete(s.owner.byID, s.id)
		if !s.claimed {
			s.owner.pending--
		}
	})
	return s.Conn.Close()
}

// Serve accepts streams until the listener is closed or ctx ends.
func (s *Streams) Serve(ctx context.Context, l net.Listener) error {
	return accept.Each(ctx, l, "a stream", func(conn net.Conn) {
		if !s.reserve() {
			log.G(ctx).Warn("too many unclaimed streams: one was refused")
			_ = conn.Close()
			return
		}
		go func() {
			if err := s.admit(conn); err != nil {
				log.G(ctx).WithError(err).Warn("stream refused")
				_ = conn.Close()
			}
		}()
	})
}

func (s *Streams) reserve() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pending >= maxUnclaimed {
		return false
	}
	s.pending++
	return true
}

// admit reads the header, enters the stream and answers. On an error the
// connection is the caller's to close, and the reservation is given back.
func (s *Streams) admit(conn net.Conn) error {
	id, err := s.readHeader(conn)
	if err != nil {
		s.release()
		return err
	}
	st := &stream{Conn: conn, id: id, owner: s}
	s.mu.Lock()
	if _, used := s.byID[id]; used {
		s.pending--
		s.mu.Unlock()
		return fmt.Errorf("stream %s is in use: %w", id, errdefs.ErrAlreadyExists)
	}
	s.byID[id] = st
	st.expiry = time.AfterFunc(s.claim, func() { s.expire(st) })
	s.mu.Unlock()
	// Only now: who has read the answer may name the stream in a request.
	if _, err := conn.Write([]byte{api.StreamAccepted}); err != nil {
		_ = st.Close()
		return fmt.Errorf("answer stream %s: %w", id, err)
	}
	return nil
}

func (s *Streams) release() {
	s.mu.Lock()
	s.pending--
	s.mu.Unlock()
}

func (s *Streams) expire(st *stream) {
	s.mu.Lock()
	claimed := st.claimed
	s.mu.Unlock()
	if !claimed {
		_ = st.Close()
	}
}

func (s *Streams) readHeader(conn net.Conn) (string, error) {
	if err := conn.SetReadDeadline(time.Now().Add(s.header)); err != nil {
		return "", fmt.Errorf("limit a stream's header: %w", err)
	}
	var h [api.StreamIDBytes + 1]byte
	if _, err := io.ReadFull(conn, h[:]); err != nil {
		return "", fmt.Errorf("read a stream's header: %w", err)
	}
	id, err := parseHeader(h[:])
	if err != nil {
		return "", err
	}
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return "", fmt.Errorf("lift the limit of stream %s: %w", id, err)
	}
	return id, nil
}

// parseHeader returns the stream ID of a header: its digits and a newline.
func parseHeader(h []byte) (string, error) {
	if len(h) != api.StreamIDBytes+1 || h[api.StreamIDBytes] != '\n' || !ValidID(string(h[:api.StreamIDBytes])) {
		return "", fmt.Errorf("stream header: want %d hexadecimal digits and a newline: %w", api.StreamIDBytes, errdefs.ErrInvalidArgument)
	}
	return string(h[:api.StreamIDBytes]), nil
}

// ValidID says whether id is a stream ID.
func ValidID(id string) bool {
	if len(id) != api.StreamIDBytes {
		return false
	}
	for _, c := range []byte(id) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// take hands a waiting stream to its process. The caller closes it.
func (s *Streams) take(id string) (*stream, error) {
	if !ValidID(id) {
		return nil, fmt.Errorf("stream ID: want %d hexadecimal digits: %w", api.StreamIDBytes, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.byID[id]
	if st == nil {
		return nil, fmt.Errorf("stream %s is not open: %w", id, errdefs.ErrNotFound)
	}
	if st.claimed {
		return nil, fmt.Errorf("stream %s is in use: %w", id, errdefs.ErrAlreadyExists)
	}
	st.claimed = true
	st.expiry.Stop()
	s.pending--
	return st, nil
}

// Take hands a waiting stream to whoever uses it for something else than a process's
// input or output, and closes it.
func (s *Streams) Take(id string) (net.Conn, error) {
	st, err := s.take(id)
	if err != nil {
		return nil, err
	}
	return st, nil
}
