"""Question answering, text and synthetic long-context data as tokenized rows for training and evaluation."""

from data.corpus import Corpus, load
from data.report import DataReport
from data.settings import DataSettings, SyntheticSettings
from data.sources.files import DataError

__all__ = ["Corpus", "DataError", "DataReport", "DataSettings", "SyntheticSettings", "load"]
