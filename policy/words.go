package policy

import (
	"strconv"
	"unicode/utf8"
)

// quote makes a word from outside safe to show: one line, not endless.
func quote(s string) string {
	const limit = 80
	if len(s) > limit {
		cut := limit
		for cut > 0 && !utf8.RuneStart(s[cut]) {
			cut--
		}
		s = s[:cut] + "…"
	}
	return strconv.Quote(s)
}

// meant returns ` (did you mean "x"?)` when the word is a near miss of one of
// the choices, "" otherwise.
func meant(word string, choices ...string) string {
	best, at := "", 3
	for _, c := range choices {
		if d := distance(word, c); d < at && d <= (len(c)+1)/2 {
			best, at = c, d
		}
	}
	if best == "" {
		return ""
	}
	return " (did you mean " + strconv.Quote(best) + "?)"
}

// distance counts the edits between two words (Levenshtein, with the swap of
// two neighbours as one edit). Words far apart in length are not compared.
func distance(a, b string) int {
	if len(a) > len(b)+2 || len(b) > len(a)+2 {
		return 3
	}
	var before, row, next []int
	row = make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		next = make([]int, len(b)+1)
		next[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next[j+1] = min(row[j+1]+1, next[j]+1, row[j]+cost)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				next[j+1] = min(next[j+1], before[j-1]+1)
			}
		}
		before, row = row, next
	}
	return row[len(b)]
}
