from lrsa.attention.api import check_impl, lrsa_attention

__all__ = ["check_impl", "lrsa_attention"]
