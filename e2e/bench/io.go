// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// What is moved in a round.
const (
	streamBytes = 16 << 20
	logBytes    = 8 << 20
	// requests are those of a round trip's sample.
	requests = 20
	// datagramBytes are a datagram's, of which so many are on their way at a time.
	datagramBytes   = 1400
	datagramsOnWay  = 16
	datagramsInAll  = 1000
	datagramPatient = 5 * time.Second
)

// The ports on which a container serves, and the third that a bare machine has.
const (
	servePort = 7000
	echoPort  = 7001
	benchPort = 7002
)

// ioRounds are enough: each has many requests and bytes.
const ioRounds = 5

// place is a file system that is measured: the files of so many MiB, and so many small ones.
type place struct {
	name, dir string
	mib, many int
}

// places are a container's writable layer, and a directory of the host.
var places = []place{{"scratch", "/work", 16, 100}, {"volume", "/v", 16, 100}}

// io measures streams, networks and files: pods of ours and of runc's in turn, and a VM that
// has nothing but a kernel.
func (b *bench) io(ctx context.Context) (retErr error) {
	n, err := b.newNode(ctx, "bench", pool(1, 1, nil))
	if err != nil {
		return err
	}
	defer b.closeNode(ctx, n, &retErr)
	helper, err := testimage.BuildHelper(n.Repo(), n.Dir())
	if err != nil {
		return err
	}
	img, err := testimage.Big(helper)
	if err == nil {
		err = n.Import(ctx, testimage.BigRef, img)
	}
	if err != nil {
		return err
	}
	vm, err := newBareMachine(ctx, n, helper)
	defer func() { retErr = errors.Join(retErr, vm.remove()) }()
	b.complain("the bare machine", err)
	rounds := min(b.rounds, ioRounds)
	for i := range rounds + 1 {
		r := b.report
		if i == 0 {
			r = newReport() // it does not count
		}
		for _, h := range []string{handlers[i%2], handlers[(i+1)%2]} {
			b.complain(fmt.Sprintf("round %d, %s", i, h), r.ioPod(ctx, n, h))
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
		if vm != nil {
			b.complain(fmt.Sprintf("round %d, bare", i), r.ioBare(ctx, vm))
		}
		b.progress("streams, networks, files: %d of %d rounds", i, rounds)
	}
	for _, name := range b.report.namesOf(sideBare) {
		b.report.alias(name, strings.TrimSuffix(name, bareSuffix))
	}
	return nil
}

// bareSuffix is that of results that are compared with the bare machine, and not with runc.
const bareSuffix = "/vm"

// ioPod is one pod that is measured.
func (r *report) ioPod(ctx context.Context, n *testnode.Node, h string) (retErr error) {
	volume, err := os.MkdirTemp(testnode.BaseDir, "bench")
	if err != nil {
		return err
	}
	defer func() { retErr = errors.Join(retErr, os.RemoveAll(volume)) }()
	p := &pod{node: n, handler: h, cfg: n.PodConfig("bench")}
	defer func() {
		_, err := p.remove(ctx)
		retErr = errors.Join(retErr, err)
	}()
	if p.id, err = n.RunPod(ctx, p.cfg, h); err != nil {
		return err
	}
	serve := fmt.Sprintf("%s serve %d & exec %s echo %d", testimage.HelperPath, servePort, testimage.HelperPath, echoPort)
	cfg := testnode.ContainerConfig("c", testimage.BigRef, "/bin/sh", "-c", serve)
	cfg.Mounts = []*runtimeapi.Mount{{ContainerPath: "/v", HostPath: volume}}
	if p.ctr, err = n.CreateContainer(ctx, p.id, p.cfg, cfg); err != nil {
		return err
	}
	if err := n.StartContainer(ctx, p.ctr); err != nil {
		return err
	}
	ips, err := n.PodIPs(ctx, p.id)
	if err != nil {
		return err
	}
	inside := func(args ...string) (string, error) {
		out, stderr, code, err := n.ExecSync(ctx, p.ctr, append([]string{testimage.HelperPath}, args...)...)
		if err == nil && code != 0 {
			err = fmt.Errorf("%v exited with %d: %s: %w", args, code, stderr, errdefs.ErrUnknown)
		}
		return out, err
	}
	// In software emulation what runs for the first time is translated, which is not what is
	// asked here; and the bare machine has run it before.
	for _, at := range places {
		if _, err := inside("filebench", at.dir, "1", "10"); err != nil {
			return err
		}
	}
	out, err := inside("readbench", testimage.BigPath)
	errs := []error{r.rates("image", h, "", out, err)}
	for _, at := range places {
		out, err := inside("filebench", at.dir, strconv.Itoa(at.mib), strconv.Itoa(at.many))
		errs = append(errs, r.rates(at.name, h, "", out, err))
	}
	errs = append(errs, r.network(ctx, h, "", ips[0]), r.stdout(ctx, p))
	return errors.Join(errs...)
}

// rates notes lines of a name, a number and its unit.
func (r *report) rates(of, side, suffix, lines string, err error) error {
	if err != nil {
		r.add(of, side, 0, err)
		return fmt.Errorf("%s: %w", of, err)
	}
	for line := range strings.Lines(lines) {
		var name, unit string
		var value float64
		if _, err := fmt.Sscan(line, &name, &value, &unit); err != nil {
			return fmt.Errorf("%s: not understood: %q: %w", of, line, err)
		}
		if unit == "MiB/s" {
			name += "_mib"
		}
		r.add(of+"_"+name+"_per_second"+suffix, side, value, nil)
	}
	return nil
}

// stdout measures how fast a container's output comes into its log, by the stamps of its
// first and last lines.
func (r *report) stdout(ctx context.Context, p *pod) error {
	const name = "stdout_mib_per_second"
	id, err := p.node.CreateContainer(ctx, p.id, p.cfg, testnode.ContainerConfig("gen", testimage.BigRef, testimage.HelperPath, "gen", strconv.Itoa(logBytes), "1"))
	if err == nil {
		err = p.node.StartContainer(ctx, id)
	}
	if err != nil {
		r.add(name, p.handler, 0, err)
		return err
	}
	var took time.Duration
	limit, cancel := context.WithTimeout(ctx, testnode.Scale(time.Minute))
	defer cancel()
	err = testnode.Eventually(limit, func(context.Context) error {
		took, err = logDuration(filepath.Join(p.cfg.GetLogDirectory(), "gen.log"))
		return err
	})
	r.add(name, p.handler, logBytes/(1<<20)/took.Seconds(), err)
	return err
}

// logDuration is the time from the first line of gen's output in a log to the last, once
// that is there.
func logDuration(path string) (time.Duration, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var first, last string
	lines := 0
	s := bufio.NewScanner(f)
	for s.Scan() {
		stamp, rest, _ := strings.Cut(s.Text(), " ")
		if !strings.HasPrefix(rest, "stdout") {
			continue
		}
		if lines == 0 {
			first = stamp
		}
		last = stamp
		lines++
	}
	if lines < logBytes/pattern.LineBytes {
		return 0, errors.Join(s.Err(), fmt.Errorf("%d lines of %d: %w", lines, logBytes/pattern.LineBytes, errdefs.ErrUnavailable))
	}
	from, err1 := time.Parse(time.RFC3339Nano, first)
	to, err2 := time.Parse(time.RFC3339Nano, last)
	return to.Sub(from), errors.Join(err1, err2)
}

// network measures TCP and UDP between the host and who serves and echoes at an address.
func (r *report) network(ctx context.Context, side, suffix, ip string) error {
	tcp, udp := net.JoinHostPort(ip, strconv.Itoa(servePort)), net.JoinHostPort(ip, strconv.Itoa(echoPort))
	err := awaitServer(ctx, tcp)
	rate := func(name string, move func(string, int64, uint64) error) error {
		began := time.Now()
		err := errors.Join(err, move(tcp, streamBytes, 1))
		r.add(name+suffix, side, streamBytes/(1<<20)/time.Since(began).Seconds(), err)
		return err
	}
	errs := []error{rate("tcp_from_pod_mib_per_second", pattern.Recv), rate("tcp_to_pod_mib_per_second", pattern.Send)}
	for range requests {
		took, err := request(tcp)
		r.duration("tcp_request"+suffix, side, took, err)
		errs = append(errs, err)
	}
	return errors.Join(append(errs, r.datagrams(side, suffix, udp))...)
}

// awaitServer waits until somebody listens.
func awaitServer(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, testnode.Scale(time.Minute))
	defer cancel()
	return testnode.Eventually(ctx, func(context.Context) error {
		_, err := request(addr)
		return err
	})
}

// request is a connection, a question, its answer and the end.
func request(addr string) (time.Duration, error) {
	began := time.Now()
	c, err := net.DialTimeout("tcp", addr, testnode.Scale(datagramPatient))
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if err := c.SetDeadline(began.Add(testnode.Scale(datagramPatient))); err != nil {
		return 0, err
	}
	if _, err := io.WriteString(c, "GET / HTTP/1.0\n"); err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, c)
	return time.Since(began), err
}

// datagrams measures round trips of one datagram, and how many come back a second with
// several on their way. One that is lost is waited for in vain, and fails.
func (r *report) datagrams(side, suffix, addr string) error {
	c, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	buf := make([]byte, datagramBytes)
	trip := func(size, onWay, inAll int) (time.Duration, error) {
		began := time.Now()
		if err := c.SetDeadline(began.Add(testnode.Scale(datagramPatient))); err != nil {
			return 0, err
		}
		for sent, back := 0, 0; back < inAll; {
			if sent < inAll && sent-back < onWay {
				if _, err := c.Write(buf[:size]); err != nil {
					return 0, err
				}
				sent++
				continue
			}
			if _, err := c.Read(buf); err != nil {
				return 0, fmt.Errorf("%d of %d datagrams came back: %w", back, inAll, err)
			}
			back++
		}
		return time.Since(began), nil
	}
	var errs []error
	for range requests {
		took, err := trip(1, 1, 1)
		r.duration("udp_round_trip"+suffix, side, took, err)
		errs = append(errs, err)
	}
	took, err := trip(datagramBytes, datagramsOnWay, datagramsInAll)
	r.add("udp_echo_mib_per_second"+suffix, side, float64(datagramBytes*datagramsInAll)/(1<<20)/took.Seconds(), err)
	return errors.Join(append(errs, err)...)
}
