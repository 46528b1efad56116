// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// column is where durations end.
const column = 78

// printer lays out the demo's output. Colour and bold are for terminals only.
type printer struct {
	w     io.Writer
	color bool
	step  int
}

func newPrinter(f *os.File) *printer {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	term := os.Getenv("TERM")
	return &printer{w: f, color: err == nil && os.Getenv("NO_COLOR") == "" && term != "" && term != "dumb"}
}

const (
	bold  = "\x1b[1m"
	dim   = "\x1b[2m"
	green = "\x1b[32m"
	cyan  = "\x1b[36m"
	red   = "\x1b[31m"
)

func (p *printer) paint(color, s string) string {
	if !p.color || s == "" {
		return s
	}
	return color + s + "\x1b[0m"
}

func (p *printer) title(s string) {
	fmt.Fprintf(p.w, "\n%s\n", p.paint(bold, s))
}

// section begins a step: what it shows, and a line why.
func (p *printer) section(title, why string) {
	p.step++
	fmt.Fprintf(p.w, "\n%s\n   %s\n\n", p.paint(bold, fmt.Sprintf("%d. %s", p.step, title)), p.paint(dim, why))
}

// fact is a name and what there is to say of it.
func (p *printer) fact(name, value string) {
	lines := wrap(value, column-23)
	fmt.Fprintf(p.w, "   %-18s  %s\n", name, lines[0])
	for _, l := range lines[1:] {
		fmt.Fprintf(p.w, "   %-18s  %s\n", "", l)
	}
}

// output is what a command printed, bounded in length.
func (p *printer) output(s string) {
	const most = 12
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	for i, l := range lines {
		if i == most && len(lines) > most+1 {
			fmt.Fprintf(p.w, "     %s\n", p.paint(dim, fmt.Sprintf("(%d more lines)", len(lines)-most)))
			break
		}
		fmt.Fprintf(p.w, "     %s\n", p.paint(cyan, printable(l, 200)))
	}
}

// timed shows a command, runs it, and shows how long it took.
func (p *printer) timed(command string, fn func() error) error {
	command = printable(command, column-14)
	fmt.Fprintf(p.w, "   %s ", p.paint(bold, "$ "+command))
	start := time.Now()
	err := fn()
	took := fmt.Sprintf("%.3f s", time.Since(start).Seconds())
	pad := max(1, column-6-utf8.RuneCountInString(command)-len(took))
	mark := p.paint(green, took)
	if err != nil {
		mark = p.paint(red, took+" failed")
	}
	fmt.Fprintf(p.w, "%s%s\n", p.paint(dim, strings.Repeat(".", pad-1)+" "), mark)
	return err
}

func (p *printer) note(s string) {
	for _, l := range wrap(s, column-3) {
		fmt.Fprintf(p.w, "   %s\n", l)
	}
}

// table aligns rows of cells that are separated by tabs.
func table(rows []string) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(w, r)
	}
	w.Flush()
	return b.String()
}

var gaps = regexp.MustCompile(` {2,}`)

// squeeze aligns a table again, closer than crictl does.
func squeeze(s string) string {
	var rows []string
	for line := range strings.Lines(s) {
		rows = append(rows, gaps.ReplaceAllString(strings.TrimSpace(line), "\t"))
	}
	return table(rows)
}

// bar draws what part of whole begins at and lasts took.
func bar(at, took, whole time.Duration, width int) string {
	if whole <= 0 {
		return ""
	}
	from := min(width-1, int(int64(at)*int64(width)/int64(whole)))
	length := max(1, min(width-from, int(int64(took)*int64(width)/int64(whole))))
	return strings.Repeat(" ", from) + strings.Repeat("#", length) + strings.Repeat(" ", width-from-length)
}

// wrap breaks s into lines of at most width runes, at spaces where it can.
func wrap(s string, width int) []string {
	var lines []string
	line := ""
	for word := range strings.FieldsSeq(s) {
		switch {
		case line == "":
			line = word
		case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) <= width:
			line += " " + word
		default:
			lines = append(lines, line)
			line = word
		}
	}
	return append(lines, line)
}

// printable is s without what would move a terminal's cursor, and bounded: it
// may come from a guest.
func printable(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' '
		case r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0):
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if utf8.RuneCountInString(s) > most {
		s = string([]rune(s)[:most-1]) + "~"
	}
	return s
}
