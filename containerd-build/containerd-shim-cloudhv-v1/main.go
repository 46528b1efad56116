// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Command containerd-shim-cloudhv-v1 is a pod's task proxy. The controller starts
// it with -sandbox; containerd runs it with -info, and with the action "delete"
// in a container's bundle after it has disconnected.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/containerd/log"

	"github.com/cloudhv/containerd-cloudhv/controller/shim"
	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
)

// version and revision are set by the linker.
var (
	version  = "dev"
	revision = "unknown"
)

// options are the command line: ours, and what containerd gives to every shim.
type options struct {
	sandbox   string
	info      bool
	version   bool
	bundle    string
	id        string
	namespace string
	debug     bool
	action    string
}

func parseFlags(args []string) (*options, error) {
	var o options
	var ignored string
	fs := flag.NewFlagSet(filepath.Base(args[0]), flag.ContinueOnError)
	fs.StringVar(&o.sandbox, "sandbox", "", "serve the pod of this sandbox `directory`; the listening socket is file descriptor 3")
	fs.BoolVar(&o.info, "info", false, "print what this runtime can do as a protobuf")
	fs.BoolVar(&o.version, "v", false, "print the version")
	fs.BoolVar(&o.version, "version", false, "print the version")
	fs.StringVar(&o.bundle, "bundle", "", "the container's bundle `directory`, if it is not the working directory")
	fs.StringVar(&o.id, "id", "", "the container's ID")
	fs.StringVar(&o.namespace, "namespace", "", "containerd's namespace")
	fs.BoolVar(&o.debug, "debug", false, "log every request")
	for _, name := range []string{"address", "publish-binary", "socket", "debug-socket"} {
		fs.StringVar(&ignored, name, "", "not used")
	}
	if err := fs.Parse(args[1:]); err != nil {
		return nil, err
	}
	o.action = fs.Arg(0)
	return &o, nil
}

func main() {
	opts, err := parseFlags(os.Args)
	if err != nil {
		os.Exit(2)
	}
	if err := run(opts, os.Stdout); err != nil {
		_, _ = fmt.Fprintf(os.Stderr, "%s: %v\n", filepath.Base(os.Args[0]), err)
		os.Exit(1)
	}
}

func run(opts *options, stdout io.Writer) error {
	switch {
	case opts.version:
		_, err := fmt.Fprintf(stdout, "%s:\n  Version:  %s\n  Revision: %s\n  Go version: %s\n\n",
			filepath.Base(os.Args[0]), version, revision, runtime.Version())
		return err
	case opts.info:
		return printInfo(stdout)
	case opts.action == "delete":
		return printDelete(opts, stdout)
	case opts.action == "start":
		return fmt.Errorf("this shim is started by the cloudhv sandbox controller: want sandboxer = 'cloudhv' for the runtime")
	case opts.sandbox != "":
		return serve(opts)
	}
	return fmt.Errorf("want -sandbox, -info, -v or the action delete")
}

// serve is the life of a pod's shim.
func serve(opts *options) error {
	if err := tune(); err != nil {
		return fmt.Errorf("start again with other settings: %w", err)
	}
	dir, err := filepath.Abs(opts.sandbox)
	if err != nil {
		return err
	}
	bound := shim.BoundLog(os.Stderr, filepath.Join(dir, shim.LogFile), filepath.Join(dir, shim.OldLogFile))
	log.L.Logger.SetOutput(shim.NewLogWriter(bound))
	if err := log.SetFormat(log.TextFormat); err != nil {
		return err
	}
	cfg, err := shim.LoadConfig(dir)
	if err != nil {
		return err
	}
	cfg.Debug = cfg.Debug || opts.debug
	if cfg.Debug {
		if err := log.SetLevel("debug"); err != nil {
			return err
		}
	}
	sockets, err := shim.Inherit(cfg)
	if err != nil {
		return err
	}
	guest, err := transport.Open(cfg.GuestEndpoint)
	if err != nil {
		return err
	}
	// Output of the log and of FIFOs may lose its reader, and the terminal its owner.
	signal.Ignore(syscall.SIGPIPE, syscall.SIGHUP)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return shim.Serve(ctx, *cfg, dir, sockets, guest)
}
