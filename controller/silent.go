// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/log"

	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// maxConsoleTail is how much of a console goes into the log, in bytes.
const maxConsoleTail = 2 << 10

// tellSilent logs what is seen from outside of a VM whose agent was waited for in
// vain, as its files go with it: the end of its console, and the processor time of its
// VMM, which tells a guest that stands still from one that is busy.
func tellSilent(ctx context.Context, vm vmm.VM) {
	st := vm.State()
	fields := log.Fields{"console": consoleTail(st.Dir)}
	if ticks, err := process.Ticks(st.Pid); err == nil {
		fields["vmm_processor_time"] = time.Duration(ticks) * (time.Second / 100)
	}
	log.G(ctx).WithFields(fields).Warn("the guest did not come up")
}

// consoleTail is the end of the console log in a VM's directory: lines without control
// characters, or why there are none.
func consoleTail(dir string) string {
	r, size, closeLog, err := openConsole(filepath.Join(dir, vmm.ConsoleLog))
	if err != nil {
		return err.Error()
	}
	defer closeLog()
	if _, err := io.CopyN(io.Discard, r, max(0, size-maxConsoleTail)); err != nil {
		return err.Error()
	}
	text, err := io.ReadAll(r)
	if err != nil {
		return err.Error()
	}
	lines := strings.FieldsFunc(string(text), func(r rune) bool { return r == '\n' || r == '\r' })
	for i, line := range lines {
		lines[i] = printable(line, maxConsoleTail)
	}
	return strings.Join(lines, "\n")
}
