package tunnel

import (
	"maps"
	"sync"
)

// refusalCodes bounds how many codes Refusals tell apart.
const refusalCodes = 64

// Refusals counts refusals by code. Codes may come from the far end, and the
// counters must not grow with them: what is one too many counts as Internal. The
// zero value is ready; several goroutines may use it.
type Refusals struct {
	mu     sync.Mutex
	byCode map[string]uint64 // guarded by mu
}

// Add counts one.
func (r *Refusals) Add(code Code) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byCode == nil {
		r.byCode = map[string]uint64{}
	}
	if _, ok := r.byCode[string(code)]; !ok && len(r.byCode) >= refusalCodes {
		code = Internal
	}
	r.byCode[string(code)]++
}

// ByCode returns a copy of the counters.
func (r *Refusals) ByCode() map[string]uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.byCode)
}
