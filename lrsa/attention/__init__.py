from lrsa.attention.api import lrsa_attention

__all__ = ["lrsa_attention"]
