from lrsa.cache.api import CACHE_ARGUMENT, LRSACache

__all__ = ["CACHE_ARGUMENT", "LRSACache"]
