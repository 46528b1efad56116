// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	netfilter "github.com/mdlayher/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	// forwardTable is the nftables table in a pod's namespace.
	forwardTable = "cloudhv"
	// backlog is how many connections may wait at a listener; the namespace's
	// net.core.somaxconn bounds it too.
	backlog = 1024
	// portTries is how often a port is looked for that is free in both families.
	portTries = 8
)

// Forward is the near end of a pod's port-forwards: listeners that get every TCP
// connection which is made in the pod's namespace to its localhost, whatever the port.
//
// A forward is asked for by a program on the host that enters the pod's namespace and
// connects to localhost, where by another runtime the service is. Nothing of the VM is
// in the namespace, so nftables redirects such connections to one port, and each tells
// the port that it was made to by SO_ORIGINAL_DST. The listeners are bound to 127.0.0.1
// and ::1, which nobody reaches from outside of the namespace, and what the pod
// sends and gets does not pass its IP stack.
type Forward struct {
	// Listeners are one for IPv4, and one for IPv6 where the host has it. They keep the
	// namespace as long as they are open.
	Listeners []*os.File
}

// Close closes the listeners' files.
func (f *Forward) Close() error {
	var errs []error
	for _, l := range f.Listeners {
		errs = append(errs, l.Close())
	}
	f.Listeners = nil
	return errors.Join(errs...)
}

// Listen makes the near end of port-forwards in the namespace at path. The redirection
// goes with the namespace, or by Clear. It refuses the namespace of this process,
// which is the host's, by ErrInvalidArgument. After an error there is nothing of it.
func Listen(_ context.Context, path string) (_ *Forward, retErr error) {
	ns, err := openNS(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	if err := refuseOwn(ns, path); err != nil {
		return nil, err
	}
	f := &Forward{}
	defer func() {
		if retErr != nil {
			_ = f.Close()
		}
	}()
	var port uint16
	err = inNetNS(ns, func() error {
		port, err = f.listen()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen for port-forwards: %w", err)
	}
	err = redirectLocalhost(ns, port)
	if errors.Is(err, unix.EEXIST) {
		// Removing takes the kernel 10 ms and more, so it is not done for nothing.
		if err = removeRedirection(ns); err == nil {
			err = redirectLocalhost(ns, port)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("redirect to port %d, for port-forwards: %w", port, err)
	}
	return f, nil
}

// refuseOwn keeps the host's own namespace from being redirected.
func refuseOwn(ns netns.NsHandle, path string) error {
	var own, theirs unix.Stat_t
	if err := errors.Join(unix.Stat("/proc/thread-self/ns/net", &own), unix.Fstat(int(ns), &theirs)); err != nil {
		return fmt.Errorf("look at network namespace %s: %w", path, err)
	}
	if own.Dev == theirs.Dev && own.Ino == theirs.Ino {
		return fmt.Errorf("network namespace %s is the host's: want the pod's own: %w", path, errdefs.ErrInvalidArgument)
	}
	return nil
}

// listen makes the listeners, on the same port, in the thread's namespace.
func (f *Forward) listen() (uint16, error) {
	for try := 1; ; try++ {
		v4, port, err := listenOn(&unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
		if err != nil {
			return 0, err
		}
		f.Listeners = append(f.Listeners, v4)
		v6, _, err := listenOn(&unix.SockaddrInet6{Addr: [16]byte{15: 1}, Port: int(port)})
		switch {
		case err == nil:
			f.Listeners = append(f.Listeners, v6)
			return port, nil
		case errors.Is(err, unix.EAFNOSUPPORT):
			return port, nil
		case !errors.Is(err, unix.EADDRINUSE) || try == portTries:
			return 0, err
		}
		if err := f.Close(); err != nil {
			return 0, err
		}
	}
}

// listenOn makes a listener, and tells its port. That the address may not be there yet,
// as lo is down, or never, as IPv6 is off, is no error.
func listenOn(addr unix.Sockaddr) (_ *os.File, port uint16, retErr error) {
	family, level, freebind := unix.AF_INET, unix.IPPROTO_IP, unix.IP_FREEBIND
	if _, ok := addr.(*unix.SockaddrInet6); ok {
		family, level, freebind = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_FREEBIND
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("make a socket: %w", err)
	}
	defer func() {
		if retErr != nil {
			_ = unix.Close(fd)
		}
	}()
	if err := unix.SetsockoptInt(fd, level, freebind, 1); err != nil {
		return nil, 0, fmt.Errorf("let a socket bind to an address that is not there yet: %w", err)
	}
	if err := unix.Bind(fd, addr); err != nil {
		return nil, 0, fmt.Errorf("bind: %w", err)
	}
	if err := unix.Listen(fd, backlog); err != nil {
		return nil, 0, fmt.Errorf("listen: %w", err)
	}
	bound, err := unix.Getsockname(fd)
	if err != nil {
		return nil, 0, fmt.Errorf("look at a socket's port: %w", err)
	}
	switch bound := bound.(type) {
	case *unix.SockaddrInet4:
		port = uint16(bound.Port) //nolint:gosec // the kernel's
	case *unix.SockaddrInet6:
		port = uint16(bound.Port) //nolint:gosec // the kernel's
	}
	return os.NewFile(uintptr(fd), "port-forward"), port, nil
}

// openNftables opens nftables in a namespace, for one Flush. A kernel that does not know
// nftables leaves most of a batch unanswered, for which a Flush would wait.
func openNftables(ns netns.NsHandle) (*nftables.Conn, error) {
	return nftables.New(nftables.WithNetNSFd(int(ns)), nftables.WithSockOptions(func(c *netfilter.Conn) error {
		return c.SetReadDeadline(time.Now().Add(socketTimeout))
	}))
}

// redirectLocalhost has the namespace's own connections to localhost come to port. It
// fails by EEXIST if there is a table already.
func redirectLocalhost(ns netns.NsHandle, port uint16) error {
	conn, err := openNftables(ns)
	if err != nil {
		return err
	}
	table := &nftables.Table{Name: forwardTable, Family: nftables.TableFamilyINet}
	conn.CreateTable(table)
	output := conn.AddChain(&nftables.Chain{
		Name: "output", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookOutput,
		// Before others, as the first that translates a connection is the only one.
		Priority: new(*nftables.ChainPriorityNATDest - 1),
	})
	// Two connections from one port, to two, would be the same after the redirection.
	// Where there is such a chain, the kernel gives the later one another source port.
	conn.AddChain(&nftables.Chain{
		Name: "postrouting", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting,
		Priority: nftables.ChainPriorityNATSource,
	})
	for _, to := range [][]expr.Any{
		{ // ip daddr 127.0.0.0/8
			&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
			&expr.Cmp{Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 1},
			&expr.Cmp{Register: 1, Data: []byte{127}},
		},
		{ // ip6 daddr ::1
			&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
			&expr.Cmp{Register: 1, Data: []byte{unix.NFPROTO_IPV6}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 24, Len: 16},
			&expr.Cmp{Register: 1, Data: []byte{15: 1}},
		},
	} {
		conn.AddRule(&nftables.Rule{Table: table, Chain: output, Exprs: append(to,
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
			&expr.Redir{RegisterProtoMin: 1},
		)})
	}
	return conn.Flush()
}

// removeRedirection undoes redirectLocalhost. A host that cannot redirect has nothing to
// undo, and neither has a namespace without the table.
func removeRedirection(ns netns.NsHandle) error {
	conn, err := openNftables(ns)
	if err != nil {
		return err
	}
	conn.DelTable(&nftables.Table{Name: forwardTable, Family: nftables.TableFamilyINet})
	err = conn.Flush()
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove nftables table %s: %w", forwardTable, err)
	}
	return nil
}
