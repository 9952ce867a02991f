// Package age tells how long a record was held up on its way, where sender and
// receiver share no clock.
//
// It promises an age to the millisecond beyond the shortest way seen lately, in
// spite of clocks that drift. It does not know how long the shortest way itself
// takes, nor of a queue that has stood on the path since the beginning.
package age
