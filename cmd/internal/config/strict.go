package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"go.yaml.in/yaml/v3"

	"culvert/policy"
	"culvert/tunnel"
)

// maxFile bounds a configuration file, in bytes.
const maxFile = 4 << 20

// readAll reads a file, and no more than is needed to see that it is larger than
// most. A pipe that nobody writes to is an empty file, and not waited for.
func readAll(file string, most int64) ([]byte, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, errors.Unwrap(err)
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, most+1))
}

// read reads a file into a struct, strictly.
func read(file string, into any) error {
	data, err := readAll(file, maxFile)
	switch {
	case err != nil:
		return tunnel.Errorf(tunnel.ConfigInvalid, "the configuration %s can not be read: %w", file, err)
	case len(data) > maxFile:
		return tunnel.Errorf(tunnel.ConfigInvalid, "the configuration %s is larger than %d MiB", file, maxFile>>20)
	}
	return decode(data, file, into)
}

// decode reads YAML into a struct. Its errors name the file and the line.
func decode(data []byte, file string, into any) error {
	var doc yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(&doc); err != nil && err != io.EOF {
		return inFile(file, err)
	}
	var more yaml.Node
	if err := dec.Decode(&more); err == nil {
		return tunnel.Errorf(tunnel.ConfigInvalid, "%s: line %d: a second YAML document begins; a configuration is one", file, more.Line)
	} else if err != io.EOF {
		return inFile(file, err)
	}
	if len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" {
		return nil // empty: the defaults
	}
	if err := known(doc.Content[0], reflect.TypeOf(into).Elem(), "the configuration"); err != nil {
		return inFile(file, err)
	}
	if err := doc.Content[0].Decode(into); err != nil {
		return inFile(file, plain(err))
	}
	return nil
}

var (
	typeError = regexp.MustCompile("^(line \\d+): cannot unmarshal (!!\\w+)(?: `(.*)`)? into (.+)$")
	goType    = map[string]string{"int": "a whole number", "string": "a word", "[]string": "a list of words", "bool": "true or false"}
)

// plain says in words what the decoder says in types. One error is enough.
func plain(err error) error {
	var types *yaml.TypeError
	if !errors.As(err, &types) || len(types.Errors) == 0 {
		return err
	}
	text, _, _ := strings.Cut(types.Errors[0], "\n")
	m := typeError.FindStringSubmatch(text)
	if m == nil {
		return errors.New(text)
	}
	is := map[string]string{"!!seq": "a list", "!!map": "a mapping"}[m[2]]
	if is == "" {
		is = strconv.Quote(m[3])
	}
	want := goType[m[4]]
	if want == "" {
		want = "what belongs here"
	}
	return fmt.Errorf("%s: %s is not %s", m[1], is, want)
}

func inFile(file string, err error) error {
	err = policy.InFile(file, err)
	var e *tunnel.Error
	if errors.As(err, &e) {
		e.Code = tunnel.ConfigInvalid
	}
	return err
}

// checked runs a configuration's check and gives its error the file and, where
// the error begins with a key that stands in the file, the line.
func checked(file string, check func() error) error {
	err := check()
	if err == nil {
		return nil
	}
	if line := lineIn(file, err); line > 0 {
		return atLine(file, line, err)
	}
	return inFile(file, err)
}

func atLine(file string, line int, err error) error {
	return inFile(file, &tunnel.Error{Code: tunnel.CodeOf(err), Text: fmt.Sprintf("line %d: %s", line, tunnel.Sentence(err)), Err: err})
}

// lineIn is the line of the key that an error begins with; 0: it does not begin
// with one of the file's.
func lineIn(file string, err error) int {
	var doc yaml.Node
	data, rerr := readAll(file, maxFile)
	if rerr != nil || yaml.Unmarshal(data, &doc) != nil || len(doc.Content) == 0 {
		return 0
	}
	key, _, _ := strings.Cut(tunnel.Sentence(err), " ")
	return lineOf(doc.Content[0], strings.Split(strings.TrimSuffix(key, ":"), "."))
}

// lineOf returns the line of the deepest part of a key's path that is there.
func lineOf(n *yaml.Node, path []string) int {
	for i := 0; i+1 < len(n.Content) && n.Kind == yaml.MappingNode && len(path) > 0; i += 2 {
		if n.Content[i].Value == path[0] {
			return max(n.Content[i].Line, lineOf(n.Content[i+1], path[1:]))
		}
	}
	return 0
}

var unmarshaler = reflect.TypeFor[yaml.Unmarshaler]()

// known checks that a mapping has only the keys that the struct knows, each
// once. Types that decode themselves are left to do so.
func known(n *yaml.Node, t reflect.Type, where string) error {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	// Such as front.users: without it everybody may, which nobody means by naming
	// no one. Or a file that is being written, and ends after "policy:".
	if t.Kind() == reflect.Slice && n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
		return fmt.Errorf("line %d: %s is an empty list; put something into it, or leave the key out", n.Line, where)
	}
	if n.Tag == "!!null" {
		return fmt.Errorf("line %d: %s has no value; give it one, or leave the key out", n.Line, where)
	}
	if reflect.PointerTo(t).Implements(unmarshaler) {
		return nil
	}
	if t.Kind() == reflect.Slice && n.Kind == yaml.SequenceNode {
		for _, item := range n.Content {
			if err := known(item, t.Elem(), where); err != nil {
				return err
			}
		}
	}
	if t.Kind() != reflect.Struct {
		return nil
	}
	if n.Kind != yaml.MappingNode {
		return fmt.Errorf("line %d: %s must be a mapping of keys to values", n.Line, where)
	}
	fields := map[string]reflect.Type{}
	var names []string
	for f := range t.Fields() {
		if !f.IsExported() {
			continue
		}
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		fields[name] = f.Type
		names = append(names, name)
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		field, ok := fields[key.Value]
		if !ok {
			return fmt.Errorf("line %d: %.60q is not a key of %s; its keys are %s", key.Line, key.Value, where, strings.Join(names, ", "))
		}
		if line := seen[key.Value]; line != 0 {
			return fmt.Errorf("line %d: the key %q stands twice, first in line %d", key.Line, key.Value, line)
		}
		seen[key.Value] = key.Line
		if err := known(value, field, key.Value); err != nil {
			return err
		}
	}
	return nil
}

// List is a word or a list of words.
type List []string

// UnmarshalYAML implements yaml.Unmarshaler.
func (l *List) UnmarshalYAML(n *yaml.Node) error {
	if n.Kind == yaml.ScalarNode {
		*l = List{n.Value}
		return nil
	}
	var all []string
	if err := n.Decode(&all); err != nil {
		return fmt.Errorf("line %d: must be a word or a list of words", n.Line)
	}
	*l = all
	return nil
}

// Duration is a time such as 150ms or 30s.
type Duration time.Duration

// UnmarshalYAML implements yaml.Unmarshaler.
func (d *Duration) UnmarshalYAML(n *yaml.Node) error {
	v, err := time.ParseDuration(n.Value)
	if err != nil || v < 0 {
		return fmt.Errorf("line %d: %.40q is not a duration such as 150ms, 30s or 10m", n.Line, n.Value)
	}
	*d = Duration(v)
	return nil
}

// MarshalYAML implements yaml.Marshaler.
func (d Duration) MarshalYAML() (any, error) { return time.Duration(d).String(), nil }

// beside makes a file name absolute, counting from the folder of the
// configuration file. Empty stays empty.
func beside(file, name string) string {
	if name == "" || filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(filepath.Dir(file), name)
}

// maxSecret bounds a file that holds a token or a password, in bytes.
const maxSecret = 64 << 10

// secret returns the trimmed content of a small file. It is read again and again
// while the process runs, so one that is a pipe or a device is refused: it would
// be waited for, or never end.
func secret(file string) (string, error) {
	if st, err := os.Stat(file); err == nil && !st.Mode().IsRegular() {
		return "", tunnel.Errorf(tunnel.ConfigInvalid, "%s can not be read: it is not a regular file", file)
	}
	b, err := readAll(file, maxSecret)
	switch {
	case err != nil:
		return "", tunnel.Errorf(tunnel.ConfigInvalid, "%s can not be read: %w", file, err)
	case len(b) > maxSecret:
		return "", tunnel.Errorf(tunnel.ConfigInvalid, "%s can not be read: it is larger than %d KiB", file, maxSecret>>10)
	}
	return strings.TrimSpace(string(b)), nil
}

// Changed names the keys at the top of a configuration in which two differ,
// without those of except. Both are pointers to the same struct.
func Changed(a, b any, except ...string) []string {
	var all []string
	x, y := reflect.ValueOf(a).Elem(), reflect.ValueOf(b).Elem()
	for f := range x.Type().Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if f.IsExported() && !slices.Contains(except, name) && !reflect.DeepEqual(x.FieldByIndex(f.Index).Interface(), y.FieldByIndex(f.Index).Interface()) {
			all = append(all, name)
		}
	}
	return all
}
