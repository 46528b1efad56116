// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest/realvm"
)

// The test's own program stands in for the hypervisor: it behaves as that does towards
// its driver, with a guest that echoes, and runs no machine.
const (
	// envFake makes the program that; its value says how it behaves.
	envFake = "FAKE_CLOUD_HYPERVISOR"

	fakeSound  = "sound"
	fakeSilent = "silent" // never says that it has started
	fakeBroken = "broken" // ends with an error
)

// answerFile, in the fake's working directory, says how requests are answered.
const answerFile = "answer"

// Contents of answerFile.
const (
	answer500     = "500"
	answerGarbage = "garbage"
	answerNever   = "never"
	answerEnd     = "end" // ends the connection
)

func TestMain(m *testing.M) {
	if how := os.Getenv(envFake); how != "" {
		runFake(how, os.Args[1:])
		os.Exit(0)
	}
	attacker()
	realvm.Main(m)
}

// fakeDriver is a driver of the fake.
func fakeDriver(t *testing.T, how string) *Driver {
	t.Helper()
	dir, err := os.MkdirTemp("", "fake")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	binary := filepath.Join(dir, "cloud-hypervisor")
	script := fmt.Sprintf("#!/bin/sh\n%s=%s exec %s \"$@\"\n", envFake, how, os.Args[0])
	require.NoError(t, os.WriteFile(binary, []byte(script), 0o700)) //nolint:gosec // it is run
	d := New(binary)
	d.accelerator = func() (string, string, error) { return vmm.AccelKVM, "it is a fake", nil }
	return d
}

// fakeConfig is a configuration for the fake, which reads none of the files.
func fakeConfig(t *testing.T) vmm.Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return vmm.Config{
		ID: filepath.Base(dir), Dir: dir, Kernel: "/dev/null", RootFS: "/dev/null", ConsoleLimit: 64 << 10,
		Size: vmm.Size{VCPUs: 1, MemoryBytes: 128 << 20}, Max: vmm.Size{VCPUs: 4, MemoryBytes: 1 << 30},
	}
}

// fake is the state of one.
type fake struct {
	mu      sync.Mutex
	state   string
	cpus    int
	plugged int64
	devices map[string]bool
	used    map[string]bool // devices that the guest has set up
	events  *os.File
	// pending counts the resizes to pendingUntil.
	pending int
}

// slowDisk is a disk that the guest takes its time to set up.
const (
	slowDisk = diskPrefix + "slow"
	slowness = 300 * time.Millisecond
)

// Numbers of vCPUs that a fake refuses, and gives only after a while.
const (
	refusedVCPUs = 3
	pendingUntil = 4
)

func runFake(how string, args []string) {
	if slices.Contains(args, "--version") {
		fmt.Println("cloud-hypervisor v53.0.0")
		return
	}
	if how == fakeBroken {
		fmt.Fprintln(os.Stderr, "Error booting VM: the fake is broken")
		os.Exit(1)
	}
	api, err := net.FileListener(os.NewFile(fdAPI, "api"))
	must(err)
	con, err := net.Listen("unix", consoleSocket)
	must(err)
	guest, err := net.Listen("unix", guestSocket)
	must(err)
	f := &fake{state: stateRunning, cpus: 1, devices: map[string]bool{"_virtio-pci-root": true}, used: map[string]bool{}, events: os.NewFile(fdEvents, "events")}
	go serveGuest(guest)
	go func() {
		for {
			c, err := con.Accept()
			must(err)
			fmt.Fprintln(c, "the fake's console")
		}
	}()
	if how == fakeSound {
		name := eventBooted
		if slices.Contains(args, "--restore") {
			name = eventResumed
		}
		f.tell(sourceVM, name, nil)
	}
	for {
		c, err := api.Accept()
		must(err)
		f.serve(c)
	}
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "fake:", err)
		os.Exit(1)
	}
}

// tell writes an event as the hypervisor does.
func (f *fake) tell(source, name string, properties map[string]string) {
	text, err := json.MarshalIndent(map[string]any{"timestamp": map[string]int{"secs": 0, "nanos": 1}, "source": source, "event": name, "properties": properties}, "", "  ")
	must(err)
	_, err = f.events.Write(append(text, "\n\n"...))
	must(err)
}

// use has the guest use a device.
func (f *fake) use(id string) {
	f.used[id] = true
	f.tell(sourceDevice, eventActivated, map[string]string{propertyID: id})
}

// serve answers one request.
func (f *fake) serve(c net.Conn) {
	req, err := http.ReadRequest(bufio.NewReader(c))
	if err != nil {
		_ = c.Close()
		return
	}
	body, _ := io.ReadAll(req.Body)
	how, _ := os.ReadFile(answerFile)
	switch string(how) {
	case answerNever:
		return // it stays open
	case answerGarbage:
		_, _ = io.WriteString(c, "\x00\x01 this is not HTTP\r\n\r\n")
	case answer500:
		reply(c, "500 Internal Server Error", []string{"Error from API", "The VM is upset"})
	case answerEnd:
	default:
		status, answer := f.do(strings.TrimPrefix(req.URL.Path, "/api/v1/"), body)
		reply(c, status, answer)
	}
	_ = c.Close()
}

func reply(c net.Conn, status string, answer any) {
	if answer == nil {
		_, _ = fmt.Fprintf(c, "HTTP/1.1 %s\r\nServer: fake\r\nConnection: keep-alive\r\n\r\n", status)
		return
	}
	text, _ := json.Marshal(answer)
	_, _ = fmt.Fprintf(c, "HTTP/1.1 %s\r\nServer: fake\r\nConnection: keep-alive\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", status, len(text), text)
}

const (
	done   = "204 No Content"
	failed = "500 Internal Server Error"
)

// do runs a command.
func (f *fake) do(command string, body []byte) (status string, answer any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var args struct {
		ID    string `json:"id"`
		VCPUs int    `json:"desired_vcpus"`
		RAM   int64  `json:"desired_ram"`
		URL   string `json:"destination_url"`
	}
	_ = json.Unmarshal(body, &args)
	switch command {
	case "vm.info":
		return "200 OK", f.info()
	case "vm.pause", "vm.resume":
		to := map[string]string{"vm.pause": statePaused, "vm.resume": stateRunning}[command]
		if f.state == to {
			return failed, []string{"Error from API", "Invalid transition"}
		}
		f.state = to
	case "vm.add-disk", "vm.add-net":
		if f.devices[args.ID] {
			return failed, []string{"Error from API", "Identifier " + args.ID + " is not unique"}
		}
		f.devices[args.ID] = true
		if args.ID == slowDisk {
			time.AfterFunc(slowness, func() {
				f.mu.Lock()
				defer f.mu.Unlock()
				f.use(args.ID)
			})
		} else {
			f.use(args.ID)
		}
		return "200 OK", map[string]string{"id": args.ID, "bdf": "0000:00:05.0"}
	case "vm.remove-device":
		if !f.devices[args.ID] {
			return failed, []string{"Error from API", "Unknown device"}
		}
		if !f.used[args.ID] {
			select {} // and with it all that comes after
		}
		delete(f.used, args.ID)
		delete(f.devices, args.ID)
		f.tell(sourceVM, eventRemoved, map[string]string{propertyID: args.ID})
	case "vm.resize":
		switch args.VCPUs {
		case refusedVCPUs:
			return failed, []string{"Error from API", "Error from CPU manager", "Cannot create a vCPU"}
		case pendingUntil:
			if f.pending++; f.pending < 4 {
				return "429 ", nil // without a word
			}
		}
		f.cpus = args.VCPUs
	case "vm.resize-zone":
		f.plugged = args.RAM - 128<<20
	case "vm.snapshot":
		if err := save(strings.TrimPrefix(args.URL, "file://")); err != nil {
			return failed, []string{"Error from API", err.Error()}
		}
	default:
		return "404 Not Found", []string{"Not Found"}
	}
	return done, nil
}

// save writes what a snapshot has beside the RAM.
func save(dir string) error {
	const config = `{"memory":{"thp":false,"zones":[{"id":"ram","shared":true}]},"payload":{"kernel":"/x/kernel"}}`
	return errors.Join(os.WriteFile(filepath.Join(dir, configName), []byte(config), 0o600), os.WriteFile(filepath.Join(dir, stateName), []byte("{}"), 0o600))
}

func (f *fake) info() map[string]any {
	devices := map[string]any{}
	for id := range maps.Keys(f.devices) {
		devices[id] = map[string]any{"id": id, "pci_bdf": "0000:00:01.0"}
	}
	return map[string]any{
		"state": f.state, "memory_actual_size": 128<<20 + f.plugged, "device_tree": devices,
		"config": map[string]any{
			"cpus":   map[string]int{"boot_vcpus": f.cpus},
			"memory": map[string]any{"zones": []any{map[string]any{"id": zone, "size": 128 << 20, "hotplugged_size": f.plugged}}},
		},
	}
}

// serveGuest is the hypervisor's end of vsock, with a guest behind.
func serveGuest(l net.Listener) {
	mux := transport.NewMux()
	echo, err := mux.Listen(realvm.PortEcho)
	must(err)
	go func() {
		for {
			c, err := echo.Accept()
			must(err)
			go io.Copy(c, c) //nolint:errcheck // an echo
		}
	}()
	ports := map[string]pipeListener{}
	for _, port := range []uint32{transport.VsockVM, transport.VsockPod} {
		conns := make(pipeListener)
		ports[fmt.Sprintf("CONNECT %d\n", port)] = conns
		go mux.ServeListener(context.Background(), conns) //nolint:errcheck // it goes with the process
	}
	for {
		c, err := l.Accept()
		must(err)
		go func() {
			var line []byte
			for b := make([]byte, 1); len(line) < 32 && (len(line) == 0 || line[len(line)-1] != '\n'); line = append(line, b[0]) {
				if _, err := io.ReadFull(c, b); err != nil {
					_ = c.Close()
					return
				}
			}
			conns, ok := ports[string(line)]
			if !ok {
				_ = c.Close()
				return
			}
			_, _ = io.WriteString(c, "OK 1073741824\n")
			conns <- c
		}()
	}
}

// pipeListener is a listener to which connections are handed.
type pipeListener chan net.Conn

func (l pipeListener) Accept() (net.Conn, error) { return <-l, nil }
func (l pipeListener) Close() error              { return nil }
func (l pipeListener) Addr() net.Addr            { return transport.Addr(0) }
