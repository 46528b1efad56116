// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// serve is what the container runs: it logs a line, and a web server says where it is.
const serve = `mkdir -p /tmp/www
echo "Hello from $(hostname), on kernel $(uname -r)" > /tmp/www/index.html
echo "serving on port 8080"
exec httpd -f -p 8080 -h /tmp/www`

// podLabels are what kubelet gives to containers, by which crictl names their pod.
var podLabels = map[string]string{"io.kubernetes.pod.name": "web", "io.kubernetes.pod.namespace": "default"}

// demo plays its steps in order; each leaves in it what the later ones need.
type demo struct {
	node *testnode.Node
	out  *printer
	// extra is the reference of another image to run; empty for none.
	extra string

	before testnode.Census
	// site is where the node leaves its traces; first, during and last are those
	// before there was a node, with the pod, and after the end.
	site                site
	first, during, last footprint
	closed              bool
	// podID and webID are the pod and its container; podIP its address by CNI.
	podID, webID, podIP string
	// info is what the plugin tells of the pod.
	info podInfo
}

// versions shows who takes part.
func (d *demo) versions(ctx context.Context) error {
	bin := func(name string) string { return filepath.Join(d.node.Repo(), "build", "bin", name) }
	guest := filepath.Join(d.node.Repo(), "build", "guest")
	d.out.title("containerd-cloudhv: a pod in a virtual machine of its own")
	d.out.section("Who takes part", "All of it is real: nothing is simulated but, where the host has no KVM, the processor.")
	d.out.fact("host kernel", hostKernel())
	d.out.fact("containerd", strings.TrimPrefix(firstLine(ctx, bin("containerd"), "--version"), "containerd "))
	d.out.fact("QEMU", strings.TrimPrefix(firstLine(ctx, "qemu-system-x86_64", "--version"), "QEMU emulator version "))
	d.out.fact("guest kernel", fileLine(filepath.Join(guest, "kernel.version")))
	d.out.fact("guest crun", strings.TrimPrefix(fileLine(filepath.Join(guest, "crun.version")), "crun "))
	d.out.fact("crictl", strings.TrimPrefix(firstLine(ctx, bin("crictl"), "--version"), "crictl version "))
	return nil
}

// start brings up the private containerd and tells which hypervisor it chose.
func (d *demo) start(ctx context.Context) error {
	d.out.section("A private containerd", "Its root, state, sockets and network are its own: a containerd or Docker on this host is not touched.")
	if err := d.out.timed("containerd --config "+d.node.ConfigPath(), func() error { return d.node.Start(ctx) }); err != nil {
		return err
	}
	resp, err := d.node.Containerd().IntrospectionService().Plugins(d.node.Context(ctx), "type==io.containerd.sandbox.controller.v1,id==cloudhv")
	if err != nil {
		return fmt.Errorf("asking for the plugin: %w", err)
	}
	if len(resp.GetPlugins()) != 1 {
		return errors.New("containerd has no sandbox controller cloudhv")
	}
	exports := resp.GetPlugins()[0].GetExports()
	if exports["ready"] != "true" {
		return fmt.Errorf("the plugin cannot serve here: %s", exports["reason"])
	}
	d.out.fact("hypervisor", exports["hypervisor"]+" "+exports["hypervisor_version"])
	d.out.fact("", "because "+exports["hypervisor_reason"])
	d.out.fact("accelerator", exports["accelerator"])
	d.out.fact("", exports["accelerator_reason"])
	return nil
}

// images brings in the demo's image, and the one that was asked for.
func (d *demo) images(ctx context.Context) error {
	d.out.section("An image", "Made here in process from Debian's static busybox, so that no registry is needed.")
	err := d.out.timed("import "+testimage.BusyboxRef, func() error {
		img, err := testimage.Busybox()
		if err != nil {
			return err
		}
		return d.node.Import(ctx, testimage.BusyboxRef, img)
	})
	if err != nil {
		return err
	}
	if d.extra != "" {
		if _, err := d.crictl(ctx, "pull", d.extra); err != nil {
			return err
		}
	}
	return nil
}

// poolLimit is how long the demo waits for a virtual machine to be ready: there
// need not be one.
const poolLimit = time.Minute

// pool waits until a virtual machine is ready that nobody has asked for.
func (d *demo) pool(ctx context.Context) (err error) {
	d.out.section("The pool", "Once for each kernel, image and hypervisor a machine boots and a snapshot is made of it. "+
		"Machines are then restored from that, copy-on-write, and kept ready.")
	wait, cancel := context.WithTimeout(ctx, testnode.Scale(poolLimit))
	defer cancel()
	if _, err := d.ctl(wait, "fill"); err != nil {
		d.out.note("None is ready; the pod's will be restored, or boot.")
	}
	status, err := d.ctl(ctx, "status")
	if err != nil {
		return err
	}
	// What comes before has been shown.
	d.out.output(status[max(0, strings.Index(status, "\npool")+1):])
	d.before, err = d.node.Census(ctx)
	return err
}

// outcomes say how a pod came by its machine.
var outcomes = map[string]string{"hit": "it was ready", "miss": "it was restored", "cold": "it was booted"}

// pod runs the pod and its container.
func (d *demo) pod(ctx context.Context) error {
	d.out.section("The pod", "CNI gives it a network, then it gets a virtual machine of its own; the container runs inside.")
	pod := d.node.PodConfig("web")
	container := testnode.ContainerConfig("httpd", testimage.BusyboxRef, "/bin/sh", "-c", serve)
	container.Labels = podLabels
	if err := errors.Join(os.MkdirAll(pod.GetLogDirectory(), 0o755), d.writeConfig("pod.json", pod), d.writeConfig("httpd.json", container)); err != nil {
		return err
	}
	id, err := d.crictl(ctx, "runp", "--runtime", testnode.CloudHV, d.node.Dir("pod.json"))
	if err != nil {
		return err
	}
	d.podID = id
	if d.webID, err = d.crictl(ctx, "create", d.podID, d.node.Dir("httpd.json"), d.node.Dir("pod.json")); err != nil {
		return err
	}
	if _, err := d.crictl(ctx, "start", d.webID); err != nil {
		return err
	}
	out, err := d.crictl(ctx, "inspectp", "-o", "json", d.podID)
	if err != nil {
		return err
	}
	if err := d.readInspect(out); err != nil {
		return err
	}
	fmt.Fprintln(d.out.w)
	d.out.fact("virtual machine", fmt.Sprintf("%d vCPU, %s, kernel %s", d.info.VCPUs, mib(d.info.MemoryBytes), printable(d.info.GuestKernel, 60)))
	d.out.fact("came by", d.info.Outcome+": "+outcomes[d.info.Outcome])
	d.out.fact("address", d.podIP)
	return nil
}

// readInspect takes what later steps need from `crictl inspectp`.
func (d *demo) readInspect(out string) error {
	var inspect struct {
		Status struct {
			Network struct {
				IP string `json:"ip"`
			} `json:"network"`
		} `json:"status"`
		CloudHV podInfo `json:"cloudhv"`
	}
	if err := json.Unmarshal([]byte(out), &inspect); err != nil {
		return fmt.Errorf("reading inspectp: %w", err)
	}
	d.podIP, d.info = inspect.Status.Network.IP, inspect.CloudHV
	if d.podIP == "" {
		return errors.New("the pod has no address")
	}
	return nil
}

// podInfo is the part that the demo shows of what the plugin tells of a pod.
type podInfo struct {
	Outcome     string `json:"outcome"`
	GuestKernel string `json:"guest_kernel"`
	VCPUs       int    `json:"vcpus"`
	MemoryBytes uint64 `json:"memory_bytes"`
	VMMPid      int    `json:"vmm_pid"`
	ShimPid     int    `json:"shim_pid"`
	Phases      []struct {
		Name     string `json:"name"`
		AtUsec   int64  `json:"at_usec"`
		TookUsec int64  `json:"took_usec"`
	} `json:"phases"`
}

// phases shows where the time of the start went.
func (d *demo) phases(context.Context) error {
	if len(d.info.Phases) == 0 {
		return nil
	}
	d.out.section("Where the time went", "The plugin's own part of RunPodSandbox, from `crictl inspectp`; parts may overlap.")
	var whole time.Duration
	for _, p := range d.info.Phases {
		whole = max(whole, time.Duration(p.AtUsec+p.TookUsec)*time.Microsecond)
	}
	for _, p := range d.info.Phases {
		at, took := time.Duration(p.AtUsec)*time.Microsecond, time.Duration(p.TookUsec)*time.Microsecond
		d.out.fact(printable(p.Name, 18), fmt.Sprintf("|%s| %7.1f ms", strings.ReplaceAll(bar(at, took, whole, 40), " ", "."), float64(took.Microseconds())/1000))
	}
	return nil
}

// inside compares the pod with the host.
func (d *demo) inside(ctx context.Context) error {
	d.out.section("Inside", "Each line is a command that `crictl exec` runs in the container.")
	for _, c := range []string{"uname -r", "hostname", "nproc", "head -n 1 /proc/meminfo", "ip -4 addr show dev eth0", "ps"} {
		out, err := d.crictl(ctx, append([]string{"exec", d.webID}, strings.Fields(c)...)...)
		if err != nil {
			return err
		}
		if c == "uname -r" {
			out = table([]string{"in the pod\t" + out, "on the host\t" + hostKernel()})
		}
		d.out.output(out)
	}
	return nil
}

// logs shows what the container wrote.
func (d *demo) logs(ctx context.Context) error {
	d.out.section("Logs", "What the container wrote, carried from the guest to the file that kubelet would read.")
	out, err := d.crictl(ctx, "logs", d.webID)
	if err == nil {
		d.out.output(out)
	}
	return err
}

// http fetches a page from the pod over its CNI address.
func (d *demo) http(ctx context.Context) error {
	d.out.section("Network", "The host asks the web server in the pod, at the address that CNI gave it.")
	url := "http://" + net.JoinHostPort(d.podIP, "8080") + "/"
	var body []byte
	err := d.out.timed("GET "+url, func() error {
		ctx, cancel := context.WithTimeout(ctx, testnode.Scale(commandLimit))
		defer cancel()
		// The server may be a moment behind its container's start.
		return testnode.Eventually(ctx, func(ctx context.Context) (err error) {
			body, err = get(ctx, url)
			return err
		})
	})
	if err == nil {
		d.out.output(string(body))
	}
	return err
}

// get fetches a page, of which the first part is enough.
func get(ctx context.Context, url string) ([]byte, error) {
	tr := &http.Transport{DisableKeepAlives: true}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", url, resp.Status)
	}
	return io.ReadAll(io.LimitReader(resp.Body, 4096))
}

// extraContainer runs the image that was asked for in the same pod.
func (d *demo) extraContainer(ctx context.Context) error {
	if d.extra == "" {
		return nil
	}
	d.out.section("Your image", "A second container in the same virtual machine, with the image's own command.")
	container := testnode.ContainerConfig("extra", d.extra)
	container.Labels = podLabels
	if err := d.writeConfig("extra.json", container); err != nil {
		return err
	}
	id, err := d.crictl(ctx, "create", d.podID, d.node.Dir("extra.json"), d.node.Dir("pod.json"))
	if err != nil {
		return err
	}
	if _, err := d.crictl(ctx, "start", id); err != nil {
		return err
	}
	// It is another's image: that it has no uname, or has ended already, is no failure.
	if out, err := d.crictl(ctx, "exec", id, "uname", "-r"); err == nil {
		d.out.output(out)
	}
	out, err := d.crictl(ctx, "logs", id)
	if err == nil {
		d.out.output(out)
	}
	return err
}

// memory shows what the pod costs the host.
func (d *demo) memory(ctx context.Context) error {
	d.out.section("What it costs", "Memory of the pod's processes on the host, from /proc/PID/smaps_rollup, while the server idles.")
	for _, list := range []string{"pods", "ps"} {
		out, err := d.crictl(ctx, list)
		if err != nil {
			return err
		}
		d.out.output(squeeze(out))
	}
	rows := []string{"PROCESS\tPID\tPRIVATE\tPSS"}
	var sum process
	for _, pid := range []int{d.info.VMMPid, d.info.ShimPid} {
		p, err := measure(pid)
		if err != nil {
			return err
		}
		sum.private, sum.pss = sum.private+p.private, sum.pss+p.pss
		rows = append(rows, fmt.Sprintf("%s\t%d\t%s\t%s", p.name, pid, mib(p.private), mib(p.pss)))
	}
	rows = append(rows, fmt.Sprintf("together\t\t%s\t%s", mib(sum.private), mib(sum.pss)))
	fmt.Fprintln(d.out.w)
	d.out.output(table(rows))
	return nil
}

// cleanUp removes the pod and sees that nothing is left of it, then all the rest.
func (d *demo) cleanUp(ctx context.Context) (err error) {
	d.out.section("Clean-up", "The pod goes, then containerd. What they made on the host is then looked for again.")
	if d.during, err = d.site.look(nil); err != nil {
		return err
	}
	for _, args := range [][]string{{"stopp", d.podID}, {"rmp", d.podID}} {
		if _, err := d.crictl(ctx, args...); err != nil {
			return err
		}
	}
	wait, cancel := context.WithTimeout(ctx, testnode.Scale(commandLimit))
	defer cancel()
	err = testnode.Eventually(wait, func(ctx context.Context) error {
		after, err := d.node.Census(ctx)
		if err != nil {
			return err
		}
		if left := leaks(after.Diff(d.before)); len(left) > 0 {
			return fmt.Errorf("the pod left something behind: %s", strings.Join(left, ", "))
		}
		return nil
	})
	if err != nil {
		return err
	}
	d.out.note("Of the pod nothing is left; for the next one containerd keeps the image as one erofs file, and the template of the writable disk.")
	fmt.Fprintln(d.out.w)
	if err := d.out.timed("end containerd, remove "+d.node.Dir(), func() error { return d.close(ctx) }); err != nil {
		return err
	}
	fmt.Fprintln(d.out.w)
	d.out.output(footprints(d.first, d.during, d.last))
	fmt.Fprintln(d.out.w)
	d.out.note("Nothing is left.")
	fmt.Fprintln(d.out.w)
	return nil
}

// close ends the node, once, and fails if anything of it is still there.
func (d *demo) close(ctx context.Context) error {
	if d.closed {
		return nil
	}
	d.closed = true
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), testnode.Scale(cleanupLimit))
	defer cancel()
	if err := d.node.Close(ctx); err != nil {
		return err
	}
	// The kernel takes a moment to end the links of a network namespace that has gone.
	wait, cancel := context.WithTimeout(ctx, testnode.Scale(settleLimit))
	defer cancel()
	return testnode.Eventually(wait, func(context.Context) (err error) {
		if d.last, err = d.site.look(d.during); err != nil {
			return err
		}
		if lines := left(d.first, d.last); len(lines) > 0 {
			return fmt.Errorf("left behind: %s", strings.Join(lines, "; "))
		}
		return nil
	})
}

// leaks are those lines of a census's difference that tell of something left.
// The first pod of a node makes caches and directories, which stay.
func leaks(diff []string) []string {
	return slices.DeleteFunc(diff, func(line string) bool {
		_, what, _ := strings.Cut(line, " ")
		if name, ok := strings.CutPrefix(what, testnode.BlocksOf); ok {
			return !strings.HasPrefix(name, "run/")
		}
		class, name, _ := strings.Cut(what, " ")
		return class == "goroutine" || class == "open" || class == "file" && !strings.HasPrefix(name, "run/")
	})
}

// crictl runs crictl, shows the call with its time, and returns what it printed.
func (d *demo) crictl(ctx context.Context, args ...string) (string, error) {
	shown := make([]string, 0, len(args))
	for _, a := range args {
		a = strings.TrimPrefix(a, d.node.Dir()+"/")
		if len(a) == 64 && strings.Trim(a, "0123456789abcdef") == "" {
			a = a[:13] // as crictl itself shows an ID
		}
		shown = append(shown, a)
	}
	var stdout, stderr string
	err := d.out.timed("crictl "+strings.Join(shown, " "), func() (err error) {
		stdout, stderr, err = d.node.Crictl(ctx, args...)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("crictl %s: %w: %s", args[0], err, strings.TrimSpace(stderr))
	}
	if args[0] == "logs" {
		stdout += stderr
	}
	return strings.TrimSpace(stdout), nil
}

// ctl runs cloudhvctl, shows the call with its time, and returns what it printed.
func (d *demo) ctl(ctx context.Context, args ...string) (string, error) {
	var stdout, stderr string
	err := d.out.timed("cloudhvctl "+strings.Join(args, " "), func() (err error) {
		stdout, stderr, err = d.node.Ctl(ctx, args...)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("cloudhvctl %s: %w: %s", args[0], err, strings.TrimSpace(stderr))
	}
	return strings.TrimSpace(stdout), nil
}

// writeConfig writes a CRI configuration where crictl reads it.
func (d *demo) writeConfig(name string, config any) error {
	b, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(d.node.Dir(name), b, 0o600)
}
