// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Command cloudhvctl looks at a node's virtual machines, and tends its pool, on
// containerd's own socket.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/cloudhv/containerd-cloudhv/controller/ctlapi"
	ctlv1 "github.com/cloudhv/containerd-cloudhv/controller/ctlapi/v1"
)

// version and revision are set by the linker.
var (
	version  = "dev"
	revision = "unknown"
)

const (
	// lookLimit and tendLimit are how long a command waits if nobody says.
	lookLimit = 30 * time.Second
	tendLimit = 5 * time.Minute
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args, os.Stdout, os.Stderr))
}

// run runs one command and returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	err := app(stdout, stderr).Run(ctx, args)
	if err == nil {
		return 0
	}
	text, code := explain(err)
	if text != "" {
		fmt.Fprintln(stderr, "cloudhvctl: "+oneLine(text))
	}
	return code
}

func app(stdout, stderr io.Writer) *cli.Command {
	return &cli.Command{
		Name:    "cloudhvctl",
		Usage:   "look at a node's virtual machines, and tend its pool",
		Version: version + " " + revision,
		Description: "Exit status: 0 done; 1 failed; 2 wrong usage; 3 containerd cannot be reached; 4 it has no cloudhv;\n" +
			"5 the node, or its configuration, cannot do it; 6 no such virtual machine, or several; 7 time was up.",
		EnableShellCompletion: true,
		Writer:                stdout,
		ErrWriter:             stderr,
		ExitErrHandler:        func(context.Context, *cli.Command, error) {}, // run's task
		OnUsageError:          wrongUsage,
		Flags: []cli.Flag{
			&cli.StringFlag{
				Name: "address", Aliases: []string{"a"}, Value: ctlapi.DefaultAddress, Sources: cli.EnvVars("CONTAINERD_ADDRESS"),
				Usage: "containerd's `socket`",
			},
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Value: formatText, Usage: "`format`: text or json", Validator: checkFormat},
			&cli.DurationFlag{
				Name: "timeout", Aliases: []string{"t"}, Validator: checkTimeout,
				Usage: "how long to wait", DefaultText: fmt.Sprintf("%v; %v for drain, fill and rebuild", lookLimit, tendLimit),
			},
		},
		Action: func(_ context.Context, cmd *cli.Command) error {
			if name := cmd.Args().First(); name != "" {
				return usageError("there is no command %q; see cloudhvctl --help", name)
			}
			return cli.ShowRootCommandHelp(cmd)
		},
		Commands: []*cli.Command{statusCommand(), vmsCommand(), consoleCommand(), drainCommand(), fillCommand(), rebuildCommand()},
	}
}

func statusCommand() *cli.Command {
	return command("status", "", "tell how the node is: its hypervisor, pool and snapshots", lookLimit,
		func(ctx context.Context, cmd *cli.Command, c *ctlapi.Client) error {
			answer, err := c.Status(ctx, &ctlv1.StatusRequest{})
			if err != nil {
				return err
			}
			s := viewStatus(answer)
			if err := show(cmd, s, s.print); err != nil {
				return err
			}
			if !s.Fit {
				return errUnfit
			}
			return nil
		})
}

func vmsCommand() *cli.Command {
	cmd := command("vms", "", "list virtual machines: of pods, and of the pool", lookLimit,
		func(ctx context.Context, cmd *cli.Command, c *ctlapi.Client) error {
			answer, err := c.List(ctx, &ctlv1.ListRequest{})
			if err != nil {
				return err
			}
			list := viewVMs(answer, cmd.Bool("all"))
			return show(cmd, list, func(w io.Writer) error { return list.print(w, cmd.Bool("phases")) })
		})
	cmd.Flags = []cli.Flag{
		&cli.BoolFlag{Name: "all", Usage: "stopped pods too, which have none any more"},
		&cli.BoolFlag{Name: "phases", Usage: "the parts of each pod's start, with the time they took"},
	}
	return cmd
}

func consoleCommand() *cli.Command {
	cmd := command("console", "VM", "print what a guest's console printed; VM is its ID, its pod's, or the beginning of either", lookLimit, console)
	cmd.Flags = []cli.Flag{
		&cli.IntFlag{Name: "tail", Usage: "only the last `bytes`"},
		&cli.BoolFlag{Name: "raw", Usage: "every byte as the guest printed it: it may take over a terminal"},
	}
	return cmd
}

func drainCommand() *cli.Command {
	return command("drain", "", "end the virtual machines that are ready, and keep none until fill", tendLimit,
		func(ctx context.Context, cmd *cli.Command, c *ctlapi.Client) error {
			answer, err := c.Drain(ctx, &ctlv1.DrainRequest{})
			if err != nil {
				return err
			}
			return show(cmd, drainView{Ended: answer.GetEnded()}, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "drained: %d ended; pods are restored their virtual machines until `cloudhvctl fill`\n", answer.GetEnded())
				return err
			})
		})
}

func fillCommand() *cli.Command {
	return command("fill", "[N]", "fill the pool, and wait until it is: as far as it wants to be, or N", tendLimit,
		func(ctx context.Context, cmd *cli.Command, c *ctlapi.Client) error {
			count, err := fillCount(cmd)
			if err != nil {
				return err
			}
			answer, err := c.Fill(ctx, &ctlv1.FillRequest{Count: count})
			if err != nil {
				return err
			}
			return show(cmd, fillView{Ready: answer.GetReady()}, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "filled: %d ready\n", answer.GetReady())
				return err
			})
		})
}

// fillCount is how many were asked for, 0 if nobody said.
func fillCount(cmd *cli.Command) (uint32, error) {
	arg := cmd.Args().First()
	if arg == "" {
		return 0, nil
	}
	count, err := strconv.ParseUint(arg, 10, 32)
	if err != nil || count == 0 {
		return 0, usageError("fill %q: want a number of virtual machines, at least 1", arg)
	}
	return uint32(count), nil
}

func rebuildCommand() *cli.Command {
	return command("rebuild", "", "make the base snapshot anew; virtual machines of the old one go on", tendLimit,
		func(ctx context.Context, cmd *cli.Command, c *ctlapi.Client) error {
			answer, err := c.Rebuild(ctx, &ctlv1.RebuildRequest{})
			if err != nil {
				return err
			}
			s := viewSnapshot(answer.GetSnapshot())
			return show(cmd, rebuildView{Snapshot: s}, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "rebuilt: snapshot %s, %s\n", clean(s.ID), size(s.Bytes))
				return err
			})
		})
}

// command is one that connects to containerd, and takes as many arguments as its
// usage names.
func command(name, args, usage string, limit time.Duration, do func(context.Context, *cli.Command, *ctlapi.Client) error) *cli.Command {
	return &cli.Command{
		Name: name, Usage: usage, ArgsUsage: args, OnUsageError: wrongUsage,
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := checkArgs(cmd, args); err != nil {
				return err
			}
			if t := cmd.Duration("timeout"); t > 0 {
				limit = t
			}
			ctx, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			address := cmd.String("address")
			c, err := ctlapi.Dial(ctx, address)
			if err != nil {
				return &dialError{address: address, err: err}
			}
			defer c.Close()
			if err := do(ctx, cmd, c); err != nil {
				return &callError{command: name, address: address, limit: limit, err: err}
			}
			return nil
		},
	}
}

func checkArgs(cmd *cli.Command, args string) error {
	n := cmd.Args().Len()
	switch {
	case args == "" && n > 0, n > 1:
		return usageError("%s: too many arguments: %q", cmd.Name, cmd.Args().Slice())
	case args != "" && args[0] != '[' && n == 0:
		return usageError("%s: name a %s; `cloudhvctl vms` lists them", cmd.Name, args)
	default:
		return nil
	}
}

func checkFormat(s string) error {
	if s != formatText && s != formatJSON {
		return fmt.Errorf("want %s or %s", formatText, formatJSON)
	}
	return nil
}

func checkTimeout(d time.Duration) error {
	if d <= 0 {
		return fmt.Errorf("want more than 0")
	}
	return nil
}
