// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"math"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// ill is an error with what could steer a terminal or forge lines of a log.
func ill() error {
	return status.Error(codes.Unimplemented, "\x1b[2J\r\ntime=now level=fatal msg=\"forged\" "+strings.Repeat("\u202e", 5000))
}

func (g *guest) Create(_ context.Context, r *guestv1.CreateRequest) (*guestv1.CreateResponse, error) {
	return &guestv1.CreateResponse{Pid: g.add(r.GetId(), "", r.GetStdio()).pid, Steps: manySteps()}, nil
}

// Start starts nothing. A container's process lasts until it is killed; of others the
// output is "ok", and they end at once.
func (g *guest) Start(_ context.Context, r *guestv1.StartRequest) (*guestv1.StartResponse, error) {
	g.hold()
	p, err := g.find(r.GetId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	if r.GetExecId() == "" {
		// After the answer is on its way.
		time.AfterFunc(200*time.Millisecond, g.begin)
		if g.mode == "output" {
			go flood(p.stdout)
			go flood(p.stderr)
		}
		return &guestv1.StartResponse{Pid: p.pid}, nil
	}
	if g.mode == "wrong" {
		return &guestv1.StartResponse{Pid: math.MaxUint32}, nil
	}
	go func() {
		if p.stdout != nil {
			_, _ = p.stdout.Write([]byte("ok\n"))
		}
		p.end(0)
	}()
	return &guestv1.StartResponse{Pid: p.pid}, nil
}

func (g *guest) Exec(_ context.Context, r *guestv1.ExecRequest) (*emptypb.Empty, error) {
	g.hold()
	g.add(r.GetId(), r.GetExecId(), r.GetStdio())
	return &emptypb.Empty{}, nil
}

func (g *guest) Delete(_ context.Context, r *guestv1.DeleteRequest) (*guestv1.DeleteResponse, error) {
	g.hold()
	if g.mode == "wrong" {
		return nil, ill()
	}
	p, err := g.find(r.GetId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	p.end(0)
	return &guestv1.DeleteResponse{Pid: p.pid, ExitStatus: p.status, ExitedAt: timestamppb.Now()}, nil
}

func (g *guest) Kill(_ context.Context, r *guestv1.KillRequest) (*emptypb.Empty, error) {
	g.hold()
	p, err := g.find(r.GetId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	p.end(128 + r.GetSignal())
	return &emptypb.Empty{}, nil
}

func (g *guest) ResizePty(context.Context, *guestv1.ResizePtyRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, ill()
}

func (g *guest) Pause(context.Context, *guestv1.PauseRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, ill()
}

func (g *guest) Resume(context.Context, *guestv1.ResumeRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, ill()
}

func (g *guest) Update(context.Context, *guestv1.UpdateRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, ill()
}

// Stats are figures as large as figures get, of as many disks as fit.
func (g *guest) Stats(context.Context, *guestv1.StatsRequest) (*guestv1.StatsResponse, error) {
	g.hold()
	resp := &guestv1.StatsResponse{Cpu: &guestv1.CPUStats{UsageUsec: uint64(time.Now().UnixMicro())}, Memory: &guestv1.MemoryStats{}, Pids: &guestv1.PidsStats{}}
	switch g.mode {
	case "wrong":
		resp.Cpu.UsageUsec, resp.WritableBytes, resp.WritableInodes = math.MaxUint64, math.MaxUint64, math.MaxUint64
		resp.Memory = &guestv1.MemoryStats{Usage: math.MaxUint64, OomKill: uint64(time.Now().UnixNano()), Stat: map[string]uint64{"anon": math.MaxUint64, "\x1b": 1}}
		for range 20_000 {
			resp.Io = append(resp.Io, &guestv1.IOStats{})
		}
	case "huge":
		for range 1 << 20 {
			resp.Io = append(resp.Io, &guestv1.IOStats{})
		}
	}
	return resp, nil
}

func (g *guest) Pids(context.Context, *guestv1.PidsRequest) (*guestv1.PidsResponse, error) {
	return nil, ill()
}

func (g *guest) State(context.Context, *guestv1.StateRequest) (*guestv1.StateResponse, error) {
	return nil, ill()
}

func (g *guest) Wait(_ context.Context, r *guestv1.WaitRequest) (*guestv1.WaitResponse, error) {
	p, err := g.find(r.GetId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	<-p.ended
	if g.mode == "silent" {
		select {}
	}
	if g.mode == "wrong" {
		return &guestv1.WaitResponse{ExitStatus: math.MaxUint32, ExitedAt: &timestamppb.Timestamp{Seconds: math.MaxInt64, Nanos: -7}, OomKills: math.MaxUint64}, nil
	}
	return &guestv1.WaitResponse{ExitStatus: p.status, ExitedAt: timestamppb.Now()}, nil
}

func (g *guest) MountVolumes(_ context.Context, r *guestv1.MountVolumesRequest) (*emptypb.Empty, error) {
	if conn := g.take(r.GetStream()); conn != nil {
		go g.volumes(conn)
	}
	return &emptypb.Empty{}, nil
}
