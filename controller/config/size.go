// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package config

import (
	"fmt"
	"math"
	"regexp"
	"strconv"

	"github.com/containerd/errdefs"
)

// RoundUp rounds a size of memory up to a multiple of Granule.
func RoundUp(n int64) int64 {
	if n > math.MaxInt64-Granule {
		return math.MaxInt64 / Granule * Granule
	}
	return (n + Granule - 1) / Granule * Granule
}

var sizeFormat = regexp.MustCompile(`^([0-9]{1,19}) ?(B|KiB|MiB|GiB|TiB)?$`)

// ParseSize reads a size with a binary unit, as "512MiB"; a bare number is bytes.
func ParseSize(s string) (int64, error) {
	m := sizeFormat.FindStringSubmatch(s)
	if m == nil {
		return 0, fmt.Errorf("%q is no size: %w", s, errdefs.ErrInvalidArgument)
	}
	n, err := strconv.ParseInt(m[1], 10, 64)
	shift := map[string]uint{"": 0, "B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}[m[2]]
	if err != nil || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("%q is too large a size: %w", s, errdefs.ErrInvalidArgument)
	}
	return n << shift, nil
}

// FormatSize writes a size as ParseSize reads it, in the largest unit that divides it.
func FormatSize(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	i := 0
	for n != 0 && n%1024 == 0 && i < len(units)-1 {
		n /= 1024
		i++
	}
	if n == 0 {
		return "0"
	}
	return strconv.FormatInt(n, 10) + units[i]
}
