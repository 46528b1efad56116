// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxMessage is the largest gRPC message of the CRI, as kubelet has it.
const maxMessage = 16 << 20

// process is a running containerd.
type process struct {
	cmd *exec.Cmd
	// done is closed when it has ended; err is set before.
	done chan struct{}
	err  error
}

// Start starts containerd and returns when its CRI is ready. It fails at once,
// with the end of the log, if containerd ends instead.
func (n *Node) Start(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc != nil {
		return fmt.Errorf("containerd of node %s runs: %w", n.opts.Name, errdefs.ErrAlreadyExists)
	}
	p, err := n.spawn()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, Scale(90*time.Second), fmt.Errorf("containerd is not ready in time: %w", context.DeadlineExceeded))
	defer cancel()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	go func() {
		select {
		case <-p.done:
			stop(fmt.Errorf("containerd ended: %w", p.err))
		case <-ctx.Done():
		}
	}()
	n.proc = p
	n.pid.Store(int64(p.cmd.Process.Pid))
	if err := n.ready(ctx); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		tail := n.LogTail(4096)
		return errors.Join(fmt.Errorf("%w\n%s", err, tail), n.end(syscall.SIGKILL))
	}
	return nil
}

// spawn executes containerd, its output appended to the log.
func (n *Node) spawn() (*process, error) {
	log, err := os.OpenFile(n.LogPath(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(n.opts.BinDir, "containerd"), "--config", n.ConfigPath())
	cmd.Env = append(n.env(), n.opts.Env...)
	cmd.Dir = n.dir
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting containerd: %w", err)
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	go func() {
		if p.err = cmd.Wait(); p.err == nil {
			p.err = errors.New("exit status 0")
		}
		close(p.done)
	}()
	return p, nil
}

// env is the environment of containerd and crictl.
func (n *Node) env() []string {
	env := []string{
		"PATH=" + n.opts.BinDir + ":" + os.Getenv("PATH") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + n.Dir("tmp"),
		"TMPDIR=" + n.Dir("tmp"),
	}
	for _, k := range []string{
		"GOCOVERDIR", "GORACE", "SSL_CERT_FILE", "SSL_CERT_DIR",
		"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
	} {
		if v, ok := os.LookupEnv(k); ok {
			env = append(env, k+"="+v)
		}
	}
	return env
}

// ready waits until CRI answers that runtime and network are ready.
func (n *Node) ready(ctx context.Context) error {
	if err := n.connect(); err != nil {
		return err
	}
	rt := runtimeapi.NewRuntimeServiceClient(n.conn)
	var st *runtimeapi.StatusResponse
	// The socket opens before CRI has taken up its pods, and nothing tells when it has.
	err := Eventually(ctx, func(ctx context.Context) (err error) {
		st, err = rt.Status(ctx, &runtimeapi.StatusRequest{}, grpc.WaitForReady(true))
		return err
	})
	if err != nil {
		return fmt.Errorf("asking CRI's status: %w", err)
	}
	for _, c := range st.GetStatus().GetConditions() {
		if !c.GetStatus() && c.GetType() == runtimeapi.RuntimeReady {
			return fmt.Errorf("%s is false: %s: %s: %w", c.GetType(), c.GetReason(), c.GetMessage(), errdefs.ErrUnavailable)
		}
	}
	return n.ensurePause(ctx)
}

// connect makes the clients; they reconnect by themselves later.
func (n *Node) connect() error {
	if n.conn != nil {
		return nil
	}
	conn, err := grpc.NewClient(n.Endpoint(),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", n.Dir("c.sock"))
		}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.2, MaxDelay: 250 * time.Millisecond}}))
	if err != nil {
		return fmt.Errorf("connecting to containerd: %w", err)
	}
	c, err := containerd.NewWithConn(conn, containerd.WithDefaultNamespace(Namespace))
	if err != nil {
		conn.Close()
		return fmt.Errorf("connecting to containerd: %w", err)
	}
	n.conn, n.ctrd = conn, c
	return nil
}

// client is the connection to containerd; before the first Start it dials in vain.
func (n *Node) client() *grpc.ClientConn {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.connect(); err != nil {
		panic(err) // the target is a constant form; only a bug makes it invalid
	}
	return n.conn
}

// Stop ends containerd by SIGTERM and waits; pods run on. It returns
// ErrDeadlineExceeded, after a SIGKILL, if containerd takes too long.
func (n *Node) Stop(context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.end(syscall.SIGTERM)
}

// Kill ends containerd by SIGKILL and waits; pods run on.
func (n *Node) Kill(context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.end(syscall.SIGKILL)
}

// Restart is Stop (or, if kill is true, Kill) and Start.
func (n *Node) Restart(ctx context.Context, kill bool) error {
	end := n.Stop
	if kill {
		end = n.Kill
	}
	if err := end(ctx); err != nil {
		return err
	}
	return n.Start(ctx)
}

// end signals containerd and waits for it. n.mu is held.
func (n *Node) end(sig syscall.Signal) error {
	p := n.proc
	if p == nil {
		return nil
	}
	n.proc = nil
	n.pid.Store(0)
	// An ended process cannot be signalled, which is what is wanted.
	_ = p.cmd.Process.Signal(sig)
	limit := time.NewTimer(Scale(30 * time.Second))
	defer limit.Stop()
	select {
	case <-p.done:
		return nil
	case <-limit.C:
		_ = p.cmd.Process.Kill()
		<-p.done
		return fmt.Errorf("containerd did not end on signal %d: %w", sig, context.DeadlineExceeded)
	}
}

// Ended is closed when the containerd that Start has started has ended, by itself too;
// nil if there is none.
func (n *Node) Ended() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc == nil {
		return nil
	}
	return n.proc.done
}

// Pid is containerd's process ID, 0 when it does not run.
func (n *Node) Pid() int { return int(n.pid.Load()) }

// Context returns ctx with the CRI's containerd namespace.
func (n *Node) Context(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, Namespace)
}

// Crictl runs crictl on the node and returns its standard output and error. The
// error is an *exec.ExitError when crictl fails.
func (n *Node) Crictl(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	return output(n.CrictlCommand(ctx, args...))
}

// Ctl runs cloudhvctl on the node and returns its standard output and error. The
// error is an *exec.ExitError when cloudhvctl fails.
func (n *Node) Ctl(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	base := []string{"--address", n.Dir("c.sock"), "--timeout", Scale(2 * time.Minute).String()}
	cmd := exec.CommandContext(ctx, filepath.Join(n.opts.BinDir, "cloudhvctl"), append(base, args...)...)
	cmd.Env, cmd.Dir = n.env(), n.dir
	return output(cmd)
}

// output runs a command and returns the ends of what it prints.
func output(cmd *exec.Cmd) (stdout, stderr string, err error) {
	var out, errOut limitedBuffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

// CrictlCommand is a crictl command for the node that has not been started.
func (n *Node) CrictlCommand(ctx context.Context, args ...string) *exec.Cmd {
	base := []string{"--runtime-endpoint", n.Endpoint(), "--image-endpoint", n.Endpoint(), "--timeout", Scale(2 * time.Minute).String(), "--config", n.crictlConfig()}
	cmd := exec.CommandContext(ctx, filepath.Join(n.opts.BinDir, "crictl"), append(base, args...)...)
	cmd.Env, cmd.Dir = n.env(), n.dir
	return cmd
}
