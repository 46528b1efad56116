// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package verdict

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func TestParse(t *testing.T) {
	t.Parallel()
	f, err := os.Open("testdata/report.json")
	require.NoError(t, err)
	defer f.Close()
	results, err := Parse(f)
	require.NoError(t, err)
	require.Equal(t, Results{
		"[k8s.io] Pod runs":           {State: Passed, Took: 1500 * time.Millisecond},
		"[k8s.io] Pod fails":          {State: Failed, Message: "failed to create PodSandbox: no"},
		"[k8s.io] Pod panics":         {State: Failed, Message: "Test Panicked: nil map"},
		"[k8s.io] Pod takes too long": {State: Failed, Message: "timedout"},
		"[k8s.io] Pod is not for us":  {State: Skipped, Message: "no AppArmor here"},
		"benchmark":                   {State: Skipped},
		"of later":                    {State: Skipped},
	}, results)
	require.Equal(t, 1, results.Count(Passed))
	require.Equal(t, 3, results.Count(Failed))
	require.Equal(t, 3, results.Count(Skipped))
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	const spec = `{"LeafNodeType":"It","LeafNodeText":"a","State":"passed"}`
	for name, c := range map[string]struct {
		text, says string
		class      error
	}{
		"nothing":     {``, "EOF", errdefs.ErrInvalidArgument},
		"no report":   {`[]`, "0 suites", errdefs.ErrInvalidArgument},
		"two suites":  {`[{},{}]`, "2 suites", errdefs.ErrInvalidArgument},
		"cut":         {`[{"SpecReports":[` + spec, "EOF", errdefs.ErrInvalidArgument},
		"no specs":    {`[{"SpecialSuiteFailureReasons":["Suite Timeout Elapsed"]}]`, "Suite Timeout Elapsed", errdefs.ErrInvalidArgument},
		"twice":       {`[{"SpecReports":[` + spec + `,` + spec + `]}]`, `two specs "a"`, errdefs.ErrInvalidArgument},
		"beforesuite": {`[{"SpecReports":[{"LeafNodeType":"BeforeSuite","State":"failed","Failure":{"Message":"no socket"}},` + spec + `]}]`, "BeforeSuite of the suite failed: no socket", errdefs.ErrFailedPrecondition},
	} {
		_, err := Parse(strings.NewReader(c.text))
		require.ErrorIs(t, err, c.class, name)
		require.ErrorContains(t, err, c.says, name)
	}
}

func TestParseList(t *testing.T) {
	t.Parallel()
	l, err := ParseList("x.list", strings.NewReader("# about\n\n a [b|c]: d ;; not ;; a reason; why\n"))
	require.NoError(t, err)
	require.Equal(t, List{{Spec: "a [b|c]: d", Says: "not", Reason: "a reason; why", list: "x.list:3"}}, l)

	_, err = ParseList("x.list", strings.NewReader("a ;; b\nb ;; c ;; d\nb ;; c ;; d\nc ;;  ;; d\n"))
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	for _, want := range []string{"x.list:1: 2 columns", `x.list:3: "b" stands there twice`, "x.list:4: a column is empty"} {
		require.ErrorContains(t, err, want)
	}
}

// runs are two runs of one spec, listed for both by what is given.
func runs(runc, ours Result, runcKnown, oursKnown List) (Run, Run) {
	return Run{Handler: "runc", Results: Results{"spec": runc}, Known: []List{runcKnown}},
		Run{Handler: "cloudhv", Results: Results{"spec": ours}, Known: []List{nil, oursKnown}}
}

func TestJudge(t *testing.T) {
	t.Parallel()
	pass, skip := Result{State: Passed}, Result{State: Skipped, Message: "none here"}
	fail := Result{State: Failed, Message: "it is\n\t refused"}
	listed := List{{Spec: "spec", Says: "refused", Reason: "why", list: "l:1"}}
	other := List{{Spec: "spec", Says: "broken", Reason: "why", list: "l:1"}}
	for name, c := range map[string]struct {
		runc, ours           Result
		runcKnown, oursKnown List
		want                 string
	}{
		"both pass":              {pass, pass, nil, nil, ""},
		"both skip":              {skip, skip, nil, nil, ""},
		"ours does more":         {skip, pass, nil, nil, ""},
		"ours fails":             {pass, fail, nil, nil, "spec: passed on runc, fails on cloudhv: it is refused"},
		"ours skips":             {pass, skip, nil, nil, "spec: passed on runc, not run on cloudhv: none here"},
		"ours is missing":        {pass, Result{}, nil, nil, "spec: passed on runc, not run on cloudhv: "},
		"ours fails beyond runc": {skip, fail, nil, nil, "spec: skipped on runc, fails on cloudhv: it is refused"},
		"runc fails":             {fail, pass, nil, nil, "spec fails on runc itself: it is refused"},
		"runc fails as listed":   {fail, fail, listed, nil, ""},
		"ours fails as listed":   {pass, fail, nil, listed, ""},
		"ours skips as listed":   {pass, Result{State: Skipped, Message: "refused"}, nil, listed, ""},
		"skips otherwise":        {pass, skip, nil, listed, `spec: skipped on cloudhv, but does not say "refused" (l:1): none here`},
		"not to be run":          {Result{State: Skipped}, Result{State: Skipped}, nil, listed, ""},
		"both as listed":         {fail, fail, listed, listed, ""},
		"listed and passes":      {pass, pass, nil, listed, "spec passes on cloudhv: take it off the list (l:1)"},
		"listed for runc":        {pass, pass, listed, nil, "spec passes on runc: take it off the list (l:1)"},
		"fails otherwise":        {pass, fail, nil, other, `spec: failed on cloudhv, but does not say "broken" (l:1): it is refused`},
	} {
		var want []string
		if c.want != "" {
			want = []string{c.want}
		}
		require.Equal(t, want, Judge(runs(c.runc, c.ours, c.runcKnown, c.oursKnown)), name)
	}
}

// A name that is no spec's would be an exception for nothing.
func TestJudgeStale(t *testing.T) {
	t.Parallel()
	pass := Result{State: Passed}
	gone := List{{Spec: "gone", Says: "x", Reason: "y", list: "l:7"}}
	y, o := runs(pass, pass, nil, gone)
	require.Equal(t, []string{`l:7: the suite has no spec "gone"`}, Judge(y, o))
}

func TestBrief(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("ä ", briefLimit)
	require.LessOrEqual(t, len(brief(long)), briefLimit+len("… "))
	require.True(t, strings.HasPrefix(brief(long), "… "))
	require.Equal(t, "a b", brief(" a\n\tb "))
}

func TestPrint(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	require.NoError(t, Print(&out,
		Run{Handler: "runc", Results: Results{"a": {State: Passed}, "b": {State: Passed}, "c": {State: Skipped}, "d": {State: Failed}}},
		Run{Handler: "cloudhv", Results: Results{"a": {State: Passed}, "b": {State: Failed}, "c": {State: Skipped}, "d": {State: Failed}},
			Known: []List{{{Spec: "b", Reason: "no host"}}}},
	))
	require.Equal(t, `runc    cloudhv  spec
passed  failed   b (no host)
failed  failed   d

runc  cloudhv  
2     1        passed
1     2        failed
1     1        skipped
`, out.String())
}
