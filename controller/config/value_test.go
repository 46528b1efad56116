// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package config

import (
	"context"
	"maps"
	"reflect"
	"strings"
	"testing"

	server "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/require"
)

// literals has one value of each type that TOML has.
var literals = map[string]string{
	"string": "'words'", "integer": "-7", "float": "1.5", "bool": "true", "date": "1979-05-27",
	"time": "1979-05-27T07:32:00Z", "list": "['io.cloudhv.words', 7]", "list of tables": "[{a = 1}]", "table": "{a = 1}",
}

// options lists every option's key, with the section it is in.
func options(prefix string, of any) map[string]Value {
	all := map[string]Value{}
	v := reflect.ValueOf(of)
	for i := range v.NumField() {
		key := prefix + v.Type().Field(i).Tag.Get("toml")
		value := v.Field(i).Interface()
		all[key] = value
		if reflect.ValueOf(value).Kind() == reflect.Struct {
			maps.Copy(all, options(key+".", value))
		}
	}
	return all
}

// decode reads a section as containerd does: from what it has parsed already.
func decode(t *testing.T, text string, into *Config) {
	t.Helper()
	var parsed map[string]any
	require.NoError(t, toml.Unmarshal([]byte(text), &parsed))
	c := &server.Config{Plugins: map[string]any{"ours": parsed}}
	_, err := c.Decode(context.Background(), "ours", into)
	require.NoError(t, err, "containerd would not start")
}

// No option makes containerd fail for all handlers, whatever the type of its
// value; and what is wrong is told by Validate.
func TestWrongTypesReachValidate(t *testing.T) {
	t.Parallel()
	all := options("", *Default())
	require.Greater(t, len(all), 30)
	for key, def := range all {
		right := map[string]bool{"string": true}
		switch def.(type) {
		case bool:
			right = map[string]bool{"bool": true}
		case int:
			right = map[string]bool{"integer": true}
		}
		for kind, literal := range literals {
			c := valid(t)
			decode(t, key+" = "+literal, c)
			_, err := c.Validate(testHost)
			if right[kind] && err == nil {
				continue
			}
			require.Error(t, err, "%s = %s", key, literal)
			require.ErrorContains(t, err, key, "%s", kind)
			var all *Error
			require.ErrorAs(t, err, &all)
			require.Len(t, all.Problems, 1, "%s = %s: %v", key, literal, err)
		}
	}
}

// Each problem has the field, the value and what would be right, beside all others.
func TestWrongTypesAreReportedTogether(t *testing.T) {
	t.Parallel()
	c := valid(t)
	decode(t, `
		cgroup = 'yes'
		debug = 1
		enable_unprivileged_ports = ['true']
		kernel = true
		kernel_params = 'quiet'
		annotations = ['io.cloudhv.*', 5]
		default_memory = 512
		default_vcpus = 'two'
		max_vcpus = 1.5
		shim = { name = 'shim' }
		timeouts = '30s'
		[[rootfs_builder]]
		parallel = 3
	`, c)
	_, err := c.Validate(testHost)
	for _, want := range []string{
		`cgroup = "yes": must be true or false`,
		`debug = "1": must be true or false`,
		`enable_unprivileged_ports = "[true]": must be true or false`,
		`kernel = "true": must be a string`,
		`kernel_params = "quiet": must be a list of strings`,
		`annotations = "5": every entry of the list must be a string`,
		`default_memory = "512": must be at least "64MiB"`,
		`default_vcpus = "two": must be a whole number`,
		`max_vcpus = "1.5": must be a whole number`,
		`shim = "map[name:shim]": must be a string`,
		`timeouts = "30s": must be a table`,
		`rootfs_builder = "[map[parallel:3]]": must be a table`,
	} {
		require.ErrorContains(t, err, want)
	}
	var all *Error
	require.ErrorAs(t, err, &all)
	require.Len(t, all.Problems, 12)
}

// All that is right arrives, in the types that TOML gives it.
func TestRightTypesArrive(t *testing.T) {
	t.Parallel()
	c := valid(t)
	decode(t, `
		cgroup = false
		debug = true
		kernel_params = ['quiet', 'loglevel=3']
		annotations = []
		default_vcpus = 2
		max_vcpus = 0
		max_memory = 0
		console_log_limit = 1048576
		[rootfs_builder]
		parallel = 3
		[timeouts]
		boot = '5s'
	`, c)
	s, err := c.Validate(testHost)
	require.NoError(t, err)
	require.False(t, s.Cgroup)
	require.True(t, s.Debug)
	require.True(t, s.UnprivilegedICMP)
	require.Equal(t, []string{"quiet", "loglevel=3"}, s.KernelParams)
	require.Empty(t, s.Annotations)
	require.Equal(t, 2, s.DefaultVCPUs)
	require.Equal(t, testHost.VCPUs, s.MaxVCPUs)
	require.Equal(t, int64(1<<20), s.ConsoleLogLimit)
	require.Equal(t, 3, s.BuilderParallel)
	require.Equal(t, int64(64<<30), s.BuilderImageSize)
	require.Equal(t, "5s", s.BootTimeout.String())
	require.Equal(t, "10m0s", s.RootFSTimeout.String())
}

// A section is one table, however it is written, and what it leaves out is as
// in the defaults.
func TestSectionsKeepDefaults(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"timeouts = {boot = '5s'}", "timeouts.boot = '5s'", "[timeouts]\nboot = '5s'"} {
		for name, read := range map[string]func(*Config){
			"containerd": func(c *Config) { decode(t, text, c) },
			"go-toml":    func(c *Config) { require.NoError(t, toml.NewDecoder(strings.NewReader(text)).Decode(c)) },
		} {
			c := valid(t)
			read(c)
			s, err := c.Validate(testHost)
			require.NoError(t, err, name)
			require.Equal(t, "5s", s.BootTimeout.String(), "%s: %s", name, text)
			require.Equal(t, "20s", s.RecoverTimeout.String(), "%s: %s", name, text)
		}
	}
}
