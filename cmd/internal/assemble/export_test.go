package assemble

// For tests outside of the package.
var (
	Follow = follow
	Stamps = stamps
)
