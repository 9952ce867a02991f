// Package browser holds policy files that lead browsers through Culvert where
// capture is not wanted, and the test that they are right.
//
// It promises that each file is valid, names only policies that exist and the
// front's default address, that the files of one browser for two systems say the
// same, and that a real Chromium holds a call by them with nothing sent past the
// proxy. It does not run Edge or Firefox: what was seen of Firefox by hand is in
// docs/apps.md.
package browser
