"""Serves a model over compressed caches: many requests at a time, conversations that go on over what they kept."""
