package tunnel_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// codes returns the codes that errors.go declares, by the names of their
// constants.
func codes(t *testing.T) map[string]string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "errors.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	ast.Inspect(f, func(n ast.Node) bool {
		if v, ok := n.(*ast.ValueSpec); ok && len(v.Values) > 0 {
			if id, ok := v.Type.(*ast.Ident); ok && id.Name == "Code" {
				for i, name := range v.Names {
					all[name.Name], _ = strconv.Unquote(v.Values[i].(*ast.BasicLit).Value)
				}
			}
		}
		return true
	})
	if len(all) < 20 {
		t.Fatalf("errors.go has %d codes; this test reads it wrongly", len(all))
	}
	return all
}

// replies returns what the front answers for each constant's name, "05 502",
// and for all others under "".
func replies(t *testing.T) map[string]string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "../sidecar/front_reply.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	socks := map[string]string{}
	status := map[string]string{}
	for code := 100; code < 600; code++ {
		status["Status"+strings.NewReplacer(" ", "", "-", "").Replace(http.StatusText(code))] = strconv.Itoa(code)
	}
	all := map[string]string{}
	reply := func(r *ast.ReturnStmt) string {
		return socks[r.Results[0].(*ast.Ident).Name] + " " + status[r.Results[1].(*ast.SelectorExpr).Sel.Name]
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ValueSpec:
			socks[n.Names[0].Name] = strings.TrimPrefix(n.Values[0].(*ast.BasicLit).Value, "0x")
		case *ast.CaseClause:
			for _, c := range n.List {
				if s, ok := c.(*ast.SelectorExpr); ok {
					all[s.Sel.Name] = reply(n.Body[0].(*ast.ReturnStmt))
				}
			}
			return false
		case *ast.ReturnStmt:
			all[""] = reply(n)
		}
		return true
	})
	return all
}

func TestThePageOfErrorsHasEveryCodeWithItsReplies(t *testing.T) {
	b, err := os.ReadFile("../docs/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string][]string{}
	for _, line := range strings.Split(string(b), "\n") {
		m := regexp.MustCompile("^\\| `([a-z_]+)` \\| (\\d) \\| (\\d\\d) \\| (\\d{3}) \\| ([^|]+) \\| ([^|]+) \\|$").FindStringSubmatch(line)
		if m != nil {
			rows[m[1]] = m[2:]
		}
	}
	answers := replies(t)
	for name, code := range codes(t) {
		row := rows[code]
		delete(rows, code)
		if row == nil {
			t.Errorf("docs/errors.md has no row for %s: its exit code, SOCKS reply, HTTP status, meaning and what to do", code)
			continue
		}
		want := answers[name]
		if want == "" {
			want = answers[""]
		}
		if got := row[1] + " " + row[2]; got != want {
			t.Errorf("docs/errors.md says that apps see %s for %s; the front says %s", got, code, want)
		}
	}
	for code := range rows {
		t.Errorf("docs/errors.md has %s, which is no code", code)
	}
}
