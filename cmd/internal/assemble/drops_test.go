package assemble_test

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"culvert/cmd/internal/assemble"
)

// What status can count is what its document explains.
func TestEveryReasonForADropIsDocumented(t *testing.T) {
	text, err := os.ReadFile("../../../docs/media.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## Nothing late\n")
	if !ok {
		t.Fatal("docs/media.md has no section of this name")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	word := regexp.MustCompile("`([^`]*)`")
	var documented []string
	for line := range strings.Lines(section) {
		cells := strings.Split(line, "|")
		if len(cells) != 4 {
			continue
		}
		for _, m := range word.FindAllStringSubmatch(cells[1], -1) {
			documented = append(documented, m[1])
		}
	}
	counted := assemble.DropReasons()
	for _, reason := range counted {
		if n := len(documented) - len(slices.DeleteFunc(slices.Clone(documented), func(d string) bool { return d == reason })); n != 1 {
			t.Errorf("%s can be counted and stands %d times in the table", reason, n)
		}
	}
	for _, reason := range documented {
		if !slices.Contains(counted, reason) {
			t.Errorf("%s stands in the table and nothing counts it", reason)
		}
	}
}
