// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Command mkimage packs the guest agent and crun into the erofs image that every guest has as its root.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/cloudhv/containerd-cloudhv/guest/rootfs"
)

func main() {
	if err := run(os.Args[1:], os.Stdout, os.Stderr); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return
		}
		fmt.Fprintln(os.Stderr, "mkimage: error:", err)
		os.Exit(1)
	}
}

func run(args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("mkimage", flag.ContinueOnError)
	flags.SetOutput(stderr)
	agent := flags.String("agent", "build/guest/agent", "guest agent, a static executable")
	runtime := flags.String("crun", "build/guest/crun", "OCI runtime, a static executable")
	output := flags.String("o", "build/guest/rootfs.erofs", "image to write")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if err := present("guest agent", *agent); err != nil {
		return err
	}
	if err := present("crun", *runtime); err != nil {
		return err
	}

	entries, size, err := rootfs.Create(*output, rootfs.Inputs{Agent: *agent, Runtime: *runtime})
	for _, e := range entries {
		fmt.Fprintf(stdout, "%10d  %s\n", e.Size, e.Path)
	}
	if size > 0 {
		fmt.Fprintf(stdout, "%10d  %s (at most %d)\n", size, *output, rootfs.MaxSize)
	}
	return err
}

// present tells what has not been built yet before anything is written.
func present(what, path string) error {
	_, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no %s at %s: build it first", what, path)
	}
	return err
}
