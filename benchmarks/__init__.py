"""Side-by-side timings; scripts to run from a checkout, never part of the tests' verdicts."""
