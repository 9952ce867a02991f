package fair

// generosity is how many times what is free one may hold.
const generosity = 8

// Places are a limited number of places. One may take another while it holds less
// than eight times as many as are free: alone it gets eight ninths of all, two get
// eight seventeenths each (dynamic thresholds: Choudhury and Hahne, IEEE/ACM
// Transactions on Networking 6, 1998).
type Places[K comparable] struct {
	limit int
	held  int
	by    map[K]int // without those who hold none
}

// New returns places of which none is taken.
func New[K comparable](limit int) *Places[K] {
	return &Places[K]{limit: limit, by: map[K]int{}}
}

// Enter takes a place. Where it gets none, full says that nobody would.
func (p *Places[K]) Enter(who K) (full, ok bool) {
	free := p.limit - p.held
	if free <= 0 || p.by[who] >= generosity*free {
		return free <= 0, false
	}
	p.held++
	p.by[who]++
	return false, true
}

// Leave gives back a place that Enter gave.
func (p *Places[K]) Leave(who K) {
	p.held--
	if p.by[who]--; p.by[who] == 0 {
		delete(p.by, who)
	}
}

// Held is how many places are taken.
func (p *Places[K]) Held() int { return p.held }
