// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/e2e/critest/verdict"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// grace is how long the suite may take to clean up after itself when it is interrupted,
// or has used up its time.
const grace = 30 * time.Second

// runSuite runs the suite by one handler. Its output goes to a file, its report too.
func runSuite(ctx context.Context, n *testnode.Node, handler string, o options) (verdict.Results, error) {
	began := time.Now()
	report, logPath := filepath.Join(o.out, handler+".json"), filepath.Join(o.out, handler+".log")
	if err := errors.Join(os.RemoveAll(report), prepareWorkDir(n)); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(logPath, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	fmt.Printf("critest by %s, %d specs at a time (%s)\n", handler, o.procs, logPath)
	err = execSuite(ctx, suiteCommand(n, handler, report, o), log, o)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	f, ferr := os.Open(report)
	if ferr != nil {
		return nil, fmt.Errorf("the suite did not end, see %s: %w", logPath, errors.Join(err, ferr))
	}
	defer f.Close()
	// That specs failed is in the report, which says more than the exit code.
	results, err := verdict.Parse(f)
	if err != nil {
		return nil, err
	}
	fmt.Printf("critest by %s: %d passed, %d failed, %d skipped in %d s\n", handler,
		results.Count(verdict.Passed), results.Count(verdict.Failed), results.Count(verdict.Skipped), int(time.Since(began).Seconds()))
	return results, nil
}

// workDir is the suite's TMPDIR, where it has volumes and logs. The census does not look
// into it, as the suite leaves things there.
func workDir(n *testnode.Node) string { return n.Dir("logs", "critest") }

// program is the name of the suite's program: Ginkgo knows such a one by the name's end.
const program = "critest.test"

// prepareWorkDir makes the directory, with the program in it.
func prepareWorkDir(n *testnode.Node) error {
	link := filepath.Join(workDir(n), program)
	if err := errors.Join(os.MkdirAll(workDir(n), 0o711), os.RemoveAll(link)); err != nil {
		return err
	}
	return os.Symlink(filepath.Join(n.BinDir(), "critest"), link)
}

// suiteCommand is the suite's command line. It has an environment of its own, as a proxy
// would come between it and the pods.
func suiteCommand(n *testnode.Node, handler, report string, o options) *exec.Cmd {
	tmp := workDir(n)
	args := []string{
		"--procs=" + strconv.Itoa(o.procs), "--no-color", "-v", "--keep-going",
		"--timeout=" + testnode.Scale(o.limit).String(), "--grace-period=" + grace.String(),
		"--output-dir=" + filepath.Dir(report), "--json-report=" + filepath.Base(report),
	}
	if o.focus != "" {
		args = append(args, "--focus="+o.focus)
	}
	args = append(args, filepath.Join(tmp, program), "--",
		"-runtime-endpoint="+n.Endpoint(), "-image-endpoint="+n.Endpoint(), "-runtime-handler="+handler,
		"-config="+filepath.Join(tmp, "none.yaml"))
	cmd := exec.Command(filepath.Join(n.BinDir(), "ginkgo"), args...)
	cmd.Dir = tmp
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + tmp, "TMPDIR=" + tmp}
	return cmd
}

// execSuite runs the command in a process group of its own, and ends all of the group
// when ctx ends or the time is over: first by SIGINT, on which Ginkgo has specs clean up.
func execSuite(ctx context.Context, cmd *exec.Cmd, log *os.File, o options) error {
	ctx, cancel := context.WithTimeout(ctx, testnode.Scale(o.limit)+2*grace)
	defer cancel()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting ginkgo: %w", err)
	}
	group := -cmd.Process.Pid
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	// What is left of the group goes in any case. None left is as it should be.
	defer func() { _ = unix.Kill(group, unix.SIGKILL) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	_ = unix.Kill(group, unix.SIGINT)
	select {
	case err := <-done:
		return errors.Join(context.Cause(ctx), err)
	case <-time.After(grace):
		_ = unix.Kill(group, unix.SIGKILL)
		return errors.Join(context.Cause(ctx), <-done)
	}
}
