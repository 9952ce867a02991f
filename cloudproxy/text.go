package cloudproxy

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// How many bytes of a text that a peer may have chosen are logged, counted as the
// log writes them, so that a line stays under 1 KiB.
const (
	logName     = 128
	logSentence = 400
)

// logText makes a text fit for a log: printable, and cut after limit bytes.
func logText(s string, limit int) string {
	var b strings.Builder
	size := 0
	for _, r := range s {
		if !unicode.IsPrint(r) || r == utf8.RuneError {
			r = '?'
		}
		size += utf8.RuneLen(r)
		if r == '"' || r == '\\' {
			size++ // is escaped
		}
		if size > limit {
			return b.String() + "..."
		}
		b.WriteRune(r)
	}
	return b.String()
}
