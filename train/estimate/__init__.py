"""Memory per device of a run, predicted from its settings before anything is loaded."""
