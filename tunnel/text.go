package tunnel

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// LogText makes a text that a client or peer chose fit for a log: printable, and
// cut after limit bytes as the log writes them, between words where there are any.
func LogText(s string, limit int) string {
	var b strings.Builder
	size, space := 0, 0
	for _, r := range s {
		if !unicode.IsPrint(r) || r == utf8.RuneError {
			r = '?'
		}
		size += utf8.RuneLen(r)
		if r == '"' || r == '\\' {
			size++ // is escaped
		}
		if size > limit {
			text := b.String()
			if space > len(text)/2 {
				text = text[:space]
			}
			return text + "..."
		}
		if r == ' ' {
			space = b.Len()
		}
		b.WriteRune(r)
	}
	return b.String()
}
