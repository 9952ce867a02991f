package culvert_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "culvert"

// pkg is one package as go list tells it. Paths of the module's own packages
// are relative to its root.
type pkg struct {
	Path    string
	Dir     string
	Imports []string // of the product
	Tests   []string // of its tests alone
	Files   []string // of the product
}

// own says which of the module's packages a package may import. A path that
// ends in /... stands for a folder and all below it. Every package needs
// a line: a new one has to be thought about.
var own = map[string][]string{
	".":                     {},
	"tunnel":                {},
	"tunnel/wire":           {"tunnel"},
	"tunnel/media":          {"tunnel", "tunnel/wire"},
	"tunnel/bulk":           {"tunnel"},
	"tunnel/resume":         {"tunnel"},
	"tunnel/session":        {"tunnel", "tunnel/wire", "tunnel/media", "tunnel/bulk", "tunnel/resume"},
	"tunnel/uplink":         {"tunnel", "tunnel/wire", "tunnel/media", "tunnel/session"},
	"tunnel/netio":          {"tunnel"},
	"tunnel/age":            {},
	"tunnel/crowd":          {},
	"tunnel/fair":           {},
	"tunnel/tunnelquic":     {"tunnel", "tunnel/netio", "tunnel/age", "tunnel/crowd"},
	"tunnel/tunneltls":      {"tunnel", "tunnel/age", "tunnel/crowd"},
	"tunnel/tunneltest":     {"tunnel"},
	"tunnel/httpproxy":      {"tunnel"},
	"tunnel/websocket":      {"tunnel", "tunnel/crowd"},
	"policy":                {"tunnel"},
	"sidecar":               {"tunnel", "tunnel/netio", "tunnel/fair", "sidecar/channel"},
	"sidecar/channel":       {},
	"sidecar/capture":       {"tunnel", "tunnel/netio"},
	"sidecar/capture/rules": {"tunnel"},
	"sidecar/check":         {"tunnel", "tunnel/wire"},
	"sidecar/control":       {"tunnel", "sidecar", "sidecar/channel", "sidecar/capture", "sidecar/check"},
	"cloudproxy":            {"tunnel", "tunnel/wire", "tunnel/session", "tunnel/resume", "tunnel/crowd"},
	"cloudproxy/identity":   {"tunnel"},
	"cloudproxy/egress":     {"tunnel", "tunnel/netio", "tunnel/fair"},
	"cloudproxy/echo":       {"tunnel", "tunnel/wire"},
	"cmd/...": {
		"tunnel", "tunnel/wire", "tunnel/media", "tunnel/session", "tunnel/uplink", "tunnel/tunnelquic", "tunnel/tunneltls", "tunnel/httpproxy", "tunnel/websocket",
		"policy", "sidecar/...", "cloudproxy/...", "cmd/internal/...",
	},
	"scripts/...": {},
}

// why explains the lines of own that are not obvious.
var why = map[string]string{
	"tunnel":          "it is the contract that all parts meet at",
	"sidecar/channel": "its verdicts come from packet facts alone",
	"sidecar":         "it must work with any Opener; cmd joins it to a tunnel",
	"policy":          "its decisions are pure",
	"sidecar/capture": "it must work with any Opener; cmd joins it to a tunnel and to the rules",
	"sidecar/check":   "cmd hands in how to dial, and a link; the test of a path must not depend on its parts",
	"cloudproxy":      "carriers, tokens and policy are handed in by cmd",
}

// libraries says which packages may import a library that is kept in one
// place, so that it can be replaced there. Tests may where testsToo is set.
var libraries = []struct {
	path     string
	by       []string
	testsToo bool // any test may import it
}{
	{path: "github.com/quic-go/quic-go", by: []string{"tunnel/tunnelquic"}},
	{path: "github.com/hashicorp/yamux", by: []string{"tunnel/tunneltls"}},
	{path: "github.com/Azure/go-ntlmssp", by: []string{"tunnel/httpproxy"}},
	{path: "github.com/coder/websocket", by: []string{"tunnel/websocket"}},
	{path: "github.com/jcmturner/gokrb5", by: []string{"tunnel/httpproxy"}},
	{path: "github.com/dop251/goja", by: []string{"cmd/culvert-pac"}},
	{path: "github.com/icholy/digest", by: []string{"tunnel/httpproxy"}},
	{path: "github.com/armon/go-socks5", by: []string{"sidecar"}},
	{path: "github.com/pion", by: []string{"cmd/culvert-demo", "cmd/internal/webcall"}, testsToo: true},
	{path: "github.com/urfave/cli", by: []string{"cmd/..."}},
	{path: "github.com/coreos/go-systemd", by: []string{"cmd/..."}},
	{path: "github.com/google/nftables", by: []string{"sidecar/capture/rules"}},
	{path: "github.com/golang-jwt/jwt", by: []string{"cloudproxy/identity"}},
	{path: "github.com/gaissmai/bart", by: []string{"policy"}},
	{path: "go.uber.org/goleak", by: []string{"cmd/internal/cmdtest", "tunnel/tunneltest"}, testsToo: true},
}

// standardOnly import nothing but the standard library.
var standardOnly = []string{"tunnel", "sidecar/channel"}

func TestImportGraph(t *testing.T) {
	for _, problem := range check(list(t)) {
		t.Error(problem)
	}
}

// check holds packages against the rules and says in a sentence each what is wrong.
func check(packages []pkg) []string {
	var problems []string
	say := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	for _, p := range packages {
		allowed, known := rule(p.Path)
		if !known {
			say("package %s is not in the import graph; add a line for it to own in imports_test.go.", p.Path)
			continue
		}
		for _, imported := range p.Imports {
			if to, ours := strings.CutPrefix(imported, module+"/"); ours {
				if !matches(to, allowed) {
					reason := why[p.Path]
					if reason != "" {
						reason = " (" + reason + ")"
					}
					say("package %s imports %s, but it may import only %s of ours%s; let cmd hand in what it needs, or move the code.",
						p.Path, to, orNothing(allowed), reason)
				}
				continue
			}
			if slices.Contains(standardOnly, p.Path) && !standard(imported) {
				say("package %s imports %s, but it may import only the standard library; move what needs the library to a package that wraps it.", p.Path, imported)
			}
		}
		for _, l := range libraries {
			if matches(p.Path, l.by) {
				continue
			}
			imports, what := p.Imports, "package"
			if !l.testsToo {
				imports, what = slices.Concat(p.Imports, p.Tests), "package (or test of)"
			}
			for _, imported := range imports {
				if within(imported, l.path) {
					say("%s %s imports %s, which only %s may; use what that package offers.", what, p.Path, imported, strings.Join(l.by, ", "))
				}
			}
		}
		// Tests may put parts together, but nothing outside cmd may reach into it.
		for _, imported := range p.Tests {
			if to, ours := strings.CutPrefix(imported, module+"/"); ours && strings.HasPrefix(to, "cmd/") && !strings.HasPrefix(p.Path, "cmd/") {
				say("a test of package %s imports %s; a test that needs a command belongs in cmd.", p.Path, to)
			}
		}
	}
	return problems
}

// rule finds the line of own for a package: its own, or that of the nearest folder.
func rule(path string) ([]string, bool) {
	if allowed, ok := own[path]; ok {
		return allowed, true
	}
	for dir := path; dir != "."; dir = filepath.Dir(dir) {
		if allowed, ok := own[dir+"/..."]; ok {
			return allowed, true
		}
	}
	return nil, false
}

func matches(path string, patterns []string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool {
		if folder, all := strings.CutSuffix(pattern, "/..."); all {
			return within(path, folder)
		}
		return path == pattern
	})
}

func within(path, folder string) bool {
	return path == folder || strings.HasPrefix(path, folder+"/")
}

// standard: the first element of a path outside the standard library has a dot.
func standard(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".") && first != module
}

func orNothing(paths []string) string {
	if len(paths) == 0 {
		return "nothing"
	}
	return strings.Join(paths, ", ")
}

// list asks go for the module's packages, on every system that has files of its own.
func list(t *testing.T) []pkg {
	t.Helper()
	// go test repeats a result from its cache unless a file has changed that the test
	// itself opened; what go list reads does not count. So look at every folder.
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() && path != "." && strings.HasPrefix(entry.Name(), ".") {
			return filepath.SkipDir
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	byPath := map[string]*pkg{}
	for _, goos := range []string{"linux", "darwin", "windows"} {
		cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Dir,GoFiles,CgoFiles,Imports,TestImports,XTestImports", "./...")
		cmd.Env = append(os.Environ(), "GOOS="+goos, "CGO_ENABLED=0")
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("go list for %s: %v", goos, err)
		}
		for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
			var l struct {
				ImportPath, Dir                                       string
				GoFiles, CgoFiles, Imports, TestImports, XTestImports []string
			}
			if err := dec.Decode(&l); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			path := "."
			if rest, ok := strings.CutPrefix(l.ImportPath, module+"/"); ok {
				path = rest
			}
			p := byPath[path]
			if p == nil {
				p = &pkg{Path: path, Dir: l.Dir}
				byPath[path] = p
			}
			p.Imports = union(p.Imports, l.Imports)
			p.Tests = union(p.Tests, l.TestImports, l.XTestImports)
			p.Files = union(p.Files, l.GoFiles, l.CgoFiles)
		}
	}
	var packages []pkg
	for _, path := range slices.Sorted(maps.Keys(byPath)) {
		packages = append(packages, *byPath[path])
	}
	if len(packages) < 10 {
		t.Fatalf("go list found %d packages, far too few: %v", len(packages), packages)
	}
	return packages
}

func union(lists ...[]string) []string {
	all := slices.Concat(lists...)
	slices.Sort(all)
	return slices.Compact(all)
}

func TestGraphCheckerFindsWhatIsWrong(t *testing.T) {
	for name, c := range map[string]struct {
		p    pkg
		want string // in the only problem; empty: none
	}{
		"contract from standard library": {pkg{Path: "tunnel", Imports: []string{"net", "net/netip"}}, ""},
		"contract from a library":        {pkg{Path: "tunnel", Imports: []string{"golang.org/x/net/ipv4"}}, "only the standard library"},
		"contract from a part":           {pkg{Path: "tunnel", Imports: []string{"culvert/policy"}}, "package tunnel imports policy"},
		"channel from a library":         {pkg{Path: "sidecar/channel", Imports: []string{"github.com/x/y"}}, "only the standard library"},
		"channel from the contract":      {pkg{Path: "sidecar/channel", Imports: []string{"culvert/tunnel"}}, "may import only nothing"},
		"sidecar from contract":          {pkg{Path: "sidecar", Imports: []string{"culvert/tunnel", "culvert/sidecar/channel"}}, ""},
		"sidecar from policy":            {pkg{Path: "sidecar", Imports: []string{"culvert/policy"}}, "package sidecar imports policy"},
		"sidecar from cloud proxy":       {pkg{Path: "sidecar", Imports: []string{"culvert/cloudproxy/egress"}}, "package sidecar imports cloudproxy/egress"},
		"policy from sidecar":            {pkg{Path: "policy", Imports: []string{"culvert/sidecar"}}, "package policy imports sidecar"},
		"cloud proxy from a carrier":     {pkg{Path: "cloudproxy", Imports: []string{"culvert/tunnel/tunnelquic"}}, "handed in by cmd"},
		"session from wire and media":    {pkg{Path: "tunnel/session", Imports: []string{"culvert/tunnel/wire", "culvert/tunnel/media"}}, ""},
		"carrier from carrier":           {pkg{Path: "tunnel/tunneltls", Imports: []string{"culvert/tunnel/tunnelquic"}}, "package tunnel/tunneltls imports tunnel/tunnelquic"},
		"command from everything":        {pkg{Path: "cmd/culvert", Imports: []string{"culvert/sidecar", "culvert/cloudproxy", "culvert/tunnel/tunnelquic", "culvert/cmd/internal/config", "github.com/urfave/cli/v2"}}, ""},
		"command from the test carriers": {pkg{Path: "cmd/culvert", Imports: []string{"culvert/tunnel/tunneltest"}}, "imports tunnel/tunneltest"},
		"part from a command":            {pkg{Path: "policy", Imports: []string{"culvert/cmd/internal/config"}}, "package policy imports cmd/internal/config"},
		"test from a command":            {pkg{Path: "policy", Tests: []string{"culvert/cmd/internal/config"}}, "belongs in cmd"},
		"test from another part":         {pkg{Path: "cloudproxy", Tests: []string{"culvert/tunnel/uplink", "culvert/tunnel/tunneltest"}}, ""},
		"quic-go elsewhere":              {pkg{Path: "cmd/culvert", Imports: []string{"github.com/quic-go/quic-go/http3"}}, "only tunnel/tunnelquic"},
		"quic-go in a test elsewhere":    {pkg{Path: "sidecar", Tests: []string{"github.com/quic-go/quic-go"}}, "only tunnel/tunnelquic"},
		"yamux elsewhere":                {pkg{Path: "tunnel/session", Imports: []string{"github.com/hashicorp/yamux"}}, "only tunnel/tunneltls"},
		"go-socks5 below the sidecar":    {pkg{Path: "sidecar/control", Imports: []string{"github.com/armon/go-socks5"}}, "only sidecar may"},
		"pion in the product":            {pkg{Path: "cmd/culvert", Imports: []string{"github.com/pion/webrtc/v4"}}, "only cmd/culvert-demo"},
		"pion in a test":                 {pkg{Path: "sidecar", Tests: []string{"github.com/pion/webrtc/v4"}}, ""},
		"command line library in a part": {pkg{Path: "sidecar", Imports: []string{"github.com/urfave/cli/v2"}}, "only cmd/..."},
		"library of a similar name":      {pkg{Path: "sidecar", Imports: []string{"github.com/pionx/webrtc"}}, ""},
		"unknown package":                {pkg{Path: "surprise"}, "not in the import graph"},
	} {
		t.Run(name, func(t *testing.T) {
			got := check([]pkg{c.p})
			switch {
			case c.want == "" && len(got) > 0:
				t.Errorf("found a problem where there is none: %q", got)
			case c.want != "" && (len(got) != 1 || !strings.Contains(got[0], c.want)):
				t.Errorf("got %q, want one problem with %q", got, c.want)
			}
		})
	}
}

var (
	promise    = regexp.MustCompile(`\b[Pp]romises?\b`)
	nonPromise = regexp.MustCompile(`\b((do|does|is) not|(opens|knows|makes|holds|decides) (no|nothing))\b`)
)

func TestEachPackageSaysWhatItPromises(t *testing.T) {
	for _, p := range list(t) {
		if len(p.Files) == 0 {
			continue // tests only
		}
		file, command := "doc.go", strings.HasPrefix(p.Path, "cmd/") && !strings.HasPrefix(p.Path, "cmd/internal/")
		if command {
			file = "main.go"
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil, parser.ParseComments|parser.PackageClauseOnly)
		if err != nil {
			t.Errorf("package %s needs a %s with its package comment: %v", p.Path, file, err)
			continue
		}
		if problem := judge(parsed.Doc, !command); problem != "" {
			t.Errorf("%s/%s: %s", p.Path, file, problem)
		}
	}
}

// judge says what a package comment lacks.
func judge(doc *ast.CommentGroup, promises bool) string {
	text := strings.Join(strings.Fields(doc.Text()), " ") // a phrase may be wrapped
	switch {
	case strings.Count(strings.TrimSpace(doc.Text()), "\n") < 2:
		return "the package comment must have three lines at least"
	case promises && !promise.MatchString(text):
		return `the package comment must say what the package promises ("It promises ...")`
	case promises && !nonPromise.MatchString(text):
		return `the package comment must say what the package leaves to others ("It does not ...")`
	}
	return ""
}

func TestJudgeOfPackageComments(t *testing.T) {
	for text, want := range map[string]string{
		"": "three lines",
		"// Package x is x.\n// It promises a. It does not b.":                        "three lines",
		"// Package x is x,\n// and\n// does much.":                                   "promises",
		"// Package x is x.\n//\n// It promises much.":                                "leaves to others",
		"// Package x is x.\n//\n// It promises much. It does\n// not open a socket.": "",
	} {
		var doc *ast.CommentGroup
		if text != "" {
			doc = &ast.CommentGroup{}
			for line := range strings.SplitSeq(text, "\n") {
				doc.List = append(doc.List, &ast.Comment{Text: line})
			}
		}
		got := judge(doc, true)
		if (want == "") != (got == "") || !strings.Contains(got, want) {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}
