package config

import (
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"culvert/policy"
)

const page = "../../../docs/configuration.md"

// sections returns the part of the page about each file.
func sections(t *testing.T) (sidecar, cloud, all string) {
	t.Helper()
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	all = string(b)
	_, rest, ok := strings.Cut(all, "## The sidecar")
	sidecar, rest, ok2 := strings.Cut(rest, "## The cloud proxy")
	cloud, _, ok3 := strings.Cut(rest, "## The policy")
	if !ok || !ok2 || !ok3 {
		t.Fatal("docs/configuration.md has lost a section")
	}
	return sidecar, cloud, all
}

// keys returns every key that a configuration has, as a.b.
func keys(t reflect.Type, prefix string) []string {
	var all []string
	for f := range t.Fields() {
		if !f.IsExported() {
			continue
		}
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		name = prefix + name
		of := f.Type
		if of.Kind() == reflect.Pointer {
			of = of.Elem()
		}
		if of.Kind() == reflect.Struct && of != reflect.TypeFor[policy.Config]() {
			all = append(all, keys(of, name+".")...)
			continue
		}
		all = append(all, name)
	}
	return all
}

func TestThePageHasEveryKeyAndNoOther(t *testing.T) {
	sidecar, cloud, _ := sections(t)
	for name, c := range map[string]struct {
		page string
		keys []string
	}{
		"culvert.yaml":    {sidecar, keys(reflect.TypeFor[Sidecar](), "")},
		"cloudproxy.yaml": {cloud, keys(reflect.TypeFor[CloudProxy](), "")},
	} {
		_, table, _ := strings.Cut(c.page, "| key | what it is | default |")
		table, _, _ = strings.Cut(table, "\n\n")
		documented := map[string]bool{}
		for _, m := range regexp.MustCompile("(?m)^\\| `([a-z0-9_.]+)` \\| \\S").FindAllStringSubmatch(table, -1) {
			documented[m[1]] = true
		}
		for _, k := range c.keys {
			if !documented[k] {
				t.Errorf("docs/configuration.md says nothing about %s of %s", k, name)
			}
			delete(documented, k)
		}
		for k := range documented {
			t.Errorf("docs/configuration.md has %s, which is no key of %s", k, name)
		}
	}
}

func TestThePagesExamplesAreValid(t *testing.T) {
	sidecar, cloud, _ := sections(t)
	example := regexp.MustCompile("(?s)```yaml\n(.*?)```")
	for name, c := range map[string]struct {
		page string
		read func(string) error
		keys []string
	}{
		"culvert.yaml":    {sidecar, func(f string) error { _, err := ReadSidecar(f); return err }, []string{"cloud_proxy", "identity", "front", "control", "capture", "media", "policy", "log"}},
		"cloudproxy.yaml": {cloud, func(f string) error { _, err := ReadCloudProxy(f); return err }, []string{"certificate", "tokens", "policy", "egress", "limits"}},
	} {
		m := example.FindStringSubmatch(c.page)
		if m == nil {
			t.Fatalf("%s has no example", name)
		}
		if err := c.read(write(t, m[1])); err != nil {
			t.Errorf("the example of %s: %v", name, err)
		}
		for _, k := range c.keys {
			if !strings.Contains(m[1], k+":") {
				t.Errorf("the example of %s does not show %s", name, k)
			}
		}
	}
}

func TestThePageSaysTheDefaults(t *testing.T) {
	sidecar, cloud, _ := sections(t)
	s, c := &Sidecar{}, &CloudProxy{}
	for text, to := range map[string]any{goodSidecar: s, goodCloudProxy: c} {
		text = strings.ReplaceAll(text, `front: {listen: "127.0.0.1:1081"}`, "")
		if err := decode([]byte(text), "f", to); err != nil {
			t.Fatal(err)
		}
		if err := to.(interface{ Check() error }).Check(); err != nil {
			t.Fatal(err)
		}
	}
	for line, in := range map[string]string{
		"`front.listen` | `" + s.Front.Listen: sidecar, "`start` | `" + s.Start: sidecar, "`when_stopped` | `" + s.WhenStopped: sidecar,
		"`log.level` | `" + s.Log.Level: sidecar, "`log.format` | `" + s.Log.Format: sidecar, "`listen` | `" + c.Listen: cloud,
	} {
		key, def, _ := strings.Cut(line, " | ")
		row := regexp.MustCompile(`(?m)^\| ` + regexp.QuoteMeta(key) + ` \|.*\| ` + regexp.QuoteMeta(def) + "` \\|$")
		if !row.MatchString(in) {
			t.Errorf("the row of %s does not end in the default %s`", key, def)
		}
	}
}
