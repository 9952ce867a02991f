// Package fair divides a limited number of places among those who are known, such
// as App IDs or users of a machine, so that none of them takes all.
//
//	places := fair.New[string](50000)
//	if full, ok := places.Enter(app); !ok { … }
//	defer places.Leave(app)
//
// It promises that however many places one asks for, a ninth of all is left to the
// others, who share it in the same way, and that no number has to be set for each. Of
// eight places or fewer one may have all.
//
// It takes no place away from anybody, so what one holds already stays its own
// however many others come, and it is not safe for concurrent use.
package fair
