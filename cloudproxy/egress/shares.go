package egress

// generosity is how many times what is free an App ID may hold.
const generosity = 8

// shares counts what the App IDs hold of a limited number of places. One may take a
// place while it holds less than generosity times as many as are free. So one alone
// gets eight ninths of all, two get eight seventeenths each, and another one always
// finds room, without a number to set for each (dynamic thresholds: Choudhury and
// Hahne, IEEE/ACM Transactions on Networking 6, 1998).
type shares struct {
	limit int
	held  int
	by    map[string]int // without those that hold none
}

func newShares(limit int) shares { return shares{limit: limit, by: map[string]int{}} }

// enter takes a place. Without one, full says whether any App ID would get one.
func (s *shares) enter(app string) (full, ok bool) {
	free := s.limit - s.held
	if free <= 0 || s.by[app] >= generosity*free {
		return free <= 0, false
	}
	s.held++
	s.by[app]++
	return false, true
}

// leave gives a place back.
func (s *shares) leave(app string) {
	s.held--
	if s.by[app]--; s.by[app] == 0 {
		delete(s.by, app)
	}
}
