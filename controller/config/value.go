// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package config

import (
	"bytes"
	"errors"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// text is a string.
func (v *validator) text(field string, value Value) (_ string, ok bool) {
	s, ok := value.(string)
	if !ok {
		v.errorf(field, value, "must be a string, in quotes")
	}
	return s, ok
}

// oneOf is one of three words.
func (v *validator) oneOf(field string, value Value, a, b, c string) string {
	word, ok := v.text(field, value)
	if ok && word != a && word != b && word != c {
		v.errorf(field, value, "use %q, %q or %q", a, b, c)
	}
	return word
}

// flag is true or false.
func (v *validator) flag(field string, value Value) bool {
	b, ok := value.(bool)
	if !ok {
		v.errorf(field, value, "must be true or false, without quotes")
	}
	return b
}

// count is a whole number in bounds; what is not one becomes the least.
func (v *validator) count(field string, value Value, least, most int64) int {
	var n int64
	switch x := value.(type) {
	case int:
		n = int64(x)
	case int64:
		n = x
	default:
		v.errorf(field, value, "must be a whole number, without quotes")
		return int(least)
	}
	if n < least || n > most {
		v.errorf(field, value, "must be from %d to %d", least, most)
		return int(least)
	}
	return int(n)
}

// texts is a list of strings.
func (v *validator) texts(field string, value Value) []string {
	list, ok := value.([]any)
	if strs, isStrings := value.([]string); isStrings {
		return slices.Clone(strs)
	}
	if !ok {
		v.errorf(field, value, "must be a list of strings, such as [%q, %q]", "a", "b")
		return nil
	}
	strs := make([]string, 0, len(list))
	for _, elem := range list {
		s, ok := elem.(string)
		if !ok {
			v.errorf(field, elem, "every entry of the list must be a string, in quotes")
			continue
		}
		strs = append(strs, s)
	}
	return strs
}

// section is a table: what it does not say is as in the defaults.
func section[T any](v *validator, field string, value Value, defaults T) T {
	table, ok := value.(map[string]any)
	if !ok {
		if whole, ok := value.(T); ok {
			return whole
		}
		v.errorf(field, value, "must be a table, [plugins.'io.containerd.sandbox.controller.v1.cloudhv'.%s]", field)
		return defaults
	}
	// Its own values take every type, so only unknown keys can be wrong here.
	out := defaults
	text, err := toml.Marshal(table)
	if err == nil {
		err = toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&out)
	}
	var unknown *toml.StrictMissingError
	switch {
	case errors.As(err, &unknown):
		for _, e := range unknown.Errors {
			key := strings.Join(e.Key(), ".")
			v.errorf(field+"."+key, table[e.Key()[0]], "there is no such option")
		}
	case err != nil:
		v.errorf(field, value, "cannot be read: %v", err)
	}
	return out
}
