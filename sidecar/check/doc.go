// Package check is the test before a call: it takes the steps that a call needs,
// one after another, and says what stands in the way in words that IT can act on.
//
//	config ─► names ─► tcp ─► proxy ─► tls ─► portal ─► udp ─► clock ─► token ─► policy ─► media, on each way
//
// It promises that each step ends within its time, that a step which can not be
// taken says so and does not hide the next one, and that neither a report nor its
// page holds a secret: no token, password or key comes into this package's hands
// but inside what it is given to dial with.
//
// It does not read a configuration and knows no carrier: cmd hands in how to
// resolve and dial, a link, and the steps that need more. It changes nothing on
// the machine, and does not touch a sidecar that runs.
package check
