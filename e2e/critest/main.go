// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Command critest runs the CRI validation suite (sigs.k8s.io/cri-tools) on a private
// containerd, first by runc and then by our handler, and compares: what passes by
// runc has to pass by ours, except for what is listed (e2e/README.md).
package main

import (
	"context"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/e2e/critest/verdict"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
	"github.com/cloudhv/containerd-cloudhv/e2e/testregistry"
)

// The lists of specs that are known to fail.
var (
	// exceptions can mean nothing to a virtual machine.
	//go:embed exceptions.list
	exceptions string
	// gaps are what this project lacks.
	//go:embed gaps.list
	gaps string
	// standins fail by any handler, as an image of the suite's cannot be made here.
	//go:embed standins.list
	standins string
)

// options are what the command line says.
type options struct {
	procs      int
	focus      string
	realImages bool
	packages   string
	out        string
	limit      time.Duration
}

func main() {
	var o options
	flag.IntVar(&o.procs, "procs", 4, "how many specs run at the same time")
	flag.StringVar(&o.focus, "focus", "", "only specs that this regular expression matches")
	flag.BoolVar(&o.realImages, "real-images", false, "pull the suite's own images from their registries")
	flag.StringVar(&o.packages, "packages", "build/cache/critest", "where the packages for the images lie unpacked")
	flag.StringVar(&o.out, "o", "build/critest", "where reports and logs are put")
	flag.DurationVar(&o.limit, "limit", 10*time.Minute, "how long the suite may take by one handler")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "critest:", err)
		stop()
		os.Exit(1)
	}
}

// run runs the suite by both handlers, prints the comparison, and returns an error if
// they differ in what they may not.
func run(ctx context.Context, o options) error {
	lists, err := parseLists(o.realImages)
	if err != nil {
		return err
	}
	if o.out, err = filepath.Abs(o.out); err != nil {
		return err
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	runs, err := onNode(ctx, o)
	if len(runs) < 2 {
		return err
	}
	runs[0].Known, runs[1].Known = lists.runc, lists.ours
	if perr := verdict.Print(os.Stdout, runs...); perr != nil {
		return errors.Join(err, perr)
	}
	wrong := verdict.Judge(runs[0], runs[1])
	for _, w := range wrong {
		fmt.Println("\n" + w)
	}
	if len(wrong) > 0 {
		err = errors.Join(err, fmt.Errorf("%d specs are not as they should be, see above and %s: %w", len(wrong), o.out, errdefs.ErrFailedPrecondition))
	}
	return err
}

// knownFailures are the lists that count for each handler.
type knownFailures struct {
	runc, ours []verdict.List
}

func parseLists(realImages bool) (knownFailures, error) {
	var errs []error
	parse := func(name, text string) verdict.List {
		l, err := verdict.ParseList("e2e/critest/"+name, strings.NewReader(text))
		errs = append(errs, err)
		return l
	}
	k := knownFailures{
		ours: []verdict.List{parse("exceptions.list", exceptions), parse("gaps.list", gaps)},
	}
	if s := parse("standins.list", standins); !realImages {
		k.runc, k.ours = append(k.runc, s), append(k.ours, s)
	}
	return k, errors.Join(errs...)
}

// onNode makes the node and runs the suite by each handler. It returns the runs that
// came to an end, also with an error: of the node's end, or of what was left behind.
func onNode(ctx context.Context, o options) (runs []verdict.Run, retErr error) {
	registry, err := images(ctx, o)
	if err != nil {
		return nil, err
	}
	if registry != nil {
		defer registry.Close()
	}
	metrics, err1 := testnode.FreeAddress()
	cgroups, err2 := defaultCgroups()
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	n, err := testnode.New(testnode.Options{
		Name: "critest", BinDir: os.Getenv("E2E_BIN"), GuestDir: os.Getenv("E2E_GUEST"), Debug: os.Getenv("E2E_DEBUG") == "1",
		Mirrors: mirrors(registry), HostPorts: true, Metrics: metrics,
		// No VM is ready, each is restored: a census needs a node that is at rest.
		CloudHV: map[string]any{"pool": map[string]any{"min": 0, "max": 0}},
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		retErr = errors.Join(retErr, keepLog(n, o.out))
		if os.Getenv("E2E_KEEP") == "1" && retErr != nil {
			fmt.Fprintln(os.Stderr, "the node is left in", n.Dir())
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), testnode.Scale(3*time.Minute))
		defer cancel()
		retErr = errors.Join(retErr, n.Close(ctx), removeCgroups(cgroups))
	}()
	if err := n.Start(ctx); err != nil {
		return nil, err
	}
	return byHandlers(ctx, n, registry, o)
}

// byHandlers runs the suite by each handler, and looks each time for what was left behind.
func byHandlers(ctx context.Context, n *testnode.Node, registry *testregistry.Registry, o options) (runs []verdict.Run, retErr error) {
	if err := warmUp(ctx, n); err != nil {
		return nil, err
	}
	before, err := census(ctx, n)
	if err != nil {
		return nil, err
	}
	for _, h := range []string{testnode.RunC, testnode.CloudHV} {
		results, err := runSuite(ctx, n, h, o)
		if err != nil {
			return runs, fmt.Errorf("the suite by %s: %w", h, err)
		}
		runs = append(runs, verdict.Run{Handler: h, Results: results})
		if registry != nil {
			registry.Disconnect()
		}
		if err := leftBehind(ctx, n, before); err != nil {
			retErr = errors.Join(retErr, fmt.Errorf("after the suite by %s: %w", h, err))
		}
	}
	return runs, retErr
}

// keepLog copies containerd's log beside the reports.
func keepLog(n *testnode.Node, dir string) error {
	b, err := os.ReadFile(n.LogPath())
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "containerd.log"), b, 0o644)
}
