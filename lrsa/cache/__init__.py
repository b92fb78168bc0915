from lrsa.cache.api import LRSACache

__all__ = ["LRSACache"]
