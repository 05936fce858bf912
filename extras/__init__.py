"""What hangs on to the ground floor: studies, benchmarks, other kinds of drafts, engines."""
