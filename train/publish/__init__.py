"""A finished run on the Hub: checked, free of local paths, described by a model card, sent as one commit."""
