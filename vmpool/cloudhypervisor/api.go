// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmproc"
)

// maxAnswer bounds an answer of the hypervisor's, in bytes.
const maxAnswer = 4 << 20

// apiError is the hypervisor's answer to a request that failed.
type apiError struct {
	Command string
	Status  string
	Code    int
	// Messages are its own words, from the failure down to its cause.
	Messages []string
}

// Error is the hypervisor's own text.
func (e *apiError) Error() string {
	if len(e.Messages) == 0 {
		return fmt.Sprintf("cloud-hypervisor: %s: %s", e.Command, e.Status)
	}
	return fmt.Sprintf("cloud-hypervisor: %s: %s (%s)", e.Command, strings.Join(e.Messages, ": "), e.Status)
}

// Unwrap gives the status in containerd's terms.
func (e *apiError) Unwrap() error {
	switch e.Code {
	case http.StatusNotFound:
		return errdefs.ErrNotFound
	case http.StatusBadRequest:
		return errdefs.ErrInvalidArgument
	case http.StatusTooManyRequests:
		return errdefs.ErrResourceExhausted
	default:
		return errdefs.ErrUnknown
	}
}

// isAnswer tells whether the hypervisor has answered, with an error.
func isAnswer(err error) bool {
	var answer *apiError
	return errors.As(err, &answer)
}

// client calls the API at a unix socket, each time on a connection of its own: the
// hypervisor serves one after another, in the order in which they came. Its methods
// may be called concurrently.
type client struct{ path string }

// call sends args, unless that is nil, as the body of a request, with files passed
// along, and decodes the answer into result unless that is nil. ErrUnavailable means
// that the hypervisor has gone. If ctx ends first, it may do what was asked all the same.
func (c client) call(ctx context.Context, method, command string, args, result any, files ...*os.File) error {
	err := c.exchange(ctx, method, command, args, result, files)
	if err == nil || isAnswer(err) {
		return err
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return fmt.Errorf("cloud-hypervisor: %s: %w", command, err)
}

func (c client) exchange(ctx context.Context, method, command string, args, result any, files []*os.File) error {
	request, err := encode(method, command, args)
	if err != nil {
		return err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.path)
	if err != nil {
		return errors.Join(err, errdefs.ErrUnavailable)
	}
	defer conn.Close() //nolint:errcheck // nothing is buffered
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := vmproc.SendFiles(conn.(*net.UnixConn), request, files); err != nil {
		return errors.Join(err, errdefs.ErrUnavailable)
	}
	return decode(conn, command, result)
}

// encode makes a request.
func encode(method, command string, args any) ([]byte, error) {
	var body []byte
	if args != nil {
		var err error
		if body, err = json.Marshal(args); err != nil {
			return nil, err
		}
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s /api/v1/%s HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n", method, command)
	if body != nil {
		fmt.Fprintf(&b, "Content-Type: application/json\r\nContent-Length: %d\r\n", len(body))
	}
	b.WriteString("\r\n")
	b.Write(body)
	return b.Bytes(), nil
}

// decode reads the answer to a request.
func decode(from io.Reader, command string, result any) error {
	from = io.LimitReader(from, maxAnswer)
	answer, err := http.ReadResponse(bufio.NewReader(from), nil)
	if err != nil {
		return lost(err)
	}
	defer answer.Body.Close() //nolint:errcheck // only read
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		return lost(err)
	}
	if answer.StatusCode >= http.StatusMultipleChoices {
		failure := &apiError{Command: command, Status: answer.Status, Code: answer.StatusCode}
		if json.Unmarshal(body, &failure.Messages) != nil && len(body) > 0 {
			failure.Messages = []string{strings.ToValidUTF8(string(body[:min(len(body), 1<<10)]), "?")}
		}
		return failure
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(body, result); err != nil {
		return fmt.Errorf("unexpected answer: %w: %w", err, errdefs.ErrUnknown)
	}
	return nil
}

// lost tells a connection that ended from an answer that is none.
func lost(err error) error {
	var failed net.Error
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.As(err, &failed) {
		return fmt.Errorf("connection lost: %w", errors.Join(err, errdefs.ErrUnavailable))
	}
	return fmt.Errorf("unexpected answer: %w: %w", err, errdefs.ErrUnknown)
}
