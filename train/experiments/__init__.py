"""Experiments: several settings times several seeds, trained as ordinary runs and measured on the same rows."""
