// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/urfave/cli/v3"

	"github.com/cloudhv/containerd-cloudhv/controller/ctlapi"
	ctlv1 "github.com/cloudhv/containerd-cloudhv/controller/ctlapi/v1"
)

// console prints a guest's console log.
func console(ctx context.Context, cmd *cli.Command, c *ctlapi.Client) error {
	if cmd.Int("tail") < 0 {
		return usageError("--tail %d: want at least 0", cmd.Int("tail"))
	}
	req := &ctlv1.ConsoleRequest{Id: cmd.Args().First(), TailBytes: int64(cmd.Int("tail"))}
	w := cmd.Root().Writer
	if cmd.String("output") != formatJSON {
		if cmd.Bool("raw") {
			_, _, err := c.CopyConsole(ctx, w, req)
			return err
		}
		out := &cleaner{w: w}
		if _, _, err := c.CopyConsole(ctx, out, req); err != nil {
			return err
		}
		return out.Close()
	}
	var text strings.Builder
	out := &cleaner{w: &text}
	vm, pod, err := c.CopyConsole(ctx, out, req)
	if err != nil {
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	return show(cmd, consoleView{VM: vm, Pod: pod, Console: text.String()}, nil)
}

// cleaner writes what a guest printed so that it can do nothing to a terminal. Of
// control characters tab and line feed are left; the others, and those that are
// invisible or turn the direction of text, are shown by their numbers, as \x1b.
type cleaner struct {
	w io.Writer
	// rest is the beginning of a character whose end has not come yet.
	rest []byte
	// last is the last byte that was written, if any was.
	last byte
}

// Write implements io.Writer.
func (c *cleaner) Write(p []byte) (int, error) {
	data := append(c.rest, p...)
	var out bytes.Buffer
	for len(data) > 0 && (utf8.FullRune(data) && !isHalfLine(data)) {
		n := cleanRune(&out, data)
		data = data[n:]
	}
	c.rest = bytes.Clone(data)
	return len(p), c.flush(out.Bytes())
}

// isHalfLine is true for a carriage return of which it is not known whether it ends
// a line.
func isHalfLine(data []byte) bool { return len(data) == 1 && data[0] == '\r' }

// Close writes what was held back, and ends the last line.
func (c *cleaner) Close() error {
	var out bytes.Buffer
	for len(c.rest) > 0 {
		c.rest = c.rest[cleanRune(&out, c.rest):]
	}
	if err := c.flush(out.Bytes()); err != nil {
		return err
	}
	if c.last != 0 && c.last != '\n' {
		return c.flush([]byte{'\n'})
	}
	return nil
}

func (c *cleaner) flush(data []byte) error {
	if len(data) == 0 {
		return nil
	}
	c.last = data[len(data)-1]
	_, err := c.w.Write(data)
	return err
}

// cleanRune writes the first character of data, and returns its length.
func cleanRune(out *bytes.Buffer, data []byte) int {
	r, n := utf8.DecodeRune(data)
	switch {
	case r == '\r' && bytes.HasPrefix(data, []byte("\r\n")):
		out.WriteByte('\n')
		return 2
	case r == utf8.RuneError && n <= 1:
		fmt.Fprintf(out, `\x%02x`, data[0])
		return 1
	case r == '\n', r == '\t', unicode.IsPrint(r):
		out.WriteRune(r)
	case r < 0x80:
		fmt.Fprintf(out, `\x%02x`, r)
	default:
		fmt.Fprintf(out, `\u%04x`, r)
	}
	return n
}

// clean makes a text harmless.
func clean(s string) string {
	var out bytes.Buffer
	for data := []byte(s); len(data) > 0; {
		data = data[cleanRune(&out, data):]
	}
	return out.String()
}

// oneLine makes a text harmless, and one cell of a table.
func oneLine(s string) string {
	return strings.NewReplacer("\n", " ", "\t", " ").Replace(clean(s))
}
