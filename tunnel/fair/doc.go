// Package fair divides a limited number of places among those who are known, such
// as App IDs or users of a machine, so that none of them takes all.
//
//	places := fair.New[string](50000)
//	if full, ok := places.Enter(app); !ok { … }
//	defer places.Leave(app)
//
// It promises that whoever holds nothing gets a place while others only grow by
// Enter, however many places one of them asks for, and that no number has to be set
// for each.
//
// It takes no place away from anybody, so what one holds already stays its own
// however many others come, and it is not safe for concurrent use.
package fair
