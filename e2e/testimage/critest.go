// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testimage

import (
	"bytes"
	"fmt"
	"os/exec"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Where the CRI validation suite has its images.
const (
	criE2E     = "registry.k8s.io/e2e-test-images/"
	criStaging = "gcr.io/k8s-staging-cri-tools/"
)

// CRISuiteHosts are the registries that the suite pulls from.
var CRISuiteHosts = []string{"registry.k8s.io", "gcr.io", "k8s.gcr.io"}

// criUsers are what the suite's images have for /etc/passwd and /etc/group.
const (
	criPasswd = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/false\n" +
		"default-user:x:1000:1000:default-user:/home:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
	criGroup = "root:x:0:\nwww-data:x:33:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\nnogroup:x:65534:\n"
)

// criImages makes the images of the suite.
type criImages struct {
	pkgs *packages
	base *archive
	refs map[string]v1.Image
	err  error
}

// CRISuite makes the images that the CRI validation suite pulls, by their references,
// from the packages of hack/setup/packages.list's group critest, unpacked in root. One
// cannot be made: test-image-digest, which the suite names by the digest of its original.
// euid is the program of BuildEUID.
func CRISuite(root string, euid []byte) (map[string]v1.Image, error) {
	c := &criImages{pkgs: newPackages(root), refs: map[string]v1.Image{}}
	if err := c.pkgs.present(); err != nil {
		return nil, err
	}
	var err error
	if c.base, err = c.baseLayer(); err != nil {
		return nil, err
	}
	c.add(criE2E+"busybox:1.29-2", v1.Config{Cmd: []string{"sh"}}, nil)
	c.add(criE2E+"httpd:2.4.39-4", v1.Config{Cmd: []string{"/bin/sh", "-c", "echo httpd serves port 80; exec httpd -f -p 80 -h /www"}}, func(a *archive) error {
		a.dir("www", 0o755)
		a.file("www/index.html", 0o644, []byte("<html>It works.</html>\n"))
		return nil
	})
	c.add(criE2E+"nonewprivs:1.3", v1.Config{Cmd: []string{"/nnp"}}, func(a *archive) error {
		a.file("nnp", 0o4755, euid)
		return nil
	})
	c.addNginx(criE2E+"nginx:1.14-2", 80)
	c.addNginx(criStaging+"hostnet-nginx-"+runtime.GOARCH+":latest", 12003)
	c.addUsers()
	c.addNames()
	return c.refs, c.err
}

// BuildEUID compiles the program that prints its effective user, as BuildHelper does.
func BuildEUID(repo, dir string) ([]byte, error) { return buildGo("euid", repo, dir) }

// add makes an image of the base layer and one more, and keeps the first error.
func (c *criImages) add(ref string, cfg v1.Config, fill func(*archive) error) {
	if c.err != nil {
		return
	}
	layers := []*archive{c.base}
	if fill != nil {
		a := newArchive()
		if c.err = fill(a); c.err != nil {
			c.err = fmt.Errorf("image %s: %w", ref, c.err)
			return
		}
		layers = append(layers, a)
	}
	cfg.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	c.refs[ref], c.err = build(layers, cfg)
}

// addNginx adds an image of Debian's nginx, which listens on one port.
func (c *criImages) addNginx(ref string, port int) {
	conf := fmt.Sprintf(`user www-data;
daemon off;
worker_processes 1;
pid /var/run/nginx.pid;
error_log stderr notice;
events { worker_connections 64; }
http {
	access_log off;
	server { listen %d; root /usr/share/nginx/html; }
}
`, port)
	c.add(ref, v1.Config{Cmd: []string{"nginx"}}, func(a *archive) error {
		for _, d := range []string{"etc/nginx", "usr/sbin", "usr/share", "usr/share/nginx", "usr/share/nginx/html", "var/lib", "var/lib/nginx", "var/log/nginx"} {
			a.dir(d, 0o755)
		}
		a.file("etc/nginx/nginx.conf", 0o644, []byte(conf))
		a.file("usr/share/nginx/html/index.html", 0o644, []byte("<html>Welcome to nginx!</html>\n"))
		return c.pkgs.onTop().addProgram(a, "usr/sbin/nginx", "sbin/nginx")
	})
}

// addUsers adds the images that differ by their user.
func (c *criImages) addUsers() {
	for name, user := range map[string]string{
		"predefined-group": "1000", "user-uid": "1002", "user-username": "www-data",
		"user-uid-group": "1003:1004", "user-username-group": "www-data:1004",
	} {
		c.add(criStaging+"test-image-"+name+":latest", v1.Config{User: user, Cmd: []string{"sh"}}, nil)
	}
}

// addNames adds the images that are pulled and removed by all kinds of references:
// each with contents of its own, unless the suite wants several names of one image.
func (c *criImages) addNames() {
	for _, name := range []string{
		"test-image-latest:latest", "test-image-tag:test", "test-image-tag:all",
		"test-image-1:latest", "test-image-2:latest", "test-image-3:latest", "test-image-tags:1",
	} {
		c.addNamed(criStaging + name)
	}
	for _, tag := range []string{"2", "3"} {
		c.refs[criStaging+"test-image-tags:"+tag] = c.refs[criStaging+"test-image-tags:1"]
	}
	c.addNamed("registry.k8s.io/pause:3.9")
	c.refs["k8s.gcr.io/pause:3.9"] = c.refs["registry.k8s.io/pause:3.9"]
}

func (c *criImages) addNamed(ref string) {
	c.add(ref, v1.Config{Cmd: []string{"sleep", "infinity"}}, func(a *archive) error {
		a.file("image", 0o644, []byte(ref+"\n"))
		return nil
	})
}

// baseLayer is a busybox with a hard link for each applet, as the suite masks and reads
// single ones; pgrep and ipcs, which Debian's lacks; and the users of all images. The
// busybox is linked dynamically: a static one runs applets without executing their files.
func (c *criImages) baseLayer() (*archive, error) {
	a := newArchive()
	for _, d := range []string{"bin", "etc", "root", "home", "lib", "lib64", "sbin", "usr", "usr/bin", "var", "var/log", "var/run"} {
		a.dir(d, 0o755)
	}
	a.dir("tmp", 0o1777)
	if err := c.pkgs.addProgram(a, "bin/busybox", "bin/busybox"); err != nil {
		return nil, err
	}
	list, err := c.pkgs.command("bin/busybox", "--list")
	if err != nil {
		return nil, err
	}
	applets, err := exec.Command(list[0], list[1:]...).Output()
	if err != nil {
		return nil, fmt.Errorf("listing busybox's applets: %w", err)
	}
	own := map[string]string{"pgrep": "bin/pgrep", "ipcs": "bin/ipcs"}
	for name := range bytes.FieldsSeq(applets) {
		if n := string(name); n != "busybox" && own[n] == "" {
			a.hardLink("bin/"+n, "bin/busybox")
		}
	}
	for name, from := range own {
		if err := c.pkgs.addProgram(a, "usr/bin/"+name, from); err != nil {
			return nil, err
		}
	}
	a.file("etc/passwd", 0o644, []byte(criPasswd))
	a.file("etc/group", 0o644, []byte(criGroup))
	return a, nil
}
