// Package bulk makes downloads and uploads give way to calls that share their
// path. A Pacer stands in front of what one end of a session writes to its TCP
// streams; each end has its own, so both directions give way.
//
// It promises that, while a call is live, the streams that count as bulk write
// no faster together than keeps the path's queueing at about 25 ms, and share
// that evenly; that they keep 256 kbit/s together, however long the path
// queues; that a stream with the framing of RFC 4571 or of TURN, or with the
// rhythm of media, never waits; and that without a call, or in front of a stream
// that does not count as bulk, no Write waits, is cut or is copied.
//
// What counts as bulk: a stream that in two seconds running was above 256 kbit/s
// without the rhythm of media, or that has sent 5 Mbit within one; until ten
// seconds without. The rhythm: at least five writes each way in a second, and
// less than 5 Mbit/s. Ten such seconds of the last twelve make a stream media.
// A second in which it mostly waited here says nothing of its rhythm.
//
// It does not measure: the caller says what queues. It does not see what is not
// a stream of this session, and gives way to that as well. It does not look into
// TLS: a download that happens to have the rhythm of media passes for it, and so
// does one inside TURN.
package bulk
