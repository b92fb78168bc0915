"""Several processes as one run: start and end of the group, and Ulysses sequence parallelism."""
