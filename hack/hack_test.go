// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package hack has no code: its tests run the scripts, with commands in PATH
// that stand for those that would change the machine.
package hack

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// fakes makes a directory of shell scripts, by name and text.
func fakes(t *testing.T, scripts map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range scripts {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/bash\n"+text+"\n"), 0o700))
	}
	return dir
}

// run runs a script with dir first in PATH and returns all that it printed, and
// its exit status.
func run(t *testing.T, dir string, env []string, name string, args ...string) (string, int) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), append(env, "PATH="+dir+":"+os.Getenv("PATH"), "NO_COLOR=1")...)
	out, err := cmd.CombinedOutput()
	if exit := (&exec.ExitError{}); !errors.As(err, &exit) {
		require.NoError(t, err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// ordinaryUser are the commands by which a script finds that it is not root, and
// a sudo that keeps nothing of the environment.
var ordinaryUser = map[string]string{
	"id":   "echo 1000",
	"sudo": `[[ $1 != -n ]] || shift; [[ $1 != -- ]] || shift; exec env -i "$@"`,
}

func TestAsRootKeepsWhatIsNeeded(t *testing.T) {
	t.Parallel()
	kept := []string{
		"HTTP_PROXY=http://p:1", "https_proxy=http://p:2", "No_Proxy=a b", "ALL_PROXY=x", "GOPROXY=off", "GOFLAGS=-x",
		"CGO_ENABLED=0", "SSL_CERT_FILE=/c", "E2E_NAME=n", "IMAGE=i", "HOME=/h",
	}
	env := append([]string{"SECRET=s", "GO=x", "BASH_FUNC_f%%=() { GOX=1\n}"}, kept...)
	dir := fakes(t, ordinaryUser)
	out, code := run(t, dir, env, "./as-root", "/usr/bin/env")
	require.Zero(t, code, out)
	got := strings.Split(strings.TrimSpace(out), "\n")
	require.Subset(t, got, kept)
	require.NotContains(t, out, "SECRET=")
	require.NotContains(t, out, "GOX=")
	require.Contains(t, out, "PATH="+dir+":")
}

func TestAsRootGivesTheStatus(t *testing.T) {
	t.Parallel()
	out, code := run(t, fakes(t, ordinaryUser), nil, "./as-root", "sh", "-c", "exit 7")
	require.Equal(t, 7, code)
	require.Empty(t, out)
	asks := map[string]string{"id": "echo 1000", "sudo": "exit 1"}
	out, code = run(t, fakes(t, asks), nil, "./as-root", "true")
	require.Equal(t, 1, code)
	require.Contains(t, out, "sudo wants a password")
}

// What cannot be checked is said, by an exit status of its own.
func TestGeneratedCodeIsNotCheckedInSilence(t *testing.T) {
	t.Parallel()
	out, code := run(t, fakes(t, map[string]string{"protoc": "echo libprotoc 1.2.3"}), nil, "./generate.sh", "--check")
	require.Equal(t, 3, code, out)
	require.Contains(t, out, "NOT CHECKED, as protoc 3.21.12 is not here (found: libprotoc 1.2.3)")
}

func TestKernelConfigurationIsNotCheckedInSilence(t *testing.T) {
	t.Parallel()
	const script = "../guest/kernel/build.sh"
	out, code := run(t, t.TempDir(), []string{"LINUX_SOURCE=/nonexistent/source"}, script, "--check-config", "arm64")
	require.Equal(t, 3, code, out)
	require.Regexp(t, "NOT CHECKED, (no kernel source at /nonexistent/source|missing tools)", out)
	out, code = run(t, t.TempDir(), nil, script, "--check-config", "vax")
	require.Equal(t, 1, code, out)
	require.Contains(t, out, "no configuration for architecture vax")
}

// debian stands for a Debian that has libc6, and on which bad, with its library,
// can be downloaded and not installed.
func debian(t *testing.T) string {
	t.Helper()
	return fakes(t, map[string]string{
		"dpkg-query": `[[ ${*: -1} == libc6 ]] && echo installed`,
		"apt-get": `
			case " $* " in
			*" download "*) for p in "$@"; do [[ $p != *bad* ]] || : >"${p}_1.0_all.deb"; done ;;
			*" Dir::State::status=/dev/null "*) printf 'Inst %s (1.0)\n' libc6 libbad bad ;;
			*) echo "E: Unable to correct problems" >&2; exit 100 ;;
			esac`,
		"dpkg-deb": `
			lib=$HOST_DIR/root/usr/lib/$(uname -m)-linux-gnu
			case "$1 $2" in
			"-x "*/bad_*)
				mkdir -p "$3/usr/bin" "$3/usr/include"
				printf '#!/bin/sh\necho "$LD_LIBRARY_PATH $C_INCLUDE_PATH $0"\n' >"$3/usr/bin/bad"
				chmod +x "$3/usr/bin/bad" ;;
			"-x "*)
				mkdir -p "$lib/pkgconfig"
				printf 'prefix=/usr\nlibdir=${prefix}/lib\nLibs: -L/usr/lib/x -lbad\n' >"$lib/pkgconfig/bad.pc" ;;
			*/bad_*) tar -C "$HOST_DIR/root" -c ./usr/bin/bad ;;
			*) tar -c -T /dev/null ;;
			esac`,
	})
}

// What cannot be installed is unpacked with what it needs, and usable then.
func TestWhatConflictsIsUnpacked(t *testing.T) {
	t.Parallel()
	host := filepath.Join(t.TempDir(), "host")
	const script = `
		source lib.sh; source setup/unpack.sh
		installed() { [[ $(dpkg-query -W "$1") == installed ]]; }
		unpack bad
		"$HOST_DIR/bin/bad"
		absent <<<$'libc6\nlibbad\nbad\nother'`
	out, code := run(t, debian(t), []string{"HOST_DIR=" + host, "LD_LIBRARY_PATH=", "C_INCLUDE_PATH="}, "bash", "-euo", "pipefail", "-c", script)
	require.Zero(t, code, out)
	require.Contains(t, out, "bad cannot be installed beside what is here: unpacking libbad bad into")
	root := filepath.Join(host, "root")
	require.Regexp(t, "(?m)^"+root+"/usr/lib/[^:]+ "+root+"/usr/include[^ ]* "+root+"/usr/bin/bad$", out)
	require.True(t, strings.HasSuffix(out, "\nother\n"), "what is installed or unpacked does not come again: %s", out)
	pc, err := filepath.Glob(root + "/usr/lib/*/pkgconfig/bad.pc")
	require.NoError(t, err)
	require.Len(t, pc, 1)
	text, err := os.ReadFile(pc[0])
	require.NoError(t, err)
	require.Equal(t, "prefix="+root+"/usr\nlibdir=${prefix}/lib\nLibs: -L"+root+"/usr/lib/x -lbad\n", string(text))
}

// Files for images are unpacked with the libraries that they need, and with nothing else.
func TestPackagesForImages(t *testing.T) {
	t.Parallel()
	if release, err := os.ReadFile("/etc/os-release"); err != nil || !regexp.MustCompile(`(?m)^ID=debian$`).Match(release) {
		t.Skip("set-up knows Debian's packages only")
	}
	commands := fakes(t, map[string]string{
		"apt-cache": `echo "  Candidate: 1.0"`,
		"apt-get": `
			case " $* " in
			*" download "*) for p in "$@"; do [[ $p != *[a-z0-9] || $p == *=* || $p == download || $p == -* ]] || : >"${p}_1.0_all.deb"; done ;;
			*" Dir::State::status=/dev/null "*) printf 'Inst %s (1.0)\n' libc6 zlib1g perl-base libperl5.36 debconf "${@: -1}" ;;
			*) exit 100 ;;
			esac`,
		"dpkg-deb": `: >"$3/$(basename "$2" _1.0_all.deb)"`,
	})
	dir := filepath.Join(t.TempDir(), "files")
	out, code := run(t, commands, []string{"SKIP_SYSTEM=1"}, "setup/packages.sh", "files", "critest", dir)
	require.Equal(t, 1, code, out)
	require.Contains(t, out, "SKIP_SYSTEM=1: busybox procps util-linux nginx are not fetched")
	require.NoDirExists(t, dir)

	out, code = run(t, commands, nil, "setup/packages.sh", "files", "critest", dir)
	require.Zero(t, code, out)
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	require.Equal(t, []string{".stamp", "busybox", "libc6", "nginx", "procps", "util-linux", "zlib1g"}, names)

	out, code = run(t, commands, nil, "setup/packages.sh", "files", "critest", dir)
	require.Zero(t, code, out)
	require.Contains(t, out, "files of busybox procps util-linux nginx: up to date")
}

// Every package of a build but the certificates can be had without installing it.
func TestBuildPackagesCanBeUnpacked(t *testing.T) {
	t.Parallel()
	list, err := os.ReadFile("setup/packages.list")
	require.NoError(t, err)
	rows := 0
	for line := range strings.Lines(string(list)) {
		f := strings.Fields(line)
		if len(f) < 5 || strings.HasPrefix(line, "#") {
			continue
		}
		rows++
		require.Contains(t, []string{"run", "build", "generate", "lint", "critest"}, f[0])
		if f[1] != "ca-certificates" {
			require.Equal(t, "unpack", f[3], f[1])
		}
	}
	require.Greater(t, rows, 20)
}
