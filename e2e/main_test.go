// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package e2e holds the tests that go through the CRI of a real containerd. All
// of them run on one private node (package testnode), and each runs once for
// every runtime handler, so that what runc does is the yardstick.
//
// Environment: E2E_REQUIRE=1 makes a missing prerequisite a failure instead of
// a skip; E2E_TIME_FACTOR stretches all time limits; E2E_HANDLERS chooses
// handlers ("runc,cloudhv"); E2E_BIN and E2E_GUEST are used instead of build/bin and build/guest; E2E_NAME names the
// node, for two runs at once; E2E_KEEP=1
// leaves the node's directory behind after a failure; E2E_VMM chooses the
// hypervisor, and E2E_ACCELERATOR says what it has to run with; E2E_COUNTS=small
// takes fewer pods and bytes; E2E_PROGRAMS is where the tests' own programs lie ready.
package e2e

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// suite is what the tests share.
var suite struct {
	// node runs containerd, unless skip says why not.
	node *testnode.Node
	skip string
	// ctx ends when the run is interrupted.
	ctx context.Context
	// handlers are tested, each on its own.
	handlers []string
	// before is the census that must be the same in the end.
	before testnode.Census
	helper []byte
	// vmm is the hypervisor's driver; on is all that our handler's pods run on, for people.
	vmm, on string
	// kvm is true where pods run on the processor itself, not in software emulation.
	kvm bool
}

func TestMain(m *testing.M) {
	if command := os.Getenv("CNI_COMMAND"); command != "" {
		os.Exit(runPlugin(command, os.Stdin, os.Stdout))
	}
	flag.Parse()
	if f := flag.Lookup("test.list"); f != nil && f.Value.String() != "" {
		os.Exit(m.Run())
	}
	os.Exit(runSuite(m))
}

// runSuite runs the tests on a node and returns the exit code.
func runSuite(m *testing.M) int {
	suite.handlers = []string{testnode.RunC, testnode.CloudHV}
	if v := os.Getenv("E2E_HANDLERS"); v != "" {
		suite.handlers = strings.Split(v, ",")
	}
	opts := nodeOptions(cmp.Or(os.Getenv("E2E_NAME"), "e2e"))
	// No VM is ready, each is restored: a census needs a node that is at rest.
	opts.CloudHV = map[string]any{"pool": map[string]any{"min": 0, "max": 0}}
	opts.NRI = true
	if reason := unfit(opts); reason != "" {
		if os.Getenv("E2E_REQUIRE") == "1" {
			fmt.Fprintln(os.Stderr, "the end-to-end tests cannot run:", reason)
			return 1
		}
		suite.skip = reason
		return m.Run()
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	code, err := onNode(ctx, opts, m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "FAIL: e2e:", err)
		return 1
	}
	return code
}

func nodeOptions(name string) testnode.Options {
	return testnode.Options{Name: name, BinDir: os.Getenv("E2E_BIN"), GuestDir: os.Getenv("E2E_GUEST"), Debug: os.Getenv("E2E_DEBUG") == "1"}
}

// unfit says why the tests cannot run here, or nothing.
func unfit(opts testnode.Options) string {
	if os.Geteuid() != 0 {
		return "root is needed"
	}
	missing, err := testnode.Missing(opts)
	if err != nil {
		return err.Error()
	}
	var relevant []string
	for _, f := range missing {
		ours := strings.Contains(f, "cloudhv") || strings.HasSuffix(f, "vmlinux") || strings.HasSuffix(f, "rootfs.erofs")
		if !ours || strings.Contains(strings.Join(suite.handlers, ","), testnode.CloudHV) {
			relevant = append(relevant, f)
		}
	}
	if len(relevant) > 0 {
		return "`make build` has not made " + strings.Join(relevant, ", ")
	}
	return ""
}

// onNode starts the node, runs the tests, takes the census and removes the node.
func onNode(ctx context.Context, opts testnode.Options, m *testing.M) (code int, retErr error) {
	n, err := testnode.New(opts)
	if err != nil {
		return 1, err
	}
	defer func() {
		if os.Getenv("E2E_KEEP") == "1" && (code != 0 || retErr != nil) {
			fmt.Fprintln(os.Stderr, "the node is left in", n.Dir())
			return
		}
		cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), testnode.Scale(3*time.Minute))
		defer cancel()
		retErr = errors.Join(retErr, n.Close(cctx))
	}()
	suite.node, suite.ctx = n, ctx
	if err := prepare(ctx, n); err != nil {
		return 1, fmt.Errorf("%w\ncontainerd's log ends:\n%s", err, n.LogTail(4096))
	}
	go func() {
		// The tests would not notice an interrupt: without containerd they end soon.
		<-ctx.Done()
		if cause := ctx.Err(); cause != nil && n.Pid() != 0 {
			_ = n.Kill(context.WithoutCancel(ctx))
		}
	}()
	code = m.Run()
	cctx, cancel := context.WithTimeout(ctx, testnode.Scale(time.Minute))
	defer cancel()
	if err := n.AwaitCensus(cctx, suite.before); err != nil {
		return 1, fmt.Errorf("after all tests: %w\ncontainerd's log ends:\n%s", err, n.LogTail(4096))
	}
	return code, nil
}

// prepare starts containerd, imports the images and runs one pod by each
// handler, so that what is made once a node exists before the census.
func prepare(ctx context.Context, n *testnode.Node) error {
	if err := n.Start(ctx); err != nil {
		return err
	}
	var err error
	if suite.helper, err = testimage.BuildHelper(n.Repo(), n.Dir("tmp")); err != nil {
		return err
	}
	images := map[string]func([]byte) (v1.Image, error){testimage.HelperRef: testimage.Helper}
	if run := flag.Lookup("test.run").Value.String(); run == "" || run == "." || strings.Contains(run, "RootFS") {
		images[testimage.NastyRef] = testimage.Nasty // half a minute's work
	}
	for ref, build := range images {
		start := time.Now()
		img, err := build(suite.helper)
		if err != nil {
			return err
		}
		if err := n.Import(ctx, ref, img); err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "image %s: made and unpacked in %s\n", ref, time.Since(start).Round(time.Millisecond))
		for _, h := range suite.handlers {
			start := time.Now()
			if err := warmUp(ctx, n, h, ref); err != nil {
				return fmt.Errorf("the first pod by %s: %w", h, err)
			}
			fmt.Fprintf(os.Stderr, "handler %s: its first pod came and went in %s\n", h, time.Since(start).Round(time.Millisecond))
		}
	}
	if slices.Contains(suite.handlers, testnode.CloudHV) {
		// The base snapshot is made beside the first pods, and is there from then on.
		made, cancel := context.WithTimeout(ctx, testnode.Scale(2*time.Minute))
		defer cancel()
		if err := testnode.Eventually(made, func(ctx context.Context) error { return snapshotMade(ctx, n) }); err != nil {
			return err
		}
		if err := lookAtHypervisor(ctx, n); err != nil {
			return err
		}
	}
	suite.before, err = settled(ctx, n)
	return err
}

// lookAtHypervisor notes what the pods run on, and fails if it is not what the
// environment wants.
func lookAtHypervisor(ctx context.Context, n *testnode.Node) error {
	h, err := n.Hypervisor(ctx)
	suite.vmm, suite.kvm, suite.on = h.Name, h.Accelerator == "kvm", h.String()
	return err
}

// snapshotMade fails until the base snapshot is there, and has been read.
func snapshotMade(ctx context.Context, n *testnode.Node) error {
	if made, err := filepath.Glob(n.Dir("cache", "templates", "[0-9a-f]*", "manifest.json")); err != nil || len(made) == 0 {
		return fmt.Errorf("no snapshot was made: %w", errors.Join(err, errdefs.ErrNotFound))
	}
	c, err := n.Census(ctx)
	if err != nil {
		return err
	}
	for what := range c.Own {
		if strings.Contains(what, "vmpool/snapshot.") {
			return fmt.Errorf("the snapshot is not ready: %s: %w", what, errdefs.ErrUnavailable)
		}
	}
	return nil
}

// settled returns the first census that is the same twice in a row.
func settled(ctx context.Context, n *testnode.Node) (testnode.Census, error) {
	ctx, cancel := context.WithTimeout(ctx, testnode.Scale(30*time.Second))
	defer cancel()
	var last testnode.Census
	err := testnode.Eventually(ctx, func(ctx context.Context) error {
		now, err := n.Census(ctx)
		if err != nil {
			return err
		}
		d := now.Diff(last)
		last = now
		if len(d) > 0 {
			return fmt.Errorf("the node does not come to rest: %s", strings.Join(d, "; "))
		}
		return nil
	})
	return last, err
}

func warmUp(ctx context.Context, n *testnode.Node, handler, image string) error {
	pod := n.PodConfig("warm-up")
	id, err := n.RunPod(ctx, pod, handler)
	if err != nil {
		return err
	}
	c, err := n.CreateContainer(ctx, id, pod, testnode.ContainerConfig("c", image, testimage.HelperPath, "exit", "0"))
	if err == nil {
		err = n.StartContainer(ctx, c)
	}
	return errors.Join(err, n.StopPod(ctx, id), n.RemovePod(ctx, id), os.RemoveAll(pod.GetLogDirectory()))
}
