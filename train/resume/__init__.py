"""A run that survives being killed: complete checkpoints, the run directory, and the trainer that resumes."""
